"""The arithmetic of `chunked`: loss and gradients of a linear cross-entropy in one sweep over chunks of rows, three matrix products in all.

Two kernels compute the same:

* `dense`: any device and type. A chunk of logits is formed, turned into its own gradient a few cached rows at a time (fp32 maths, rounded
  once), and multiplied out.
* `blocked`: fp32 and fp64 on a CPU. The vocabulary is cut into blocks that stay in cache; each block is normalised on its own, and what is
  left to make it global, exp(lse_block − lse), is a factor of the row, like 1/N, z-loss and the weights: it multiplies the thin [rows, D]
  operands and never the [rows, V] one. Label smoothing is rank one. No pass over the logits but the soft-max.

With row weight w, class weight c_y and smoothing ε (losses/base.py), the gradient of row i with respect to its logits is

    k·softmax(z) − b·onehot(y) − s·c_v,     k = w·((1 − ε)·c_y + s/w·Σc + 2·m·c_y·lse),   b = w·(1 − ε)·c_y,   s = w·ε/V
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CACHED_BYTES = 4 << 20
"""Size of a piece that is worked on in cache. Below 32 MiB, glibc also recycles it instead of giving it back and faulting it in again."""
BLOCK_COLUMNS = 2048
"""Vocabulary entries of a block."""
FOLD_SHARE = 1e-3
"""The one-hot term is folded into a block (nothing cancels) unless the block holds less than this share of the row's probability."""

Matmul = Callable[[Tensor, Tensor], Tensor]
"""a [M, K], b [N, K] → a @ b.T."""


class Spec(NamedTuple):
    """Everything about a call but its tensors."""

    z_loss_multiplier: float
    label_smoothing: float
    softcap: float | None
    classes: int
    """Rows of the weight that are real."""
    token_metrics: bool
    need_dx: bool
    need_dw: bool
    need_db: bool
    dtype: torch.dtype
    """Of the matrix products."""
    scale: float
    """Multiplies every gradient."""
    rows: int = 0
    """Rows of a chunk; set when the shape is known."""

    @property
    def need_grad(self) -> bool:
        """Any gradient at all."""
        return self.need_dx or self.need_dw or self.need_db


class RowStats(NamedTuple):
    """Per row, before the row's weight."""

    cross_entropy_N: Tensor
    lse_N: Tensor
    class_weight_N: Tensor | None
    """c_y."""
    correct_N: Tensor | None
    entropy_N: Tensor | None


class Gradients(NamedTuple):
    """Scaled by Spec.scale; types are those of the accumulators."""

    dx_ND: Tensor | None
    dw_VD: Tensor | None
    db_V: Tensor | None


class RowTerms(NamedTuple):
    """What multiplies the parts of each row's loss; see the module's docstring."""

    weight_N: Tensor
    """w·scale."""
    class_weight_N: Tensor | None
    hot_N: Tensor
    """(1 − ε)·c_y, without w."""
    spread: float
    """ε/V."""
    classes_V: Tensor | None
    """c; None for all ones."""
    total: float | Tensor
    """Σ c."""

    def rows(self, start: int, stop: int) -> RowTerms:
        """The same of a chunk of rows."""
        part = slice(start, stop)
        class_weight_N = None if self.class_weight_N is None else self.class_weight_N[part]
        return self._replace(weight_N=self.weight_N[part], class_weight_N=class_weight_N, hot_N=self.hot_N[part])

    def softmax_factor(self, lse_N: Tensor, z_loss_multiplier: float) -> Tensor:
        """k."""
        factor_N = self.hot_N + self.spread * self.total
        if z_loss_multiplier:
            z_N = 2 * z_loss_multiplier * lse_N
            factor_N = factor_N + (z_N if self.class_weight_N is None else z_N * self.class_weight_N)
        return self.weight_N * factor_N


def row_terms(labels_N: Tensor, weights_N: Tensor | None, class_weights_V: Tensor | None, spec: Spec, dtype: torch.dtype) -> RowTerms:
    """The factors of every row."""
    ones_N = torch.ones(labels_N.shape, dtype=dtype, device=labels_N.device)
    weight_N = ones_N * spec.scale if weights_N is None else weights_N.to(dtype) * spec.scale
    keep = 1 - spec.label_smoothing
    spread = spec.label_smoothing / spec.classes
    if class_weights_V is None:
        return RowTerms(weight_N, None, ones_N * keep, spread, None, float(spec.classes))
    class_weights_V = class_weights_V.to(dtype)
    of_label_N = class_weights_V[labels_N]
    return RowTerms(weight_N, of_label_N, of_label_N * keep, spread, class_weights_V, class_weights_V.sum())


