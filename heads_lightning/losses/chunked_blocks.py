"""The kernel of `chunked` for fp32 and fp64 on a CPU: chunks of rows, and the vocabulary in blocks that stay in cache.

Each block is normalised on its own, and what is left to make it global, exp(lse_block − lse), is a factor of the row, like 1/N, z-loss and
the weights: it multiplies the thin [rows, D] operands and never the [rows, V] one. Label smoothing is rank one. So nothing but the soft-max
passes over the logits, and every product is of dense, cache-sized operands, at which oneDNN is fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from heads_lightning.losses.chunked_kernels import Gradients, RowStats, RowTerms, Spec, empty_stats

BLOCK_COLUMNS = 2048
"""Vocabulary entries of a block."""
FOLD_SHARE = 1e-3
"""The one-hot term is folded into a block (nothing cancels) unless the block holds less than this share of the row's probability."""

Matmul = Callable[[Tensor, Tensor], Tensor]
"""a [M, K], b [N, K] → a @ b.T."""


class _Chunk(NamedTuple):
    """One chunk of rows between the two sweeps of `blocked` over the vocabulary."""

    x_CD: Tensor
    labels_C: Tensor
    terms: RowTerms
    order_C: Tensor
    """Rows sorted by label."""
    edges: list[int]
    """order_C[edges[b] : edges[b + 1]] are the rows whose label lies in block b."""


def blocked(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec, matmul: Matmul
) -> tuple[RowStats, Gradients]:
    """Loss and gradients, vocabulary in cached blocks; no soft cap. weight_VD and bias_V hold the real classes alone."""
    rows, width = hidden_ND.shape
    acc = hidden_ND.dtype
    stats = empty_stats(rows, acc, hidden_ND.device, terms, spec)
    gradients = Gradients(
        torch.empty_like(hidden_ND) if spec.need_dx else None,
        hidden_ND.new_empty(spec.classes, width) if spec.need_dw else None,
        hidden_ND.new_zeros(spec.classes) if spec.need_db else None,
    )
    smoothing = _Smoothing.of(weight_VD, bias_V, terms) if terms.spread else None
    bounds = torch.arange(0, spec.classes + BLOCK_COLUMNS, BLOCK_COLUMNS)
    for start in range(0, rows, spec.rows):
        stop = min(start + spec.rows, rows)
        labels_C = labels_N[start:stop]
        order_C = torch.argsort(labels_C)
        edges = torch.searchsorted(labels_C[order_C], bounds).tolist()
        chunk = _Chunk(hidden_ND[start:stop], labels_C, terms.rows(start, stop), order_C, edges)
        blocks, lse_CB = _normalise_blocks(chunk, weight_VD, bias_V, smoothing, spec, stats, start, stop, matmul)
        if spec.need_grad:
            dx_CD = None if gradients.dx_ND is None else gradients.dx_ND[start:stop]
            part = gradients._replace(dx_ND=dx_CD)
            _multiply_out(chunk, blocks, lse_CB, weight_VD, stats.lse_N[start:stop], spec, part, start == 0, matmul)
    if rows == 0 and gradients.dw_VD is not None:
        gradients.dw_VD.zero_()
    if smoothing is not None:
        smoothing.add_gradient(hidden_ND, terms, gradients)
    return stats, gradients


def _normalise_blocks(
    chunk: _Chunk,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    smoothing: _Smoothing | None,
    spec: Spec,
    stats: RowStats,
    start: int,
    stop: int,
    matmul: Matmul,
) -> tuple[list[Tensor], Tensor]:
    """The soft-max of every block by itself, and the log-normaliser of every block [B, C]."""
    blocks: list[Tensor] = []
    tops, lses, entropies = [], [], []
    target_C = chunk.x_CD.new_empty(stop - start)
    for number, column in enumerate(range(0, spec.classes, BLOCK_COLUMNS)):
        values = matmul(chunk.x_CD, weight_VD[column : column + BLOCK_COLUMNS])
        if bias_V is not None:
            values.add_(bias_V[column : column + BLOCK_COLUMNS])
        own = chunk.order_C[chunk.edges[number] : chunk.edges[number + 1]]
        target_C[own] = values[own, chunk.labels_C[own] - column]
        top = values.amax(1)
        torch._softmax(values, 1, False, out=values)
        tops.append(top)
        lses.append(top - values.amax(1).log())
        if spec.token_metrics:
            entropies.append(torch.special.entr(values).sum(1))
        if spec.need_grad:
            blocks.append(values)
    lse_BC = torch.stack(lses)
    lse_C = torch.logsumexp(lse_BC, 0)
    cross_entropy_C = chunk.terms.hot_N * (lse_C - target_C)
    if smoothing is not None:
        cross_entropy_C += chunk.terms.spread * (chunk.terms.total * lse_C - smoothing.logit_sum(chunk.x_CD))
    stats.cross_entropy_N[start:stop] = cross_entropy_C
    stats.lse_N[start:stop] = lse_C
    if stats.correct_N is not None and stats.entropy_N is not None:
        stats.correct_N[start:stop] = (target_C >= torch.stack(tops).amax(0)).to(target_C.dtype)
        mean_logit = (lse_BC - torch.stack(entropies)) * (lse_BC - lse_C).exp()  # lse − entropy is a block's mean logit
        stats.entropy_N[start:stop] = lse_C - mean_logit.sum(0)
    return blocks, lse_BC


