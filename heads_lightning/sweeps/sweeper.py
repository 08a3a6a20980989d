"""Makes the cells of a sweep, hands them to a Hydra launcher, and closes the sweep: parent run, table, exit code.

Every cell is composed and checked before the first one starts, and written down as a resolved config. What the launcher is given for a
cell is its hash and its folder, so a worker, wherever it is, composes nothing of its own.
"""

import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from heads_lightning.composition import config_hash, machine_problems, to_experiment, to_yaml
from heads_lightning.composition.mistakes import explained
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.sweep import SweepConfig
from heads_lightning.registry import ConfigError, RunError
from heads_lightning.sweeps import settings
from heads_lightning.sweeps.comparison import compare, summary
from heads_lightning.sweeps.grid import grid, meets, varied
from heads_lightning.sweeps.ledger import FINISHED, Entry, Ledger, State
from heads_lightning.sweeps.supervisor import STOP_FILE, close_warm_parent
from heads_lightning.tracking.process import status_of
from heads_lightning.tracking.stopping import Stopped

Compose = Callable[[Sequence[str]], tuple[DictConfig, str | None]]
"""From the overrides of a cell to (its tree, the folder that the user named for it; None for the cell's number)."""
Launch = Callable[[Sequence[Sequence[str]], int], Any]
"""Hydra's `Launcher.launch(overrides of each job, number of the first)`."""
REMOTE = ("submitit_slurm",)
"""Launchers whose cells run on other machines: this one's devices say nothing about them."""


class Cell(NamedTuple):
    """A cell before it is written down."""

    overrides: list[str]
    """Of the command line, for this cell."""
    config: ExperimentConfig
    folder: str | None
    """Named by the user's hydra.sweep.subdir; None for the cell's number."""

    @property
    def hash(self) -> str:
        """Identity."""
        return config_hash(self.config)


class Sweep(ABC):
    """A sweep in the middle of its command. Leaves: GridSweep and OptunaSweep."""

    name: str

    def __init__(self, sweep_dir: Path, overrides: Sequence[str], *, compose: Compose, launcher: str) -> None:
        self.sweep_dir = sweep_dir
        self.overrides = list(overrides)
        self.ledger = Ledger(sweep_dir)
        self._compose = compose
        self._launcher = launcher
        self._varied = set(varied(overrides))
        tree, _ = compose(self._first())
        first = to_experiment(tree)
        self.options: SweepConfig = first.sweep
        self._tracking, self._run_root = first.tracking, Path(first.run_root)

    def run(self, launch: Launch, keep: settings.Settings) -> None:
        """Run what is not finished.

        Raises:
            ConfigError: a cell that cannot work; nothing was started.
            RunError: a cell failed.
        """
        if self._launcher in REMOTE and shutil.which("sbatch") is None:
            raise ConfigError(
                f"hydra/launcher={self._launcher} needs Slurm, whose sbatch is not on this machine; start it from a login node of the "
                f"cluster, or use hydra/launcher=submitit_local or joblib"
            )
        with self._closed():
            self._prepare()
            self.sweep_dir.mkdir(parents=True, exist_ok=True)
            settings.write(self.sweep_dir, keep._replace(options=replace(self.options, resume=None)))
            (self.sweep_dir / STOP_FILE).unlink(missing_ok=True)
            with self._parent_run():
                try:
                    self._launch_all(launch)
                except (KeyboardInterrupt, Stopped) as stop:
                    stop.add_note(f"  go on with: heads-lightning train -m sweep.resume={self.sweep_dir}")
                    raise
        self._raise_failures()

    @abstractmethod
    def _first(self) -> list[str]:
        """Overrides of one cell, which tell the settings of the whole."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make and check the cells, as far as they are known beforehand."""

    @abstractmethod
    def _launch_all(self, launch: Launch) -> None:
        """Launch every cell that is not finished."""

    # Cells

    def _cell(self, overrides: list[str]) -> Cell:
        """A cell composed and checked.

        Raises:
            ConfigError: it cannot work.
        """
        with explained(overrides):
            tree, folder = self._compose(overrides)
        config = replace(to_experiment(tree, overrides), sweep=SweepConfig(), resume=None)
        for problem in machine_problems(config) if self._launcher not in REMOTE else []:
            raise ConfigError(f"{' '.join(overrides)}: {problem}")
        return Cell(overrides, config, folder)

    def _add(self, cells: Sequence[Cell], *, trial: int | None = None) -> list[Entry]:
        rows = [(cell.hash, cell.folder, self._label(cell.overrides), to_yaml(cell.config)) for cell in cells]
        return self.ledger.add(rows, trial=trial)

    def _label(self, overrides: Sequence[str]) -> list[str]:
        last = {text.partition("=")[0]: text for text in overrides}
        return [text for key, text in last.items() if key in self._varied]

    def _job(self, entry: Entry) -> list[str]:
        """What the launcher is given: which cell, and where."""
        flags = [f"sweep.warm={str(self.options.warm).lower()}", f"sweep.fail_fast={str(self.options.fail_fast).lower()}"]
        return [f"sweep.cell='{entry.hash}'", *flags, f"hydra.sweep.subdir='{entry.folder}'"]

    def _launch(self, launch: Launch, entries: Sequence[Entry]) -> None:
        todo = [entry for entry in entries if entry.state not in FINISHED]
        if todo:
            launch([self._job(entry) for entry in todo], todo[0].number)

    # The end

    @contextmanager
    def _closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            close_warm_parent()

    @contextmanager
    def _parent_run(self) -> Iterator[None]:
        """The MLflow run that the cells' are children of; ended as the ledger says."""
        from heads_lightning.tracking.open_run import open_parent

        name = f"sweep {self.sweep_dir.name}"
        log = open_parent(self._tracking, sweep_dir=self.sweep_dir, run_root=self._run_root, name=name)
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            if self.ledger.path.exists():
                compare(self.sweep_dir, log=log)
            unfinished = any(entry.state not in FINISHED for entry in self.ledger.entries().values())
            log.finish(status_of(error) if error is not None else "FAILED" if unfinished else "FINISHED")
            print(summary(self.sweep_dir), file=sys.stderr, flush=True)

    def _raise_failures(self) -> None:
        entries = list(self.ledger.entries().values())
        failed = [str(entry.number) for entry in entries if entry.state == State.failed]
        left = [str(entry.number) for entry in entries if entry.state not in (*FINISHED, State.failed)]
        if failed or left:
            parts = [f"failed: {', '.join(failed)}"] * bool(failed) + [f"not finished: {', '.join(left)}"] * bool(left)
            raise RunError(
                f"{len(failed) + len(left)} of {len(entries)} cells are not done ({'; '.join(parts)}). "
                f"Go on with: heads-lightning train -m sweep.resume={self.sweep_dir}"
            )


