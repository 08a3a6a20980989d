"""The commands that run through Hydra, so that its own flags, launchers and sweepers work: `train`, `prepare`, …

Hydra is asked to raise instead of printing; `__main__` turns what it raises into one line. The task functions live here, in an
importable module, since launchers pickle them. A single run and every cell of a grid are composed and checked before the first run
folder exists: a mistake leaves nothing behind.
"""

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from heads_lightning.composition import compose, to_experiment
from heads_lightning.composition.mistakes import explained, parse
from heads_lightning.composition.store import conf_dir, prepare_store, version_base

PROGRAM = "heads-lightning"


def train_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning train`."""
    return _job("train", tree)


def prepare_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning prepare`."""
    return _job("prepare", tree)


TASKS: dict[str, Callable[[DictConfig], Any]] = {"train": train_task, "prepare": prepare_task}


def _job(command: str, tree: DictConfig) -> Any:
    config = to_experiment(tree)
    run = importlib.import_module(f"heads_lightning.commands.{command}").run
    return run(config, Path(HydraConfig.get().runtime.output_dir))


def main(command: str, arguments: Sequence[str]) -> None:
    """`heads-lightning COMMAND ARGUMENTS` through Hydra."""
    prepare_store()
    flags, overrides = split(arguments)
    with explained(overrides, flags.config_dir):
        if not (flags.cfg or flags.info or flags.shell_completion or flags.hydra_help):
            check_first(flags, overrides)
        application = hydra.main(config_path=str(conf_dir()), config_name="train", **version_base())(TASKS[command])
        with hydra_process(command, arguments):
            application()


def split(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Hydra's own flags, parsed by Hydra's parser, and the overrides."""
    from hydra._internal.utils import get_args_parser

    flags = get_args_parser().parse_args(list(arguments))
    return flags, list(flags.overrides)


def check_first(flags: Any, overrides: list[str]) -> None:
    """Compose and check what is about to run; every cell of a grid."""
    check = partial(compose, config_dir=flags.config_dir, config_name=flags.config_name or "train")
    if not flags.multirun:
        check(overrides)
        return
    for cell in grid(overrides):
        check(cell)


def grid(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The cells of a sweep over lists of values; ranges and intervals (for other sweepers) are left to the sweeper."""
    axes = []
    for override in parse(overrides):
        if override.is_sweep_override():
            if override.is_discrete_sweep():
                axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([override.input_line])
    return (list(cell) for cell in itertools.product(*axes))


@contextmanager
def hydra_process(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """The process as Hydra reads it: its argv, and errors that are raised instead of printed."""
    before, user_wants_traceback = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [PROGRAM, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if user_wants_traceback is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = user_wants_traceback


def train(arguments: Sequence[str]) -> None:
    """`heads-lightning train`."""
    main("train", arguments)


def prepare(arguments: Sequence[str]) -> None:
    """`heads-lightning prepare`."""
    main("prepare", arguments)
