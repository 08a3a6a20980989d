"""`default`: plain PyTorch. All logits are in memory, several times over; every gradient, double backward included, is autograd's.

The yardstick that the other implementations are tested against, and the one to choose when the logits are wanted anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection, loss_dtype, mask_ignored, project

FEATURES = frozenset(Feature)


def unavailable() -> str | None:
    """None: it runs everywhere."""
    return None


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    known_N = None if options.all_targets else labels_N != options.ignore_index
    hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
    if projection.is_sharded:
        from heads_lightning.losses.vocab_parallel import default_sharded, local_projection

        projection = local_projection(projection)
        if projection.shard is not None:
            return default_sharded(hidden_ND, projection, labels_N, options, weights_N, known_N)
    return logits_loss_sum(project(hidden_ND, projection), labels_N, options, weights_N, known_N)


def logits_loss_sum(
    logits_NV: Tensor, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None, counted_N: Tensor | None = None
) -> LossSum:
    """The loss of logits that exist already. Every label is in range; rows that do not count have weight 0 and counted_N false."""
    logits_NV = logits_NV.to(loss_dtype(logits_NV.dtype))
    class_weights_V = None if options.class_weights_V is None else options.class_weights_V.to(logits_NV.dtype)
    cross_entropy_N = F.cross_entropy(
        logits_NV, labels_N, weight=class_weights_V, reduction="none", label_smoothing=options.label_smoothing, ignore_index=-1
    )
    z_loss_N = None
    if options.z_loss_multiplier:
        z_loss_N = options.z_loss_multiplier * torch.logsumexp(logits_NV, 1).square()
        if class_weights_V is not None:
            z_loss_N = z_loss_N * class_weights_V[labels_N]
    if weights_N is not None:
        weights_N = weights_N.to(logits_NV.dtype)
        cross_entropy_N = cross_entropy_N * weights_N
        z_loss_N = None if z_loss_N is None else z_loss_N * weights_N
    correct_N, entropy_N = _token_metrics(logits_NV, labels_N, counted_N) if options.token_metrics else (None, None)

    def finish(values_N: Tensor) -> Tensor:
        return values_N if options.per_token else values_N.sum()

    total_N = cross_entropy_N if z_loss_N is None else cross_entropy_N + z_loss_N
    return LossSum(
        total=finish(total_N),
        cross_entropy=finish(cross_entropy_N.detach()),
        z_loss=None if z_loss_N is None else finish(z_loss_N.detach()),
        correct=None if correct_N is None else finish(correct_N),
        entropy=None if entropy_N is None else finish(entropy_N),
    )


@torch.no_grad()
def _token_metrics(logits_NV: Tensor, labels_N: Tensor, counted_N: Tensor | None) -> tuple[Tensor, Tensor]:
    target_N = logits_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
    correct_N = (target_N >= logits_NV.amax(1)).to(logits_NV.dtype)
    entropy_N = torch.special.entr(torch.softmax(logits_NV, 1)).sum(1)
    if counted_N is not None:
        correct_N, entropy_N = correct_N * counted_N, entropy_N * counted_N
    return correct_N, entropy_N
