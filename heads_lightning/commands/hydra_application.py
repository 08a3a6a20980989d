"""The commands that run through Hydra, so that its own flags, launchers and sweepers work: `train`, `prepare`, `check`.

Hydra is asked to raise instead of printing; dispatch.py turns what it raises into one line. The task functions live here, in an
importable module, since launchers pickle them. A single run and every cell of a grid are composed and checked before the first run
folder exists: a mistake leaves nothing behind.
"""

import importlib
import itertools
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from heads_lightning.composition import compose, machine_problems, to_experiment
from heads_lightning.composition.mistakes import check_overrides, explained, nearest_flag, parse
from heads_lightning.composition.store import conf_dir, prepare_store, version_base
from heads_lightning.registry import ConfigError

PROGRAM = "heads-lightning"
PRIMARY = "train"
"""The primary config of every command here: they all speak about an experiment."""


def train(arguments: Sequence[str]) -> None:
    """`heads-lightning train`."""
    main("train", arguments)


def prepare(arguments: Sequence[str]) -> None:
    """`heads-lightning prepare`."""
    main("prepare", arguments)


def check(arguments: Sequence[str]) -> None:
    """`heads-lightning check`."""
    main("check", arguments)


def train_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning train`."""
    return _job("train", tree)


def prepare_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning prepare`."""
    return _job("prepare", tree)


def check_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning check`."""
    return _job("check", tree)


TASKS: dict[str, Callable[[DictConfig], Any]] = {"train": train_task, "prepare": prepare_task, "check": check_task}


class Refused(BaseException):
    """A ConfigError on its way through Hydra, which would announce an Exception in its own words first."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(error)
        self.error = error


def _job(command: str, tree: DictConfig) -> Any:
    """Call `heads_lightning.commands.COMMAND.run(config, run_dir)` with what Hydra composed."""
    context = HydraConfig.get()
    run_dir = Path(context.runtime.output_dir)
    try:
        config = to_experiment(tree)
        for problem in machine_problems(config):
            raise ConfigError(problem)
        with _as_started():
            return importlib.import_module(f"heads_lightning.commands.{command}").run(config, run_dir)
    except ConfigError as error:
        if context.mode == RunMode.MULTIRUN:
            raise  # the other cells of the sweep go on
        raise Refused(error) from error
    finally:
        with suppress(OSError):
            run_dir.rmdir()  # only where nothing was written: a mistake, or a command that has no results of its own


def main(command: str, arguments: Sequence[str]) -> None:
    """`heads-lightning COMMAND ARGUMENTS` through Hydra."""
    prepare_store()
    arguments = overrides_last(arguments)
    flags, overrides = split(arguments)
    with explained(overrides, flags.config_dir):
        if not (flags.shell_completion or flags.hydra_help):
            check_overrides(overrides, flags.config_dir, sweep=flags.multirun)
        if not (flags.cfg or flags.info or flags.shell_completion or flags.hydra_help):
            check_first(flags, overrides)
        application = hydra.main(config_path=str(conf_dir()), config_name=PRIMARY, **version_base())(TASKS[command])
        try:
            with hydra_process(arguments), _sweep_closed(command):
                application()
        except Refused as refused:
            raise refused.error from refused


@contextmanager
def _sweep_closed(command: str) -> Iterator[None]:
    """Tell the command how its sweep ended (only `train` keeps a record of one)."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        module = sys.modules.get(f"heads_lightning.commands.{command}")
        if command == "train" and module is not None:
            module.close_sweep(error)


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Flags first: Hydra's parser takes overrides in one run, and users write them on both sides of a flag."""
    is_override = [not argument.startswith("-") and "=" in argument for argument in arguments]
    return [a for a, last in zip(arguments, is_override, strict=True) if not last] + [
        a for a, last in zip(arguments, is_override, strict=True) if last
    ]


def split(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Hydra's own flags, parsed by Hydra's parser, and the overrides."""
    from hydra._internal.utils import get_args_parser

    parser: ArgumentParser = get_args_parser()

    def refuse(message: str) -> Any:
        raise ConfigError(nearest_flag(message, [flag for action in parser._actions for flag in action.option_strings]))

    parser.error = refuse
    flags = parser.parse_args(list(arguments))
    if flags.config_path:
        raise ConfigError("--config-path would hide the shipped configuration; add your own files with --config-dir FOLDER")
    return flags, list(flags.overrides)


def check_first(flags: Any, overrides: list[str]) -> None:
    """Compose and check what is about to run, every cell of a grid; against this machine too where it is the one that will run it."""
    composed = partial(compose, config_dir=flags.config_dir, config_name=flags.config_name or PRIMARY)
    local = not any(override.startswith("hydra/launcher=submitit") for override in overrides)
    for cell in grid(overrides) if flags.multirun else [overrides]:
        config = composed(cell)
        for problem in machine_problems(config) if local else []:
            raise ConfigError(f"{' '.join(cell)}: {problem}" if flags.multirun else problem)


def grid(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The cells of a sweep over lists of values; ranges and intervals (for other sweepers) are left to the sweeper."""
    axes = []
    for override in parse(overrides):
        if not override.is_sweep_override():
            axes.append([override.input_line])
        elif override.is_discrete_sweep():
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
    return (list(cell) for cell in itertools.product(*axes))


class Process(NamedTuple):
    """What this file changes in the process while Hydra runs."""

    argv: list[str]
    full_error: str | None
    """$HYDRA_FULL_ERROR."""

    @classmethod
    def now(cls) -> "Process":
        """As it is."""
        return cls(sys.argv, os.environ.get("HYDRA_FULL_ERROR"))

    def enter(self) -> None:
        """Make it so."""
        sys.argv = self.argv
        if self.full_error is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = self.full_error


_started: list[Process] = []
"""The process as the user started it, while Hydra runs in it; empty in the process of a launcher."""


@contextmanager
def hydra_process(arguments: Sequence[str]) -> Iterator[None]:
    """The process as Hydra reads it: its argv, and errors that are raised instead of printed."""
    _started.append(Process.now())
    Process([PROGRAM, *arguments], "1").enter()
    try:
        yield
    finally:
        _started.pop().enter()


@contextmanager
def _as_started() -> Iterator[None]:
    """The process as the user started it, while a job runs: ranks and workers that the job starts repeat argv and environment."""
    for_hydra = Process.now()
    if _started:
        _started[-1].enter()
    try:
        yield
    finally:
        for_hydra.enter()