def dense(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec
) -> tuple[RowStats, Gradients]:
    """Loss and gradients chunk by chunk; operands are in spec.dtype, weight_VD and bias_V hold the real classes alone."""
    rows, width = hidden_ND.shape
    acc = terms.weight_N.dtype
    low = spec.dtype != acc
    columns = spec.classes
    stats = _empty_stats(rows, acc, hidden_ND.device, terms, spec)
    dx_ND = torch.empty_like(hidden_ND) if spec.need_dx else None
    weight_grad = _WeightGradient(columns, width, spec, acc, hidden_ND.device, single=rows <= spec.rows)
    db_V = torch.zeros(columns, dtype=acc, device=hidden_ND.device) if spec.need_db else None
    logits_CV = torch.empty(min(spec.rows, rows), columns, dtype=spec.dtype, device=hidden_ND.device)
    cached_bytes = CACHED_BYTES if hidden_ND.device.type == "cpu" else 64 * CACHED_BYTES
    step = max(1, min(spec.rows, rows, cached_bytes // (columns * acc.itemsize)))
    scratch = torch.empty(step, columns, dtype=acc, device=hidden_ND.device) if low else None
    for start in range(0, rows, spec.rows):
        stop = min(start + spec.rows, rows)
        x_CD, chunk_CV = hidden_ND[start:stop], logits_CV[: stop - start]
        torch.mm(x_CD, weight_VD.t(), out=chunk_CV)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            piece = chunk_CV[first - start : last - start]
            values = piece if scratch is None else scratch[: last - first].copy_(piece)
            _logits_to_gradient(values, piece, bias_V, labels_N[first:last], terms.rows(first, last), spec, stats, first, last)
        if dx_ND is not None:
            torch.mm(chunk_CV, weight_VD, out=dx_ND[start:stop])
        weight_grad.add(chunk_CV, x_CD)
        if db_V is not None:
            db_V.add_(chunk_CV.sum(0, dtype=acc))
    return stats, Gradients(dx_ND, weight_grad.result(), db_V)


def _empty_stats(rows: int, acc: torch.dtype, device: torch.device, terms: RowTerms, spec: Spec) -> RowStats:
    def new() -> Tensor:
        return torch.empty(rows, dtype=acc, device=device)

    metrics = (new(), new()) if spec.token_metrics else (None, None)
    return RowStats(new(), new(), terms.class_weight_N, *metrics)


def _logits_to_gradient(
    values: Tensor, out: Tensor, bias_V: Tensor | None, labels: Tensor, terms: RowTerms, spec: Spec, stats: RowStats, first: int, last: int
) -> None:
    """Turn a few rows of logits `values` (overwritten) into the gradient of the loss, in `out`; note their losses in `stats`."""
    label = labels.unsqueeze(1)
    if bias_V is not None:
        values.add_(bias_V)
    slope = None
    if spec.softcap is not None:
        values.div_(spec.softcap).tanh_()
        slope = 1 - values.square() if spec.need_grad else None
        values.mul_(spec.softcap)
    top = values.amax(1, keepdim=True)
    target = values.gather(1, label).squeeze(1)
    spread_sum = None
    if terms.spread:
        spread_sum = values.sum(1) if terms.classes_V is None else values @ terms.classes_V
    torch._softmax(values, 1, False, out=values)
    lse = top.squeeze(1) - values.amax(1).log()  # the largest probability is exactly 1 ÷ the normaliser
    cross_entropy = terms.hot_N * (lse - target)
    if spread_sum is not None:
        cross_entropy += terms.spread * (terms.total * lse - spread_sum)
    stats.cross_entropy_N[first:last] = cross_entropy
    stats.lse_N[first:last] = lse
    if stats.correct_N is not None and stats.entropy_N is not None:
        stats.correct_N[first:last] = (target >= top.squeeze(1)).to(values.dtype)
        stats.entropy_N[first:last] = torch.special.entr(values).sum(1)
    if not spec.need_grad:
        return
    factor = terms.softmax_factor(lse, spec.z_loss_multiplier)
    hot = values.gather(1, label).squeeze(1) * factor - terms.weight_N * terms.hot_N
    if not terms.spread and slope is None:  # one pass: scale and round
        torch.mul(values, factor.unsqueeze(1), out=out)
        out.scatter_(1, label, hot.to(out.dtype).unsqueeze(1))
        return
    values.mul_(factor.unsqueeze(1)).scatter_(1, label, hot.unsqueeze(1))
    if terms.spread:
        spread = (terms.weight_N * terms.spread).unsqueeze(1)
        values.sub_(spread if terms.classes_V is None else spread * terms.classes_V)
    if slope is not None:
        values.mul_(slope)
    if out is not values:
        out.copy_(values)


class _WeightGradient:
    """dW summed over chunks: in the accumulation type, except that a single chunk needs no sum and stays in the type of the product."""

    def __init__(self, columns: int, width: int, spec: Spec, acc: torch.dtype, device: torch.device, *, single: bool) -> None:
        self.low = spec.dtype != acc
        self.single = single
        self.empty = True
        self.total: Tensor | None = None
        if spec.need_dw:
            self.total = torch.empty(columns, width, dtype=spec.dtype if single else acc, device=device)

    def add(self, gradient_CV: Tensor, x_CD: Tensor) -> None:
        """Add gradient.T @ x."""
        if self.total is None:
            return
        if self.single or (self.empty and not self.low):
            torch.mm(gradient_CV.t(), x_CD, out=self.total)
        elif not self.low:
            torch.addmm(self.total, gradient_CV.t(), x_CD, out=self.total)
        elif self.total.device.type == "cuda":  # the product's own fp32 accumulator is added, never rounded
            if self.empty:
                self.total.zero_()
            torch.addmm(self.total, gradient_CV.t(), x_CD, out_dtype=torch.float32, out=self.total)
        else:
            self._add_blocks(self.total, gradient_CV, x_CD)
        self.empty = False

    def _add_blocks(self, total: Tensor, gradient_CV: Tensor, x_CD: Tensor) -> None:
        columns = max(BLOCK_COLUMNS, CACHED_BYTES // (total.shape[1] * total.dtype.itemsize))
        for start in range(0, total.shape[0], columns):
            part = torch.mm(gradient_CV[:, start : start + columns].t(), x_CD)
            block = total[start : start + columns]
            block.copy_(part) if self.empty else block.add_(part)

    def result(self) -> Tensor | None:
        """dW, or None when it is not needed."""
        if self.total is not None and self.empty:
            self.total.zero_()
        return self.total


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
    stats = _empty_stats(rows, acc, hidden_ND.device, terms, spec)
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
            part = matmul(values.t(), (x_CD * factor_C1).t())
            dw_VD[columns].copy_(part) if first else dw_VD[columns].add_(part)
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
