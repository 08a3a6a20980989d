"""Optimizers (`optimizer=…`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry

_RATE = re.compile(r"[^:]+:(\d+\.?\d*|\.\d+)(e-?\d+)?")


@dataclass
class OptimizerConfig(Option):
    """Base of every optimizer. Weight decay acts on matrices alone: never on norms, biases, embeddings or scales."""

    group: ClassVar[str] = "optimizer"

    name: str = ""
    learning_rate: float = 1e-3
    """Peak rate; the schedule multiplies it."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, per step and unit of learning rate."""
    dynamics_rate: float = 0.1
    """Share of learning_rate for the parameters of a recurrence (state-space models: A, dt, C, D), which are never decayed."""
    max_grad_norm: float | None = 1.0
    """Clip the norm of the whole gradient to this. None: no clipping."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment (Adam)."""
    eps: float = 1e-8
    """Added to the root of the second moment (Adam)."""
    rates: list[str] = field(default_factory=list)
    """Shares of the learning rate as PATTERN:SHARE over names of parameters; the last match counts. E.g. ['backbone.embedding.*:0.1']."""
    no_decay: list[str] = field(default_factory=list)
    """Patterns of parameter names that are not decayed, beside those that never are."""

    average_decay: float | None = None
    """Decay per step of a running average of the weights, e.g. 0.999. The average is validated, evaluated, and what a checkpoint loads as;
    training goes on from the weights themselves. None: no average."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.average_decay is None or 0 < self.average_decay < 1, "average_decay", "0 < decay < 1, or null")
        self.require(0 < self.learning_rate < math.inf, "learning_rate", "more than 0")
        self.require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self.require(self.dynamics_rate > 0, "dynamics_rate", "more than 0")
        self.require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "more than 0, or null")
        self.require(
            all(_RATE.fullmatch(rate) for rate in self.rates), "rates", "a list of PATTERN:SHARE, e.g. ['backbone.embedding.*:0.1']"
        )
        self.require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers, 0 <= beta < 1")

    @property
    def shares(self) -> dict[str, float]:
        """Share of the learning rate by pattern, in order."""
        return {pattern: float(share) for pattern, _, share in (rate.rpartition(":") for rate in self.rates)}

    def build(self, kinds: dict[str, list[Any]]) -> Any:
        """The torch optimizer over parameters by kind (training.optimizers.parameter_kinds)."""
        raise NotImplementedError  # abstract


optimizers: Registry[OptimizerConfig] = Registry("optimizer", OptimizerConfig)


@optimizers.register("adamw")
@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101), PyTorch's fused version where it exists."""

    name: str = "adamw"
    learning_rate: float = 2e-3
    """Peak rate; the schedule multiplies it."""

    def build(self, kinds: dict[str, list[Any]]) -> Any:
        from heads_lightning.training.optimizers import adamw

        return adamw(self, kinds)


@optimizers.register("muon")
@dataclass
class MuonConfig(OptimizerConfig):
    """Muon (PyTorch's own) for the matrices of the blocks; AdamW for embeddings, head, norms, biases and scales."""

    name: str = "muon"
    learning_rate: float = 1e-2
    """Peak rate of both parts: Muon's updates are scaled to AdamW's size (`match_rms_adamw`)."""
    momentum: float = 0.95
    """Momentum of Muon's part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.momentum < 1, "momentum", "0 <= momentum < 1")

    def build(self, kinds: dict[str, list[Any]]) -> Any:
        from heads_lightning.training.optimizers import muon

        return muon(self, kinds)


@optimizers.register("adamw_rms")
@dataclass
class AdamWRMSConfig(OptimizerConfig):
    """AdamW whose updates have the size of the weights they change, as Adafactor's (nanoT5, arXiv 2309.02373): for T5, at rates of 1e-2."""

    name: str = "adamw_rms"
    learning_rate: float = 2e-2
    """Peak rate, of the root mean square of each weight; the schedule multiplies it."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, per step and unit of learning rate."""
    least_rms: float = 1e-3
    """Root mean square that a weight counts as having, at least: those that start at 0 could not leave it otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.least_rms > 0, "least_rms", "more than 0")

    def build(self, kinds: dict[str, list[Any]]) -> Any:
        from heads_lightning.training.optimizers import adamw_rms

        return adamw_rms(self, kinds)