def _multiply_out(
    chunk: _Chunk,
    blocks: list[Tensor],
    lse_BC: Tensor,
    weight_VD: Tensor,
    lse_C: Tensor,
    spec: Spec,
    gradients: Gradients,
    first: bool,
    matmul: Matmul,
) -> None:
    """Second sweep: the blocks into the gradients, each freed when done."""
    dx_CD, dw_VD, db_V = gradients
    x_CD, labels_C, terms = chunk.x_CD, chunk.labels_C, chunk.terms
    factor_BC = (lse_BC - lse_C).exp_().mul_(terms.softmax_factor(lse_C, spec.z_loss_multiplier))
    hot_C = terms.weight_N * terms.hot_N
    label_factor_C = factor_BC.gather(0, (labels_C // BLOCK_COLUMNS).unsqueeze(0)).squeeze(0)
    folds_C = label_factor_C.abs() > FOLD_SHARE * hot_C.abs()
    folded_C = torch.where(folds_C, hot_C / label_factor_C, 0.0)
    if dx_CD is not None:
        dx_CD.zero_()
    for number, column in enumerate(range(0, spec.classes, BLOCK_COLUMNS)):
        values, blocks[number] = blocks[number], weight_VD  # the list must not keep the block alive
        own = chunk.order_C[chunk.edges[number] : chunk.edges[number + 1]]
        values[own, labels_C[own] - column] -= folded_C[own]
        factor_C1 = factor_BC[number].unsqueeze(1)
        columns = slice(column, column + BLOCK_COLUMNS)
        if dx_CD is not None:
            dx_CD.addcmul_(matmul(values, weight_VD[columns].t()), factor_C1)
        if dw_VD is not None:
            add = dw_VD[columns].copy_ if first else dw_VD[columns].add_
            add(matmul(values.t(), (x_CD * factor_C1).t()))  # unnamed: freed before the next is made
        if db_V is not None:
            db_V[columns].addmv_(values.t(), factor_BC[number])
    if not bool(folds_C.all()):
        _subtract_hot(x_CD, labels_C, torch.where(folds_C, 0.0, hot_C), weight_VD, gradients)


def _subtract_hot(x_CD: Tensor, labels_C: Tensor, hot_C: Tensor, weight_VD: Tensor, gradients: Gradients) -> None:
    """The one-hot terms of rows whose label's block is too improbable to hold them."""
    own = hot_C.nonzero().squeeze(1)
    labels, hot = labels_C[own], hot_C[own].unsqueeze(1)
    if gradients.dx_ND is not None:
        gradients.dx_ND.index_add_(0, own, weight_VD[labels] * hot, alpha=-1)
    if gradients.dw_VD is not None:
        gradients.dw_VD.index_add_(0, labels, x_CD[own] * hot, alpha=-1)
    if gradients.db_V is not None:
        gradients.db_V.index_add_(0, labels, hot.squeeze(1), alpha=-1)


class _Smoothing(NamedTuple):
    """Label smoothing without a pass over the logits: Σ_v c_v·z_v = x · Σ_v c_v·W_v + Σ_v c_v·bias_v."""

    weight_sum_D: Tensor
    bias_sum: Tensor | float

    @classmethod
    def of(cls, weight_VD: Tensor, bias_V: Tensor | None, terms: RowTerms) -> _Smoothing:
        """The weighted sums over the classes."""
        if terms.classes_V is None:
            return cls(weight_VD.sum(0), 0.0 if bias_V is None else bias_V.sum())
        return cls(terms.classes_V @ weight_VD, 0.0 if bias_V is None else terms.classes_V @ bias_V)

    def logit_sum(self, x_CD: Tensor) -> Tensor:
        """Σ_v c_v·z_v of each row."""
        return x_CD @ self.weight_sum_D + self.bias_sum

    def add_gradient(self, hidden_ND: Tensor, terms: RowTerms, gradients: Gradients) -> None:
        """Subtract s·c_v from the gradient of every logit, multiplied out."""
        spread_N = terms.weight_N * terms.spread
        if gradients.dx_ND is not None:
            gradients.dx_ND.addr_(spread_N, self.weight_sum_D, alpha=-1)
        hidden_sum_D = spread_N @ hidden_ND
        if gradients.dw_VD is not None:
            if terms.classes_V is None:
                gradients.dw_VD.sub_(hidden_sum_D)
            else:
                gradients.dw_VD.addr_(terms.classes_V, hidden_sum_D, alpha=-1)
        if gradients.db_V is not None:
            gradients.db_V.sub_(spread_N.sum() if terms.classes_V is None else spread_N.sum() * terms.classes_V)
