"""The one interface of every loss implementation: hidden states and a projection, as data, to a summed loss.

A head never computes a loss itself and a loss never sees a head, so heads × losses costs N + M. Sums and counts are returned; whoever
calls divides, once, by the number of targets of the whole optimizer step.

Row i with label y, logits z, class weights c (1 when absent) and smoothing ε has

    cross-entropy   (1 − ε)·c_y·(lse − z_y)  +  ε/V·Σ_v c_v·(lse − z_v)         as in torch.nn.functional.cross_entropy
    z-loss          m·c_y·lse²                                                  lse = logsumexp(z)

both multiplied by the row's own weight. The maths is fp32 (fp64 for fp64 inputs), whatever the types of the operands.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from heads_lightning.batch import IGNORE

log = logging.getLogger(__name__)


class VocabShard(NamedTuple):
    """The rows of a projection that this rank holds, of a vocabulary that a process group shares (losses/vocab_parallel.py)."""

    group: dist.ProcessGroup
    start: int
    """First row."""
    rows: int
    """Rows held: they may differ from rank to rank."""
    total: int
    """Rows of all ranks."""


class Projection(NamedTuple):
    """logits_NV = softcap(hidden_ND @ weight_VD.T + bias_V)."""

    weight_VD: Tensor
    """[V, D], any floating type."""
    bias_V: Tensor | None = None
    """[V]."""
    softcap: float | None = None
    """Bound c of the logits, c·tanh(z / c). None: none."""
    num_classes: int | None = None
    """Rows of the weight, of all ranks where it is sharded, that are real; the rest is padding that is never predicted. None: all."""
    shard: VocabShard | None = None
    """With it, the weight and bias are this rank's rows. (A DTensor needs none: its placement says it.)"""

    @property
    def classes(self) -> int:
        """Classes that can be predicted."""
        if self.num_classes is not None:
            return self.num_classes
        return self.weight_VD.shape[0] if self.shard is None else self.shard.total

    @property
    def is_sharded(self) -> bool:
        """The weight is one rank's share."""
        return self.shard is not None or is_dtensor(self.weight_VD)

    @property
    def own_classes(self) -> int:
        """Rows of the weight at hand that are no padding."""
        return self.classes if self.shard is None else max(0, min(self.shard.rows, self.classes - self.shard.start))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a device mesh. Its class is not imported to ask: that takes a second."""
    return hasattr(tensor, "placements")


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
    all_targets: bool = False
    """The caller has dropped the ignored rows: no label is ignore_index."""
    expected_grad: float = 1.0
    """Gradient that `total` is expected to receive (1 ÷ whatever it will be divided by). A hint: it saves a pass over the gradients of
    implementations that form them in the forward pass, and changes no result."""


class LossSum(NamedTuple):
    """A loss before any division. Sums are fp32 scalars, or [N] with per_token; rows that are ignored give exactly 0."""

    total: Tensor
    """Cross-entropy plus z-loss, in nats; carries the gradient."""
    cross_entropy: Tensor
    """Its cross-entropy part, detached."""
    z_loss: Tensor | None
    """Its z part, multiplier included, detached. None when off."""
    correct: Tensor | None = None
    """Rows in which no class is more likely than the label (count, fp32, unweighted), with token_metrics."""
    entropy: Tensor | None = None
    """Summed entropy of the predicted distribution in nats, unweighted, with token_metrics."""


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
        """Args: hidden_ND [N, D], any floating type; labels_N int64 [N], in range; weights_N fp32 [N], each row's weight."""
        ...


class Feature(StrEnum):
    """What a call can ask of an implementation beyond plain cross-entropy; each declares what it does natively."""

    bias = "bias"
    softcap = "softcap"
    padded_vocabulary = "padded_vocabulary"
    z_loss = "z_loss"
    label_smoothing = "label_smoothing"
    class_weights = "class_weights"
    token_weights = "token_weights"
    per_token = "per_token"
    token_metrics = "token_metrics"
    float32 = "float32"
    float64 = "float64"
    frozen_hidden = "frozen_hidden"
    vocab_parallel = "vocab_parallel"


def features_of(hidden_ND: Tensor, projection: Projection, options: LossOptions, weights_N: Tensor | None) -> frozenset[Feature]:
    """The features that a call needs."""
    trains_weight_alone = torch.is_grad_enabled() and not hidden_ND.requires_grad and projection.weight_VD.requires_grad
    rows = projection.weight_VD.shape[0] if projection.shard is None else projection.shard.total
    needed = {
        Feature.bias: projection.bias_V is not None,
        Feature.softcap: projection.softcap is not None,
        Feature.padded_vocabulary: projection.classes != rows,
        Feature.z_loss: options.z_loss_multiplier != 0,
        Feature.label_smoothing: options.label_smoothing != 0,
        Feature.class_weights: options.class_weights_V is not None,
        Feature.token_weights: weights_N is not None,
        Feature.per_token: options.per_token,
        Feature.token_metrics: options.token_metrics,
        Feature.float32: matmul_dtype(hidden_ND, projection.weight_VD) == torch.float32,
        Feature.float64: hidden_ND.dtype == torch.float64,
        Feature.frozen_hidden: trains_weight_alone,
        Feature.vocab_parallel: projection.is_sharded,
    }
    return frozenset(feature for feature, is_needed in needed.items() if is_needed)


@cache
def report_fallback(chosen: str, missing: frozenset[Feature]) -> None:
    """Say once per combination that `chunked` computes what `chosen` cannot."""
    names = ", ".join(sorted(missing))
    log.warning("head.loss_implementation=%s does not do %s; head.loss_implementation=chunked computes this loss", chosen, names)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the loss maths for operands of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Type in which hidden @ weight.T runs: autocast's when it is on, else the wider of the two."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def project(hidden: Tensor, projection: Projection) -> Tensor:
    """Logits [..., num_classes] of hidden [..., D] in the type of the matrix product; the soft cap is taken in fp32."""
    dtype = matmul_dtype(hidden, projection.weight_VD)
    weight_VD, bias_V = projection.weight_VD, projection.bias_V
    if is_dtensor(weight_VD):  # logits stay where their weights are: a DTensor of the global shape
        from torch.distributed.tensor import DTensor, Replicate

        assert isinstance(weight_VD, DTensor)
        hidden = DTensor.from_local(hidden, weight_VD.device_mesh, [Replicate()], run_check=False)
    if projection.classes != weight_VD.shape[0]:
        weight_VD = weight_VD[: projection.classes]
        bias_V = None if bias_V is None else bias_V[: projection.classes]
    logits = F.linear(hidden.to(dtype), weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
    if projection.softcap is None:
        return logits
    capped = torch.tanh(logits.to(loss_dtype(dtype)) / projection.softcap) * projection.softcap
    return capped.to(dtype)


def mask_ignored(
    hidden_ND: Tensor, labels_N: Tensor, weights_N: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows without a target become (hidden 0, label 0, weight 0): what stood there, inf and NaN included, cannot reach the loss."""
    if options.all_targets:
        return hidden_ND, labels_N, weights_N
    valid_N = labels_N != options.ignore_index
    if not torch.compiler.is_compiling() and labels_N.device.type == "cpu" and bool(valid_N.all()):
        return hidden_ND, labels_N, weights_N
    hidden_ND = torch.where(valid_N.unsqueeze(1), hidden_ND, hidden_ND.new_zeros(()))
    ones = valid_N.to(loss_dtype(hidden_ND.dtype))
    weights_N = ones if weights_N is None else torch.where(valid_N, weights_N, ones.new_zeros(()))
    return hidden_ND, torch.where(valid_N, labels_N, 0), weights_N
