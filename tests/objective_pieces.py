"""What the tests of objectives share."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from objective_data import windows

from heads_lightning.configs.objective import (
    FIMConfig,
    FIMCut,
    FIMLevel,
    FIMLoss,
    MixtureConfig,
    MLMConfig,
    MLMCount,
    MLMUnit,
    ObjectiveConfig,
    SPMLayout,
    objectives,
)
from heads_lightning.objectives.base import SampleRandom

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
EOD, PAD, MASK, PRE, SUF, MID, END = range(7)

VARIANTS = [config() for _, config in objectives.items()] + [
    FIMConfig(rate=1.0, spm=SPMLayout.variant1),
    FIMConfig(rate=1.0, cut=FIMCut.token, loss_on=FIMLoss.middle),
    FIMConfig(level=FIMLevel.document),
    MLMConfig(unit=MLMUnit.word),
    MLMConfig(rate=0.4, mask_share=0.5, random_share=0.5),
    MLMConfig(unit=MLMUnit.span),
    MLMConfig(count=MLMCount.exact),
    FIMConfig(rate=1.0, cut=FIMCut.syntax),
    FIMConfig(rate=1.0, spm=SPMLayout.suffix_first),
    MixtureConfig(parts={"a": {"name": "causal", "mode": True}, "b": {"name": "fim", "rate": 1.0, "mode": True}}),
]


def name_of(config: ObjectiveConfig) -> str:
    changed = {k: v for k, v in vars(config).items() if v != getattr(type(config)(), k)}
    return " ".join([config.name, *(f"{k}={v}" for k, v in changed.items())])


def make(objective, length, indices, seed=0, epoch=0, source=None):
    indices = np.asarray(indices)
    return objective.examples(windows(objective, length, indices, source), SampleRandom(seed, epoch, indices), length)


def row(examples, b):
    return [None if x is None else x[b] for x in examples]


def equal(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))
