"""Learning-rate schedules (`schedule=…`): a factor of the peak rate by optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry


@dataclass
class ScheduleConfig(Option):
    """Base of every schedule."""

    group: ClassVar[str] = "schedule"

    name: str = ""
    warmup_fraction: float = 0.02
    """Share of the run's steps over which the rate rises linearly from 0."""
    warmup_steps: int | None = None
    """The same in optimizer steps, in place of warmup_fraction."""
    warmup_tokens: int | None = None
    """The same in positions (global batch size times sequence length a step), in place of warmup_fraction; the rate rises by the same
    amount each step all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.warmup_fraction <= 1, "warmup_fraction", "0 to 1")
        self.require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more, or null")
        self.require(self.warmup_tokens is None or self.warmup_tokens >= 0, "warmup_tokens", "0 or more, or null")
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_tokens={self.warmup_tokens} say the same thing twice; "
                f"use schedule.warmup_tokens=null or schedule.warmup_steps=null"
            )

    def in_steps(self, steps_of: Callable[[int], int]) -> Self:
        """The same schedule with its warm-up in steps; `steps_of` says how many read a number of positions."""
        if self.warmup_tokens is None:
            return self
        return replace(self, warmup_steps=steps_of(self.warmup_tokens), warmup_tokens=None)

    def warmup(self, total_steps: int) -> float:
        """Steps of the warm-up of a run (after in_steps)."""
        return self.warmup_fraction * total_steps if self.warmup_steps is None else min(self.warmup_steps, total_steps)

    def factor(self, step: int, total_steps: int) -> float:
        """Factor of the peak rate for the update number `step` (0 is the first) of `total_steps`."""
        warmup = self.warmup(total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        since = step - warmup
        return self.after_warmup(since / max(total_steps - warmup, 1), steps=1 + since / max(warmup, 1))

    def after_warmup(self, progress: float, *, steps: float) -> float:
        """Factor at `progress` (0 to 1) of the part after the warm-up; `steps` of the run so far, in lengths of the warm-up."""
        raise NotImplementedError  # abstract


schedules: Registry[ScheduleConfig] = Registry("schedule", ScheduleConfig)


@schedules.register("constant")
@dataclass
class ConstantConfig(ScheduleConfig):
    """Warm-up, then the peak rate to the end."""

    name: str = "constant"

    def after_warmup(self, progress: float, *, steps: float) -> float:
        return 1.0


@schedules.register("cosine")
@dataclass
class CosineConfig(ScheduleConfig):
    """Warm-up, then half a cosine down to a fraction of the peak (arXiv 1608.03983)."""

    name: str = "cosine"
    final_fraction: float = 0.1
    """Factor at the end."""

    def after_warmup(self, progress: float, *, steps: float) -> float:
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@schedules.register("wsd")
@dataclass
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, then a linear decay (arXiv 2404.06395)."""

    name: str = "wsd"
    decay_fraction: float = 0.4
    """Share of the steps after the warm-up over which the rate falls."""
    final_fraction: float = 0.0
    """Factor at the end."""

    def after_warmup(self, progress: float, *, steps: float) -> float:
        left = min(max(1 - progress, 0.0) / max(self.decay_fraction, 1e-9), 1.0)
        return self.final_fraction + (1 - self.final_fraction) * left


@schedules.register("linear")
@dataclass
class LinearConfig(ScheduleConfig):
    """Warm-up, then a straight line down to a fraction of the peak."""

    name: str = "linear"
    final_fraction: float = 0.0
    """Factor at the end."""

    def after_warmup(self, progress: float, *, steps: float) -> float:
        return 1 + (self.final_fraction - 1) * min(progress, 1.0)


@schedules.register("inverse_square_root")
@dataclass
class InverseSquareRootConfig(ScheduleConfig):
    """Warm-up, then one over the root of the step (arXiv 1706.03762, section 5.3): it does not know the length of the run, which may be
    trained further at any time. Without a warm-up it falls from the first step on."""

    name: str = "inverse_square_root"

    def after_warmup(self, progress: float, *, steps: float) -> float:
        return min(1.0, steps**-0.5)
