"""Learning-rate schedules (`schedule=…`): a factor of the peak rate by optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry


@dataclass
class ScheduleConfig(Option):
    """Base of every schedule."""

    group: ClassVar[str] = "schedule"

    name: str = ""
    warmup_fraction: float = 0.02
    """Share of the run's steps over which the rate rises linearly from 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.warmup_fraction <= 1, "warmup_fraction", "0 to 1")

    def factor(self, step: int, total_steps: int) -> float:
        """Factor of the peak rate for the update number `step` (0 is the first) of `total_steps`."""
        warmup = self.warmup_fraction * total_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after_warmup((step - warmup) / max(total_steps - warmup, 1))

    def after_warmup(self, progress: float) -> float:
        """Factor at `progress` (0 to 1) of the part after the warm-up."""
        raise NotImplementedError  # abstract


schedules: Registry[ScheduleConfig] = Registry("schedule", ScheduleConfig)


@schedules.register("constant")
@dataclass
class ConstantConfig(ScheduleConfig):
    """Warm-up, then the peak rate to the end."""

    name: str = "constant"

    def after_warmup(self, progress: float) -> float:
        return 1.0


@schedules.register("cosine")
@dataclass
class CosineConfig(ScheduleConfig):
    """Warm-up, then half a cosine down to a fraction of the peak (arXiv 1608.03983)."""

    name: str = "cosine"
    final_fraction: float = 0.1
    """Factor at the end."""

    def after_warmup(self, progress: float) -> float:
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

    def after_warmup(self, progress: float) -> float:
        left = min(max(1 - progress, 0.0) / max(self.decay_fraction, 1e-9), 1.0)
        return self.final_fraction + (1 - self.final_fraction) * left