class GridSweep(Sweep):
    """Lists of values multiplied (`hydra/sweeper=grid`, the one that `-m` takes)."""

    name = "grid"

    def _first(self) -> list[str]:
        return next(grid(self.overrides))

    def _prepare(self) -> None:
        cells = [self._cell(overrides) for overrides in grid(self.overrides, self.options.zip)]
        kept = [cell for cell in cells if meets(cell.config, self.options.filter)]
        if not kept:
            raise ConfigError(f"sweep.filter={self.options.filter} leaves none of the {len(cells)} cells")
        seen: dict[str, Cell] = {}
        for cell in kept:
            other = seen.setdefault(cell.hash, cell)
            if other is not cell:
                one, two = (" ".join(self._label(same.overrides)) for same in (other, cell))
                raise ConfigError(
                    f"two cells are the same experiment: {one} and {two}; "
                    f"what only says where a run goes (name, run_root, tracking, …) makes no other cell"
                )
        self._kept = kept

    def _launch_all(self, launch: Launch) -> None:
        self._launch(launch, self._add(self._kept))


class OptunaSweep(Sweep):
    """Cells proposed by Optuna from those before (`hydra/sweeper=optuna`), told what the ledger says."""

    name = "optuna"

    def _first(self) -> list[str]:
        from heads_lightning.sweeps.study import require_optuna, search_space

        require_optuna()
        fixed, space = search_space(self.overrides)
        return [*fixed, *(f"{key}={_any_value(distribution)}" for key, distribution in space.items())]

    def _prepare(self) -> None:
        if self.options.zip:
            raise ConfigError("sweep.zip is for grids; hydra/sweeper=optuna proposes each key by itself")
        self._cell(self._first())

    def _launch_all(self, launch: Launch) -> None:
        from heads_lightning.sweeps.study import open_study, search_space

        self._fixed, self._space = search_space(self.overrides)
        study = open_study(self.sweep_dir, self.options)
        self._finish_begun(study, launch)
        while (left := self.options.trials - self._told(study)) > 0 and not (self.sweep_dir / STOP_FILE).exists():
            asked = [self._ask(study) for _ in range(min(left, self.options.batch))]
            self._launch_told(study, launch, [entry for entry in asked if entry is not None])

    def _told(self, study: Any) -> int:
        return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))

    def _ask(self, study: Any) -> tuple[int, Entry] | None:
        """(number of a new trial, its cell); None where a condition of sweep.filter left it out or it cannot work."""
        from heads_lightning.sweeps.study import CELL, ask, tell_failed

        trial, overrides = ask(study, self._space)
        try:
            cell = self._cell([*self._fixed, *overrides])
            if not meets(cell.config, self.options.filter):
                raise ConfigError("left out by sweep.filter")
        except ConfigError as error:
            trial.set_user_attr("reason", str(error))
            tell_failed(study, trial.number)
            return None
        (entry,) = self._add([cell], trial=trial.number)
        trial.set_user_attr(CELL, entry.hash)
        return trial.number, entry

    def _finish_begun(self, study: Any, launch: Launch) -> None:
        """Cells that an earlier command began: told what became of them, or continued."""
        from heads_lightning.sweeps.study import CELL, tell_failed

        entries = self.ledger.entries() if self.ledger.path.exists() else {}
        begun = [trial for trial in study.get_trials(deepcopy=False) if not trial.state.is_finished()]
        known = [(trial.number, entries[trial.user_attrs[CELL]]) for trial in begun if trial.user_attrs.get(CELL) in entries]
        for trial in begun:  # killed between the question and the ledger
            if trial.user_attrs.get(CELL) not in entries:
                tell_failed(study, trial.number)
        self._launch_told(study, launch, known)

    def _launch_told(self, study: Any, launch: Launch, asked: Sequence[tuple[int, Entry]]) -> None:
        from heads_lightning.sweeps.study import tell

        self._launch(launch, list({entry.hash: entry for _, entry in asked}.values()))
        entries = self.ledger.entries()
        self._check_metric(list(entries.values()))
        for number, entry in asked:
            tell(study, number, entries[entry.hash], self.options.metric)

    def _check_metric(self, entries: Sequence[Entry]) -> None:
        """Refuse to search by a metric that no cell has logged."""
        done, metric = [entry for entry in entries if entry.state == State.done], self.options.metric
        if done and not any(metric in entry.metrics for entry in done):
            known = ", ".join(sorted(done[0].metrics)) or "none"
            raise RunError(f"cell {done[0].number} logged no {metric}; set sweep.metric to one of {known}")


def _any_value(distribution: Any) -> Any:
    """A value inside a distribution."""
    return distribution.choices[0] if hasattr(distribution, "choices") else distribution.low
