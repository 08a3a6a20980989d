"""What a head is: hidden states to a score. `LMHead.forward` is final; heads over a vocabulary differ in `projection` and `prepare` alone.

The call is that of OLMo-core's LMHead, extended by keywords. Choices: labels are aligned already and never shifted here; positions without
a target are dropped before `prepare` and the projection; the loss is computed inside `forward`, where sharded strategies have gathered
the weights; a sum is divided once, by what the caller says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from heads_lightning.batch import IGNORE, Batch
from heads_lightning.heads.layers import Device, TiedLinear
from heads_lightning.heads.positions import Positions, keep_positions
from heads_lightning.losses import LossOptions, LossSum, Projection, loss_module
from heads_lightning.losses.base import project
from heads_lightning.losses.default import logits_loss_sum
from heads_lightning.losses.targets import (
    Reduction,
    Rows,
    check_reduction,
    divisor,
    expected_grad,
    reduce_loss,
    select_rows,
)

if TYPE_CHECKING:
    from heads_lightning.configs.head import LMHeadConfig, LMLossImplementation


class HeadLoss(NamedTuple):
    """What a head makes of a micro-batch: what training minimises, and what is reported."""

    loss: Tensor
    """With a divisor: the summed loss over it, a scalar that carries the gradient. Without: [B, S], each target's own loss, as validation
    sums it (cross-entropy without its z part); 0 where there is no target."""
    sums: dict[str, Tensor]
    """Detached sums by name, undivided: `loss`, and whatever else is worth a curve. Reported as train/NAME, divided by the targets."""
    statistics: Tensor | None = None
    """[num_statistics], without a divisor: sums that add up over batches and ranks; Head.metrics reads their total."""


class Head(nn.Module, ABC):
    """Interface of every head, over a vocabulary or not."""

    num_statistics: ClassVar[int] = 0
    """Numbers in HeadLoss.statistics."""

    @abstractmethod
    def loss(self, hidden_BSD: Tensor, batch: Batch, *, divisor: float | None) -> HeadLoss:
        """The loss of a micro-batch: all that training and validation ask of a head.

        Args:
            hidden_BSD: [B, S, D], from the backbone.
            batch: the targets.
            divisor: divides the sum, once: the targets of the whole optimizer step. None: losses stay apart, for validation.
        """

    def metrics(self, statistics: list[float]) -> dict[str, float]:
        """What validation reports beside the loss, from the sum of all statistics."""
        return {}

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise every own parameter and buffer in place: also after building on meta and to_empty. Tied weights are the backbone's."""

    def after_optimizer_step(self) -> None:
        """Restore what an update breaks (normalized: unit rows). Called by the trainer after each optimizer step."""


class LMOutputWithLoss(NamedTuple):
    """What a head over a vocabulary returns when it is given labels."""

    logits: Tensor | None
    """[B, K, V] over the kept positions, part of the graph; None when not asked for."""
    loss: Tensor
    """Cross-entropy plus z-loss, reduced and divided; carries the gradient. A scalar, or [B, K] for `none`."""
    ce_loss: Tensor
    """Its cross-entropy part, detached, for logging."""
    z_loss: Tensor | None
    """Its z part, multiplier included, detached. None when off."""


class LMOutputWithMetrics(NamedTuple):
    """LMOutputWithLoss with token_metrics=True: the same four fields, then sums over the targets that need no logits kept."""

    logits: Tensor | None
    loss: Tensor
    ce_loss: Tensor
    z_loss: Tensor | None
    correct: Tensor
    """Targets than which no class is more likely: divide by the number of targets for the accuracy. fp32; [B, K] for `none`."""
    entropy: Tensor
    """Entropy of the predicted distribution in nats, summed over the targets. fp32; [B, K] for `none`."""


