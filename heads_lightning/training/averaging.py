"""A running average of the weights (`optimizer.average_decay`): what is validated, evaluated and loaded; training goes on without it.

In a checkpoint it is the entry `average`, weights by name. Shares of sharded weights are averaged where they are.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from heads_lightning.training.parallel import ShardedStrategy, like

AVERAGE = "average"
"""Entry of a checkpoint."""


class WeightAverage(Callback):
    """average ← decay · average + (1 − decay) · weight after each step, from the first weights on; validated in their place.

    Args:
        decay: of the average, per optimizer step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._saved: dict[str, Tensor] | None = None

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the average; a run that had none begins one."""
        self._saved = checkpoint.get(AVERAGE)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin with the weights, or with what was saved."""
        self._averages = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        for name, value in (self._saved or {}).items():
            self._averages[name].copy_(like(value, self._averages[name]))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the average."""
        weights = dict(pl_module.named_parameters())
        for name, average in self._averages.items():
            average.lerp_(weights[name].detach(), 1 - self.decay)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate the average."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Train the weights."""
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, module: lightning.LightningModule) -> None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # without a backward pass, weights stay gathered: those would be swapped, or used once more
        weights = dict(module.named_parameters())
        for name, average in self._averages.items():
            held = weights[name].detach().clone()
            weights[name].copy_(average)
            average.copy_(held)

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save it as the weights are saved."""
        keep = trainer.strategy.kept if isinstance(trainer.strategy, ShardedStrategy) else lambda value: value
        checkpoint[AVERAGE] = {name: keep(value) for name, value in self._averages.items()}
