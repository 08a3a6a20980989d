"""LanguageModule: a backbone and a head, trained by optimizer steps.

One Lightning "batch" is one whole optimizer step: the list of this rank's micro-batches. That keeps three things exact. The loss is
divided once, by the number of targets of the step over all micro-batches and ranks, so how a global batch is cut changes nothing but
rounding. Lightning's counters count optimizer steps, so resuming needs no arithmetic. And the learning rate is a pure function of the
step, so there is no schedule state to restore.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from heads_lightning.backbones.base import Backbone
from heads_lightning.batch import Batch
from heads_lightning.configs.optimizer import OptimizerConfig
from heads_lightning.configs.schedule import ScheduleConfig
from heads_lightning.heads.base import Head, HeadLoss
from heads_lightning.precision import widest_float
from heads_lightning.registry import RunError
from heads_lightning.totals import Totals
from heads_lightning.training.optimizers import build_optimizer

if TYPE_CHECKING:
    from heads_lightning.training.parallel import ShardedStrategy


class TrainingStopped(RunError):
    """Training cannot go on; the message says why and what the last batch held."""


class LanguageModule(lightning.LightningModule):
    """Backbone plus head as a Lightning module.

    Args:
        backbone: tokens to hidden states.
        head: hidden states to a loss.
        optimizer: how weights are updated.
        schedule: factor of the learning rate by step.
        total_steps: optimizer steps of the whole run.
        parts: names of the objective's loss components, each reported on its own: of validation, and of the training steps that are
            logged.
        max_bad_steps: steps in a row that may have a gradient that is not finite before the run stops.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        parts: Sequence[str] = (),
        max_bad_steps: int = 5,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = backbone
        self.head = head
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.total_steps = total_steps
        self.parts = tuple(parts)
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self.bad_steps_in_a_row = 0
        self.is_looked_at = False
        """Whether a logged point ends with the coming step, which then also measures what costs something: the loss of each part (a pass of
        the head without gradient) and the size of the update. Set by the metrics callback."""
        self.update_ratio: Tensor | None = None
        """Norm of the last measured update over that of the weights, of this rank's watched weights."""
        self.totals = Totals(len(self.parts))
        """Sums since the last logged point; the metrics callback reads and clears them."""
        self._validation = Totals()
        self.statistics: list[float] = []
        """Of the head, summed over the latest validation (HeadLoss.statistics)."""

    # -- training -----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; its groups keep their peak rate as `peak_lr`."""
        return build_optimizer(self.optimizer_config, self.backbone, self.head)

    def configure_model(self) -> None:
        """Lay the weights out as the strategy says; called by Lightning when the processes exist, before the optimizer is made."""
        if (strategy := self._sharded_strategy()) is not None:
            strategy.lay_out(self, self.backbone, self.head)

    def _sharded_strategy(self) -> ShardedStrategy | None:
        """The strategy, where it is our own. (Its class takes a second to import.)"""
        strategy = self.trainer.strategy
        return cast("ShardedStrategy", strategy) if isinstance(strategy, ModelParallelStrategy) else None

    @property
    def data_ranks(self) -> int:
        """Processes, or groups of those that compute a sequence together: shares that a global batch is cut into."""
        strategy = self._sharded_strategy()
        return self.trainer.world_size if strategy is None else strategy.config.data_ranks

    def sum_over_data_ranks(self, values: list[float]) -> list[float]:
        """Sums over all sequences of what each data rank has of its own."""
        if self.data_ranks == 1:
            return values
        total = torch.tensor(values, device=self.device, dtype=widest_float(self.device))
        if (strategy := self._sharded_strategy()) is not None:
            strategy.sum_over_data_ranks(total)
        else:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def score(self, batch: Batch, *, divisor: float | None) -> HeadLoss:
        """The loss of a micro-batch (Head.loss): the one way in which a step reads the weights."""
        hidden_BSD = self.backbone(batch)
        if self.is_looked_at and self.parts and divisor is not None:
            with torch.no_grad():
                self.totals.add_parts(self.head.loss(hidden_BSD.detach(), batch, divisor=None), batch)
        return self.head.loss(hidden_BSD, batch, divisor=divisor)

    def training_step(self, step: list[Batch], batch_idx: int) -> None:
        """One optimizer step over this rank's micro-batches."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.schedule.factor(batch_idx, self.total_steps)
        (targets,) = self.sum_over_data_ranks([step[0].step_targets])
        # the strategy averages gradients over data ranks: hand it as many times this rank's share of the mean
        divisor = max(targets, 1) / self.data_ranks
        for i, batch in enumerate(step):
            with self._gradients_stay_local(i + 1 < len(step)):
                output = self.score(batch, divisor=divisor)
                self.manual_backward(output.loss)
            self.totals.add(output, batch)
        norm = self._clip(optimizer)
        if bad := self._is_bad(norm, step, batch_idx):
            optimizer.zero_grad(set_to_none=True)
        self.totals.finish_step(norm, counts=not bad)
        before = [weight.detach().clone() for weight in self._watched_weights()] if self.is_looked_at else []
        optimizer.step()
        if before:
            self.update_ratio = _change(before, self._watched_weights())
        optimizer.zero_grad(set_to_none=True)
        self.backbone.after_optimizer_step()
        self.head.after_optimizer_step()

    def _gradients_stay_local(self, local: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged once a step, with the last micro-batch."""
        strategy = self.trainer.strategy
        if local and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    def _watched_weights(self) -> list[Tensor]:
        """This rank's matrices of the first and the last block: copying those alone is cheap."""
        blocks = self.backbone.blocks_in_order
        return [_own(p) for block in {id(b): b for b in (*blocks[:1], *blocks[-1:])}.values() for p in block.parameters() if p.ndim > 1]

    def _clip(self, optimizer: Any) -> Tensor:
        """Norm of the whole gradient before clipping, fp32 scalar."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # each rank knows the norm of its own shards
        limit = self.optimizer_config.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), limit, norm)
        return norm.detach()

    def _is_bad(self, norm: Tensor, step: list[Batch], index: int) -> bool:
        """True when the update must be skipped. The norm is the same on every rank, so the ranks agree."""
        if bool(torch.isfinite(norm)):
            self.bad_steps_in_a_row = 0
            return False
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        if self.bad_steps_in_a_row >= self.max_bad_steps:
            raise TrainingStopped(_report(norm, step, index, self.bad_steps_in_a_row))
        return True

    # -- validation ---------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start from zero."""
        self._validation = Totals(len(self.parts), self.head.num_statistics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a micro-batch of held-out examples."""
        self._validation.add_tokens(self.score(batch, divisor=None), batch)

    def on_validation_epoch_end(self) -> None:
        """Sums of all ranks, divided once."""
        totals = self._validation.over_ranks(self.sum_over_data_ranks)
        # the mean over no targets is no number: 0 would look like a perfect model
        values = {"val/loss": totals.loss / totals.targets} if totals.targets else {}
        for i, name in enumerate(self.parts):
            if totals.part_targets[i]:
                values[f"val/loss_{name}"] = totals.part_losses[i] / totals.part_targets[i]
        self.statistics = totals.statistics
        values |= {f"val/{name}": value for name, value in self.head.metrics(totals.statistics).items()}
        # for callbacks; a logger would write them a second time, under the step before (MetricsCallback records them)
        self.log_dict(values, logger=False)


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def _change(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Norm of the change over the norm of what was changed."""
    changes = [new - old for new, old in zip(after, before, strict=True)]
    return torch.nn.utils.get_total_norm(changes) / torch.nn.utils.get_total_norm(before).clamp(min=1e-12)


def _report(norm: Tensor, step: list[Batch], index: int, times: int) -> str:
    batch = step[0]
    return (
        f"the gradient was not finite (norm {float(norm)}) in {times} steps in a row, the last one step {index + 1}: training stops. "
        f"That step: {len(step)} micro-batches, the first {tuple(batch.tokens_BS.shape)} with {batch.num_targets} targets, token ids "
        f"{int(batch.tokens_BS.min())} to {int(batch.tokens_BS.max())}, first row {batch.tokens_BS[0, :12].tolist()}… "
        f"Try optimizer.learning_rate at a third, optimizer.max_grad_norm=1.0, or trainer.precision=32-true"
    )
