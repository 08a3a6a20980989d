"""A sweep: many runs from one command (`train -m GROUP=A,B FIELD=1,2`). Settings of the whole, under `sweep.`; no run depends on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from heads_lightning.registry import ConfigError


class Direction(StrEnum):
    """Which end of a metric is the good one."""

    minimize = "minimize"
    """Smaller is better: a loss."""
    maximize = "maximize"
    """Larger is better: an accuracy."""


class Sampler(StrEnum):
    """Who proposes the next cells of `hydra/sweeper=optuna`."""

    tpe = "tpe"
    """Tree-structured Parzen estimator: learns from the cells before."""
    random = "random"
    """Independent draws."""
    quasi_random = "quasi_random"
    """Draws that fill the space evenly (Sobol')."""


class Pruner(StrEnum):
    """Who ends hopeless cells of `hydra/sweeper=optuna`, at a validation."""

    none = "none"
    """Nobody: every cell is trained to its end."""
    median = "median"
    """A cell that is worse than the median of the others at the same step."""
    halving = "halving"
    """Successive halving: the best part goes on at each rung."""
    hyperband = "hyperband"
    """Several successive halvings, more and less patient."""


@dataclass
class SweepConfig:
    """A sweep: its cells, what ranks them, what happens when one fails. Launchers are chosen by `hydra/launcher=…`."""

    resume: str | None = None
    """Folder of a sweep to go on with: finished cells are skipped, broken ones continued from their checkpoint, the rest is run."""
    fail_fast: bool = False
    """Start no further cell once one has failed. Otherwise the others go on and the exit code tells."""
    zip: list[str] = field(default_factory=list)
    """Keys that advance together instead of being multiplied, joined by `+`, e.g. `[backbone.d_model+backbone.num_heads]`."""
    filter: list[str] = field(default_factory=list)
    """Conditions that a cell must meet to be run, e.g. `['backbone.d_model * backbone.num_layers < 4096']`."""
    metric: str = "val/loss"
    """Metric that ranks cells: its last value in the run."""
    direction: Direction = Direction.minimize
    """Which end of the metric is the good one."""
    warm: bool = True
    """Fork cells from a process that has done the imports, where that is safe (Linux, no GPU); the reason is said where it is not."""
    trials: int = 20
    """Cells that `hydra/sweeper=optuna` runs in all, those of earlier commands in the same study included."""
    batch: int = 1
    """Cells that `hydra/sweeper=optuna` proposes together; set it to the number that the launcher runs side by side."""
    sampler: Sampler = Sampler.tpe
    """Who proposes cells."""
    pruner: Pruner = Pruner.none
    """Who ends hopeless cells early."""
    startup_trials: int = 5
    """Cells that are finished before the sampler learns and the pruner judges."""
    seed: int = 0
    """Seed of the sampler."""
    storage: str | None = None
    """Database of the study, e.g. `postgresql://…`. None: a journal in the sweep's folder, which machines may share."""
    cell: str | None = None
    """The cell that this process runs; set by the sweep."""

    def __post_init__(self) -> None:
        for name in ("trials", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sweep.{name}={getattr(self, name)} is out of range; use 1 or more")
        for keys in self.zip:
            if "+" not in keys:
                raise ConfigError(f"sweep.zip=[{keys}] pairs nothing; join two keys or more by +, e.g. sweep.zip=[{keys}+seed]")