class LMHead(Head):
    """Interface of every head over a vocabulary.

    Args:
        config: what the head is.
        d_model: width of the hidden states.
        vocab_size: classes that can be predicted.
    """

    def __init__(self, config: LMHeadConfig, *, d_model: int, vocab_size: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("vocab_size", vocab_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.config = config
        self.d_model = d_model
        self.vocab_size = vocab_size
        self.steps_ahead = 0
        """Steps that it predicts beyond the next token: see look_ahead."""
        self._linear_cross_entropy_sum = loss_module(config.loss_implementation).linear_cross_entropy_sum

    @property
    def loss_implementation(self) -> LMLossImplementation:
        """How the loss is computed."""
        return self.config.loss_implementation

    @abstractmethod
    def projection(self) -> Projection:
        """Weight [V, D], bias and soft cap, as data."""

    def prepare(self, hidden: Tensor) -> Tensor:
        """What happens to hidden states [..., D] before the projection; each position by itself."""
        return hidden

    def look_ahead(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, (1 + steps_ahead)·S, D] from which the next token and those after it are predicted, a block of S a step."""
        raise ValueError(f"head={self.config.name} predicts the next token alone")

    def tie(self, embedding: nn.Embedding) -> None:
        """Use the weight of `embedding` as the projection, also after to_empty: in heads whose `w_out` is a TiedLinear."""
        w_out = getattr(self, "w_out", None)
        if not isinstance(w_out, TiedLinear):
            raise ValueError(f"head={self.config.name} has no projection to tie")
        w_out.tie(embedding)

    @final
    def initialise(self, device: Device, embedding: nn.Embedding | None = None) -> None:
        """The end of every constructor: tie, and fill the parameters unless they are on `meta`, where to_empty comes first."""
        if embedding is not None:
            self.tie(embedding)
        if torch.device(device).type != "meta":
            self.reset_parameters()

    @abstractmethod
    def num_matmul_params(self) -> int:
        """Parameters that multiply every position, a tied projection included."""

    @final
    def loss(self, hidden_BSD: Tensor, batch: Batch, *, divisor: float | None) -> HeadLoss:
        output = self(
            hidden_BSD,
            labels=batch.labels_BS,
            weights=batch.weights_BS,
            loss_reduction="none" if divisor is None else "sum",
            loss_div_factor=divisor,
            return_logits=False,
            num_targets=batch.num_targets,
        )
        if divisor is None:
            return HeadLoss(output.ce_loss, {})
        parts = {"loss": output.ce_loss, "z_loss": output.z_loss}
        return HeadLoss(output.loss, {name: part * divisor for name, part in parts.items() if part is not None})

    @final
    def num_flops_per_token(self, seq_len: int = 0, *, target_share: float = 1.0) -> float:
        """Floating point operations of forward and backward per position: 6 per parameter that is multiplied, at positions with a target.

        Args:
            seq_len: has no influence; kept for callers that treat heads and backbones alike.
            target_share: share of the positions that have a target.
        """
        return 6.0 * self.num_matmul_params() * target_share

    @final
    def forward(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        ignore_index: int = IGNORE,
        loss_reduction: Reduction = "mean",
        z_loss_multiplier: float | None = None,
        loss_div_factor: float | Tensor | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        weights: Tensor | None = None,
        class_weights: Tensor | None = None,
        num_targets: int | None = None,
        token_metrics: bool = False,
    ) -> Tensor | LMOutputWithLoss | LMOutputWithMetrics:
        """Logits without labels, losses with them.

        Args:
            x: hidden states [B, S, D].
            labels: int64 [B, S], aligned with x; a head with steps_ahead also takes [B, (1 + steps_ahead)·S], a block for each step.
            ignore_index: label of positions without a target.
            loss_reduction: `mean` over the targets, `sum`, or `none` for [B, K].
            z_loss_multiplier: m of m·logsumexp(logits)²; None for the config's, 0 for off.
            loss_div_factor: divides the losses, after the mean where there is one; 0 counts as 1, so that nothing over nothing is 0.
            return_logits: True returns logits [B, K, V]; False never forms them all; None leaves it to the implementation: `default`
                returns them, having them anyway, the others do not.
            logits_to_keep: positions that count: 0 for all, N for the last N, positions [K] or [B, K], or a mask [B, S].
            weights: fp32 [B, S], weight of each target. They do not change the divisor of a mean.
            class_weights: fp32 [V], as in torch's cross_entropy; a mean divides by their sum over the targets.
            num_targets: number of labels that are not ignore_index, when the host knows it: no waiting for the device. Not used with
                logits_to_keep, which may drop targets.
            token_metrics: return LMOutputWithMetrics, which has hits and entropy too. No logits are kept for it.

        Returns:
            Logits [B, K, V] (a mask: [kept, V]) without labels; LMOutputWithLoss or LMOutputWithMetrics with them.

        Raises:
            ValueError: labels out of range or of another shape, a reduction or a choice of positions that does not exist.
            RuntimeError: return_logits=False without labels.
            ConfigError: the loss implementation cannot run on this machine.
        """
        if self.steps_ahead and labels is not None and labels.shape[1] == (1 + self.steps_ahead) * x.shape[1]:
            x = self.look_ahead(x)
        kept = keep_positions(Positions(x, labels, weights), logits_to_keep)
        if labels is None:
            if return_logits is False:
                raise RuntimeError("return_logits=False without labels leaves nothing to return; give labels or leave return_logits out")
            return project(self.prepare(kept.hidden), self.projection())
        assert kept.labels is not None
        check_reduction(loss_reduction)
        whole = isinstance(logits_to_keep, int) and (logits_to_keep == 0 or logits_to_keep >= x.shape[1])
        rows = select_rows(kept.labels, kept.weights, self.vocab_size, ignore_index, num_targets if whole else None)
        divided_by = divisor(loss_reduction, rows, ignore_index, class_weights, loss_div_factor)
        options = LossOptions(
            ignore_index=ignore_index,
            z_loss_multiplier=self.config.z_loss_multiplier if z_loss_multiplier is None else z_loss_multiplier,
            label_smoothing=self.config.label_smoothing,
            class_weights_V=class_weights,
            per_token=loss_reduction == "none",
            token_metrics=token_metrics,
            all_targets=rows.all_targets,
            expected_grad=1.0 if loss_reduction == "none" else expected_grad(divided_by),
        )
        logits, loss = self._logits_and_loss(kept.hidden, rows, options, return_logits)
        return _output(logits, reduce_loss(loss, rows, kept.labels.shape, loss_reduction, divided_by))

    def _logits_and_loss(
        self, hidden: Tensor, rows: Rows, options: LossOptions, return_logits: bool | None
    ) -> tuple[Tensor | None, LossSum]:
        sharded = self.projection().is_sharded
        wanted = self.loss_implementation == "default" and not sharded if return_logits is None else return_logits
        if not wanted:
            return None, self._without(hidden, rows, options)
        if sharded:  # logits that are shards of the vocabulary are no basis for a loss outside its own collectives
            return project(self.prepare(hidden), self.projection()), self._without(hidden, rows, options)
        return self._with_logits(hidden, rows, options)

    def _without(self, hidden: Tensor, rows: Rows, options: LossOptions) -> LossSum:
        """The loss alone, of the rows that have a target."""
        hidden_ND = self.prepare(rows.select(hidden.reshape(-1, self.d_model)))
        return self._linear_cross_entropy_sum(hidden_ND, self.projection(), rows.labels_N, options, rows.weights_N)

    def _with_logits(self, hidden: Tensor, rows: Rows, options: LossOptions) -> tuple[Tensor, LossSum]:
        """The logits of every position, and the loss made from them: they exist anyway."""
        logits = project(self.prepare(hidden), self.projection())
        logits_NV = rows.select(logits.reshape(-1, self.vocab_size))
        labels_N, weights_N, counted_N = rows.labels_N, rows.weights_N, None
        if not rows.all_targets:
            counted_N = labels_N != options.ignore_index
            labels_N = torch.where(counted_N, labels_N, 0)
            logits_NV = torch.where(counted_N.unsqueeze(1), logits_NV, logits_NV.new_zeros(()))
            weights_N = counted_N.float() if weights_N is None else torch.where(counted_N, weights_N, 0.0)
        return logits, logits_loss_sum(logits_NV, labels_N, options, weights_N, counted_N)


def _output(logits: Tensor | None, loss: LossSum) -> LMOutputWithLoss | LMOutputWithMetrics:
    if loss.correct is None or loss.entropy is None:
        return LMOutputWithLoss(logits, loss.total, loss.cross_entropy, loss.z_loss)
    return LMOutputWithMetrics(logits, loss.total, loss.cross_entropy, loss.z_loss, loss.correct, loss.entropy)
