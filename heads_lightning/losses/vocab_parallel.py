"""Vocabulary-parallel losses: every rank of a group holds some rows of the projection and the same hidden states and labels.

Each rank normalises its own logits; one small all-gather per chunk (five numbers a row) gives the normaliser of the whole vocabulary; the
gradient of the hidden states is summed over the ranks once. Shards may be uneven or empty. Every rank returns the same loss: the whole
group's, to be counted once.

A weight that is a DTensor with Shard(0) on a one-dimensional mesh is a shard; so is a plain tensor with a `VocabShard` (`vocab_shard`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from heads_lightning.losses import kept
from heads_lightning.losses.base import LossOptions, LossSum, Projection, VocabShard, loss_dtype, project
from heads_lightning.losses.chunked_kernels import (
    CACHED_BYTES,
    Gradients,
    RowStats,
    RowTerms,
    Spec,
    WeightGradient,
    empty_stats,
)


@cache
def _shard_sizes(group: dist.ProcessGroup, rows: int) -> tuple[int, ...]:
    """Rows of every rank; asked once for each shape."""
    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, rows, group=group)
    return tuple(sizes)


def vocab_shard(weight_VD: Tensor, group: dist.ProcessGroup, *, vocab_size: int) -> VocabShard:
    """Which rows of the vocabulary this rank's weight is. Collective: every rank of the group calls it.

    Raises:
        ValueError: the ranks' rows together are not the vocabulary. The usual cause is a weight that was gathered and is whole on every
            rank: each row would count once per rank, and the loss would be off by the logarithm of their number.
    """
    sizes = _shard_sizes(group, weight_VD.shape[0])
    if sum(sizes) < vocab_size or (len(sizes) > 1 and all(size >= vocab_size for size in sizes)):
        raise ValueError(
            f"the weights of the {len(sizes)} ranks have {' + '.join(map(str, sizes))} rows, which are not the shards of a vocabulary of "
            f"{vocab_size}; pass the sharded weight (a gathered one adds log {len(sizes)} to the loss), or no shard at all"
        )
    rank = dist.get_rank(group)
    return VocabShard(group, sum(sizes[:rank]), sizes[rank], sum(sizes))


def local_projection(projection: Projection) -> Projection:
    """The projection with plain tensors, and the shard that a DTensor's placement describes."""
    weight_VD = projection.weight_VD
    if not isinstance(weight_VD, DTensor):
        return projection
    mesh, placements = weight_VD.device_mesh, weight_VD.placements
    if len(placements) != 1 or not isinstance(placements[0], (Shard, Replicate)):
        raise ValueError(f"a projection is sharded over its rows, Shard(0) on a one-dimensional mesh, and not {placements} on {mesh}")
    bias_V = projection.bias_V
    if isinstance(placements[0], Replicate):
        return projection._replace(weight_VD=weight_VD.to_local(), bias_V=bias_V.to_local() if isinstance(bias_V, DTensor) else bias_V)
    if placements[0] != Shard(0) or (bias_V is not None and not (isinstance(bias_V, DTensor) and bias_V.placements == placements)):
        raise ValueError(f"a projection is sharded over its rows, weight and bias alike, as Shard(0); the weight is {placements}")
    total, ranks, rank = weight_VD.shape[0], mesh.size(), mesh.get_local_rank()
    size = -(-total // ranks)  # torch.chunk's rule: equal pieces, the last ones smaller or empty
    start = min(total, size * rank)
    shard = VocabShard(mesh.get_group(), start, min(total, start + size) - start, total)
    classes = projection.classes
    local_bias_V = bias_V.to_local() if isinstance(bias_V, DTensor) else None
    return Projection(weight_VD.to_local(), local_bias_V, projection.softcap, classes, shard)


# --- chunked --------------------------------------------------------------------------------------------------------------------


def sharded(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec
) -> tuple[RowStats, Gradients]:
    """The kernel of `chunked` for one shard; see chunked_kernels.dense. Logits are read twice: for the normaliser and for the gradient."""
    assert spec.shard is not None
    rows, columns = hidden_ND.shape[0], spec.classes
    acc = terms.weight_N.dtype
    stats = empty_stats(rows, acc, hidden_ND.device, terms, spec)
    dx_ND = torch.zeros_like(hidden_ND) if spec.need_dx else None
    weight_grad = WeightGradient(rows, hidden_ND.shape[1], spec, acc, hidden_ND.device)
    db_V = torch.zeros(columns, dtype=acc, device=hidden_ND.device) if spec.need_db else None
    with kept.room([((min(spec.rows, rows), columns), spec.dtype)], hidden_ND.device) as (logits_CV,):
        for start in range(0, rows, spec.rows):
            stop = min(start + spec.rows, rows)
            x_CD, chunk_CV = hidden_ND[start:stop], logits_CV[: stop - start]
            own = OwnLabels(labels_N[start:stop], spec.shard, columns)
            if columns:
                torch.mm(x_CD, weight_VD.t(), out=chunk_CV)
            lse_C = _read_chunk(chunk_CV, bias_V, own, terms.rows(start, stop), spec, stats, start, stop)
            if not spec.need_grad or not columns:
                continue
            _chunk_to_gradient(chunk_CV, bias_V, own, terms.rows(start, stop), spec, lse_C)
            if dx_ND is not None:
                torch.mm(chunk_CV, weight_VD, out=dx_ND[start:stop])
            weight_grad.add(chunk_CV, x_CD)
            if db_V is not None:
                db_V.add_(chunk_CV.sum(0, dtype=acc))
    if dx_ND is not None:
        dist.all_reduce(dx_ND, group=spec.shard.group)
    return stats, Gradients(dx_ND, weight_grad.result(), db_V)


class OwnLabels:
    """Which labels of some rows lie in the own shard, and where."""

    def __init__(self, labels: Tensor, shard: VocabShard, classes: int) -> None:
        local = labels - shard.start
        self.inside = (local >= 0) & (local < classes)
        self.index = torch.where(self.inside, local, 0).unsqueeze(1)

    def of(self, values: Tensor) -> Tensor:
        """values[i, label i], 0 where the label is another rank's."""
        if values.shape[1] == 0:
            return values.new_zeros(values.shape[0])
        return torch.where(self.inside, values.gather(1, self.index).squeeze(1), values.new_zeros(()))

    def rows(self, start: int, stop: int) -> OwnLabels:
        """The same of a few rows."""
        part = OwnLabels.__new__(OwnLabels)
        part.inside, part.index = self.inside[start:stop], self.index[start:stop]
        return part


def _pieces(rows: int, columns: int, itemsize: int) -> list[tuple[int, int]]:
    """Ranges of rows that stay in cache."""
    step = max(1, CACHED_BYTES // max(1, columns * itemsize))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _logits(piece: Tensor, bias_V: Tensor | None, softcap: float | None, acc: torch.dtype) -> Tensor:
    values = piece.to(acc, copy=True)
    if bias_V is not None:
        values.add_(bias_V)
    return values if softcap is None else values.div_(softcap).tanh_().mul_(softcap)


def _read_chunk(
    chunk_CV: Tensor, bias_V: Tensor | None, own: OwnLabels, terms: RowTerms, spec: Spec, stats: RowStats, start: int, stop: int
) -> Tensor:
    """The chunk's losses in `stats`; returns the normaliser of the whole vocabulary."""
    acc = terms.weight_N.dtype
    local = torch.empty(5, stop - start, dtype=acc, device=chunk_CV.device)
    for first, last in _pieces(stop - start, chunk_CV.shape[1], acc.itemsize):
        values = _logits(chunk_CV[first:last], bias_V, spec.softcap, acc)
        local[:, first:last] = local_statistics(values, own.rows(first, last), terms.classes_V, entropy=spec.token_metrics)
    assert spec.shard is not None
    lse, target, top, logit_sum, mean_logit = combine(_all_gather(local, spec.shard.group))
    cross_entropy = terms.hot_N * (lse - target)
    if terms.spread:
        cross_entropy += terms.spread * (terms.total * lse - logit_sum)
    stats.cross_entropy_N[start:stop], stats.lse_N[start:stop] = cross_entropy, lse
    if stats.correct_N is not None and stats.entropy_N is not None:
        stats.correct_N[start:stop] = (target >= top).to(acc)
        stats.entropy_N[start:stop] = lse - mean_logit
    return lse


def _chunk_to_gradient(chunk_CV: Tensor, bias_V: Tensor | None, own: OwnLabels, terms: RowTerms, spec: Spec, lse_C: Tensor) -> None:
    """Logits of a chunk into the gradient of the loss, in place."""
    acc = terms.weight_N.dtype
    for first, last in _pieces(chunk_CV.shape[0], chunk_CV.shape[1], acc.itemsize):
        values = _logits(chunk_CV[first:last], bias_V, spec.softcap, acc)
        slope = None if spec.softcap is None else 1 - (values / spec.softcap).square()
        part, mine = terms.rows(first, last), own.rows(first, last)
        lse = lse_C[first:last]
        values.sub_(lse.unsqueeze(1)).exp_().mul_(part.softmax_factor(lse, spec.z_loss_multiplier).unsqueeze(1))
        hot = torch.where(mine.inside, part.weight_N * part.hot_N, values.new_zeros(()))
        values.scatter_add_(1, mine.index, -hot.unsqueeze(1))
        if terms.spread:
            spread = (part.weight_N * part.spread).unsqueeze(1)
            values.sub_(spread if part.classes_V is None else spread * part.classes_V)
        chunk_CV[first:last] = values if slope is None else values.mul_(slope)


def local_statistics(values: Tensor, own: OwnLabels, classes_V: Tensor | None, *, entropy: bool) -> Tensor:
    """[5, rows]: log-normaliser, logit of the label, largest logit, (weighted) sum of the logits, their mean under the soft-max."""
    rows, columns = values.shape
    if columns == 0:  # an empty shard: no probability
        nothing = values.new_full((rows,), float("-inf"))
        zero = values.new_zeros(rows)
        return torch.stack((nothing, zero, nothing, zero, zero))
    lse, top = torch.logsumexp(values, 1), values.amax(1)
    logit_sum = values.sum(1) if classes_V is None else values @ classes_V
    mean = (torch.softmax(values, 1) * values).sum(1) if entropy else torch.zeros_like(lse)
    return torch.stack((lse, own.of(values), top, logit_sum, mean))


def combine(ranks_R5N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of the whole vocabulary from those of its shards."""
    lse_RN, target_RN, top_RN, sum_RN, mean_RN = ranks_R5N.unbind(1)
    lse_N = torch.logsumexp(lse_RN, 0)
    return lse_N, target_RN.sum(0), top_RN.amax(0), sum_RN.sum(0), ((lse_RN - lse_N).exp() * mean_RN).sum(0)


def _all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = local.new_empty(dist.get_world_size(group), *local.shape)
    # all_gather_into_tensor until PyTorch 2.12
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(ranks.view(-1), local.contiguous().view(-1), group=group)
    return ranks


# --- default --------------------------------------------------------------------------------------------------------------------


def default_sharded(
    hidden_ND: Tensor,
    projection: Projection,
    labels_N: Tensor,
    options: LossOptions,
    weights_N: Tensor | None,
    counted_N: Tensor | None,
) -> LossSum:
    """`default` for one shard: the own logits in memory, gradients by autograd. See losses/base.py for the formula."""
    shard, columns = projection.shard, projection.own_classes
    assert shard is not None
    hidden_ND = _SumGradients.apply(hidden_ND, shard.group)
    logits_NV = project(hidden_ND, projection._replace(num_classes=columns, shard=None))
    return logits_loss_sharded(logits_NV, projection, labels_N, options, weights_N, counted_N)


def logits_loss_sharded(
    logits_NV: Tensor,
    projection: Projection,
    labels_N: Tensor,
    options: LossOptions,
    weights_N: Tensor | None,
    counted_N: Tensor | None,
) -> LossSum:
    """The loss of this rank's columns of the logits. Of `projection` only the shard and the number of classes count."""
    shard, columns = projection.shard, projection.own_classes
    assert shard is not None
    logits_NV = logits_NV.to(loss_dtype(logits_NV.dtype))
    own = OwnLabels(labels_N, shard, columns)
    c_V = None if options.class_weights_V is None else options.class_weights_V.to(logits_NV.dtype)
    own_c_V = None if c_V is None else c_V[shard.start : shard.start + columns]
    local = local_statistics(logits_NV, own, own_c_V, entropy=options.token_metrics)
    if columns == 0:
        local = local + logits_NV.sum()  # an exact 0 that keeps an empty shard in the graph: its rank takes part in the backward pass
    lse_N, target_N, top_N, sum_N, mean_N = _Combined.apply(local, shard.group)
    keep, spread = 1 - options.label_smoothing, options.label_smoothing / projection.classes
    of_label_N = 1.0 if c_V is None else c_V[labels_N]
    total_weight = projection.classes if c_V is None else c_V.sum()
    cross_entropy_N = keep * of_label_N * (lse_N - target_N)
    if spread:
        cross_entropy_N = cross_entropy_N + spread * (total_weight * lse_N - sum_N)
    z_loss_N = options.z_loss_multiplier * of_label_N * lse_N.square() if options.z_loss_multiplier else None
    parts = [cross_entropy_N, z_loss_N]
    if weights_N is not None:
        parts = [None if part is None else part * weights_N for part in parts]
    metrics: list[Tensor | None] = [None, None]
    if options.token_metrics:
        found = ((target_N >= top_N).to(lse_N.dtype).detach(), (lse_N - mean_N).detach())
        metrics = [value if counted_N is None else value * counted_N for value in found]
    total_N = parts[0] if parts[1] is None else parts[0] + parts[1]  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    detached = (None if part is None else part.detach() for part in parts)
    fields = (total_N, *detached, *metrics)
    return LossSum(*(v if v is None or options.per_token else v.sum() for v in fields))  # pyright: ignore[reportArgumentType]


class _SumGradients(torch.autograd.Function):
    """Hidden states that every rank has; their gradient is the sum of what the ranks' shards contribute."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Combined(torch.autograd.Function):
    """`combine` over the ranks. Every rank computes the same loss from it, so the gradient of the own statistics is local."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
        results = combine(_all_gather(local, group))
        ctx.save_for_backward((local[0] - results[0]).exp())
        ctx.mark_non_differentiable(results[2], results[4])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        lse, target, _, logit_sum, _ = grads
        zero = torch.zeros_like(lse)
        return torch.stack((lse * share, target, zero, logit_sum, zero)), None
