"""The one interface of every loss implementation: hidden states and a projection, as data, to a summed loss.

A head never computes a loss itself and a loss never sees a head, so heads × losses costs N + M. Sums and counts are returned; whoever
calls divides, once, by the number of targets of the whole optimizer step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from heads_lightning.batch import IGNORE


class Projection(NamedTuple):
    """logits_NV = softcap(hidden_ND @ weight_VD.T + bias_V)."""

    weight_VD: Tensor
    """[V, D], any floating type."""
    bias_V: Tensor | None = None
    """[V]."""
    softcap: float | None = None
    """Bound c of the logits, c·tanh(z / c). None: none."""
    num_classes: int | None = None
    """Rows of the weight that are real; the rest is padding that is never predicted. None: all."""


class LossOptions(NamedTuple):
    """What is computed, the same for every implementation."""

    ignore_index: int = IGNORE
    """Label of rows that do not count."""
    z_loss_multiplier: float = 0.0
    """m of m·logsumexp(z)²; 0 is off."""
    label_smoothing: float = 0.0
    """ε of (1 − ε)·one-hot + ε/V."""
    class_weights_V: Tensor | None = None
    """fp32 [V]: weight of each class, as in torch's cross_entropy."""
    per_token: bool = False
    """Return losses [N] instead of their sum."""
    token_metrics: bool = False
    """Also return correct and entropy (no gradient), without keeping logits."""


class LossSum(NamedTuple):
    """A loss before any division. Sums are fp32 scalars, or [N] with per_token; rows that are ignored give exactly 0."""

    total: Tensor
    """Cross-entropy plus z-loss, in nats; carries the gradient."""
    cross_entropy: Tensor
    """Its cross-entropy part, detached."""
    z_loss: Tensor | None
    """Its z part, multiplier included, detached. None when off."""
    correct: Tensor | None = None
    """Rows whose most likely class is the label (count, fp32), with token_metrics."""
    entropy: Tensor | None = None
    """Summed entropy of the predicted distribution in nats, with token_metrics."""


class LossImplementation(Protocol):
    """`linear_cross_entropy_sum` of a module of this folder; the module is named like the option."""

    def __call__(
        self,
        hidden_ND: Tensor,
        projection: Projection,
        labels_N: Tensor,
        options: LossOptions,
        weights_N: Tensor | None = None,
    ) -> LossSum:
        """Args: hidden_ND [N, D], any floating type; labels_N int64 [N]; weights_N fp32 [N], each row's weight. Loss maths is fp32."""
        ...
