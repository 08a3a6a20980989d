"""The commands that run through Hydra, so that its own flags, launchers and sweepers work: `train`, `prepare`.

Hydra is asked to raise instead of printing; dispatch.py turns what it raises into one line. The task functions live here, in an
importable module, since launchers pickle them. A single run and every cell of a grid are composed and checked before the first run
folder exists: a mistake leaves nothing behind.
"""

import importlib
import os
import sys
import traceback
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
from heads_lightning.composition.store import SWEEPERS, conf_dir, prepare_store, version_base
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps.grid import grid
from heads_lightning.training.attempts import agreed_name

PROGRAM = "heads-lightning"
PRIMARY = "train"
"""The primary config of every command here: they all speak about an experiment."""


def train(arguments: Sequence[str]) -> None:
    """`heads-lightning train`."""
    main("train", arguments)


def prepare(arguments: Sequence[str]) -> None:
    """`heads-lightning prepare`."""
    main("prepare", arguments)


def train_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning train`."""
    return _job("train", tree)


def prepare_task(tree: DictConfig) -> Any:
    """One job of `heads-lightning prepare`."""
    return _job("prepare", tree)


TASKS: dict[str, Callable[[DictConfig], Any]] = {"train": train_task, "prepare": prepare_task}


class Raised(BaseException):
    """An exception of the job on its way through Hydra, which would announce it in its own words first."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _job(command: str, tree: DictConfig) -> Any:
    """Call `heads_lightning.commands.COMMAND.run(config, run_dir)` with what Hydra composed."""
    context = HydraConfig.get()
    run_dir = Path(context.runtime.output_dir)
    if tree.sweep.cell is not None:
        return _cell(tree, Path(context.sweep.dir))
    try:
        config = to_experiment(tree)
        for problem in machine_problems(config):
            raise ConfigError(problem)
        with _as_started():
            return importlib.import_module(f"heads_lightning.commands.{command}").run(config, run_dir)
    except Exception as error:
        if context.mode == RunMode.MULTIRUN:
            raise  # the other cells of the sweep go on
        raise Raised(error) from error
    finally:
        _remove_if_empty(run_dir, Path(str(tree.run_root)))


def _remove_if_empty(run_dir: Path, run_root: Path) -> None:
    """The folder that Hydra made for a run, and those above it up to `run_root`, where nothing was written: a mistake, or a command
    that has no results of its own."""
    folders = [run_dir, *run_dir.parents]
    above = folders[: folders.index(root) + 1] if (root := run_root.absolute()) in folders else [run_dir]
    with suppress(OSError):  # not empty
        for folder in above:
            folder.rmdir()


def _cell(tree: DictConfig, sweep_dir: Path) -> None:
    """One cell of a sweep, in the worker of a launcher: it is run from what the sweep wrote, not from `tree`."""
    from heads_lightning.sweeps.supervisor import run_cell

    with _as_started():
        run_cell(sweep_dir, tree.sweep.cell, warm=tree.sweep.warm, fail_fast=tree.sweep.fail_fast)


def main(command: str, arguments: Sequence[str]) -> None:
    """`heads-lightning COMMAND ARGUMENTS` through Hydra."""
    prepare_store()
    arguments = overrides_last(arguments)
    if command == "train":
        arguments = _with_folder(sweep_arguments(arguments))
    flags, overrides = split(arguments)
    with explained(overrides, flags.config_dir):
        if not (flags.shell_completion or flags.hydra_help):
            check_overrides(overrides, flags.config_dir, sweep=flags.multirun)
        if not (flags.cfg or flags.info or flags.shell_completion or flags.hydra_help):
            check_first(flags, overrides)
        application = hydra.main(config_path=str(conf_dir()), config_name=PRIMARY, **version_base())(TASKS[command])
        try:
            with hydra_process(arguments):
                application()
            return
        except Raised as raised:
            failure = raised.error  # raised below, without what Hydra adds to it
        except OSError as error:
            if error.filename is None or any(frame.name == _job.__name__ for frame in traceback.extract_tb(error.__traceback__)):
                raise
            # before the job: Hydra makes its folder
            kind = "sweep" if flags.multirun else "run"
            raise ConfigError(f"the {kind}'s folder {error.filename} cannot be made ({error.strerror}); choose another place: "
                              f"run_root=FOLDER, or hydra.{kind}.dir=FOLDER for this {kind}") from error  # fmt: skip
        raise failure


def _with_folder(arguments: list[str]) -> list[str]:
    """The arguments with the run's folder in them, where several processes were started together and must agree on it."""
    flags, overrides = split(arguments)
    if flags.multirun or any(override.startswith(("hydra.run.dir=", "resume=")) for override in overrides):
        return arguments
    name = agreed_name(os.environ)
    return arguments if name is None else [*arguments, f"hydra.run.dir=${{run_root}}/${{name}}/{name}"]


def sweep_arguments(arguments: list[str]) -> list[str]:
    """The arguments of `train` with our sweeper in Hydra's place, and with those of an earlier command where one is gone on with.

    Raises:
        ConfigError: settings of a sweep for a single run.
    """
    flags, overrides = split(arguments)
    given = {override.get_key_element(): override for override in parse([o for o in overrides if o.startswith(("sweep.", "hydra"))])}
    if "sweep.resume" in given and given["sweep.resume"].value() is not None:
        return _resumed_sweep(flags, arguments, overrides, given, Path(str(given["sweep.resume"].value())))
    if not flags.multirun:
        alone = next((o.input_line for key, o in given.items() if key.startswith("sweep.")), None)
        if alone is not None:
            raise ConfigError(f"`{alone}` is for a sweep, and this is one run; add -m, or leave it out")
        return arguments
    if "hydra/sweeper" not in given:
        return [*arguments, "hydra/sweeper=grid"]
    sweeper = str(given["hydra/sweeper"].value())
    if sweeper not in SWEEPERS:
        raise ConfigError(f"hydra/sweeper={sweeper} would train cells in one process, with settings of their own on every rank; "
                          f"use hydra/sweeper={' or '.join(SWEEPERS)}")  # fmt: skip
    return arguments


def _resumed_sweep(flags: Any, arguments: list[str], overrides: list[str], given: dict[str, Any], folder: Path) -> list[str]:
    """A sweep's own command again, with what is given now on top. New overrides (not of sweep. or hydra) replace its cells."""
    from heads_lightning.sweeps import settings

    before = settings.read(folder)
    replaced = [o for o in overrides if not o.startswith(("sweep.", "hydra"))]
    kept = [*([] if replaced else before.overrides), *before.hydra]
    kept = [text for text in kept if parse([text])[0].get_key_element() not in given]
    more = [f"--config-dir={before.config_dir}"] if before.config_dir and not flags.config_dir else []
    more += [f"--config-name={before.config_name}"] if before.config_name != PRIMARY and not flags.config_name else []
    more += [] if flags.multirun else ["-m"]
    own = [] if any("hydra/sweeper" in text for text in (*kept, *given)) else [f"hydra/sweeper={before.sweeper}"]
    quoted = folder.resolve().as_posix().replace("'", "\\'")
    return overrides_last([*more, *arguments, *kept, *own, f"hydra.sweep.dir='{quoted}'"])


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
    if flags.multirun and any(override.startswith("hydra/sweeper=") and override != "hydra/sweeper=basic" for override in overrides):
        return  # a sweeper of ours checks its cells before it starts the first one
    for cell in grid(overrides) if flags.multirun else [overrides]:
        config = composed(cell)
        for problem in machine_problems(config) if local else []:
            raise ConfigError(f"{' '.join(cell)}: {problem}" if flags.multirun else problem)


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
