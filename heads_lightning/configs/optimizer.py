"""Optimizers (`optimizer=…`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry


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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.learning_rate > 0, "learning_rate", "more than 0")
        self.require(self.weight_decay >= 0, "weight_decay", "0 or more")
        self.require(self.dynamics_rate > 0, "dynamics_rate", "more than 0")
        self.require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "more than 0, or null")
        self.require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers, 0 <= beta < 1")

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
