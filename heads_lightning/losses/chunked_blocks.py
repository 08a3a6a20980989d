"""The kernel of `chunked` for fp32, fp64 and bf16 on a CPU: chunks of rows, and the vocabulary in blocks that stay in cache.

Each block is normalised on its own, and what is left to make it global, exp(lse_block − lse), is a factor of the row, like 1/N, z-loss and
the weights: it multiplies the thin [rows, D] operands and never the [rows, V] one. So a block is multiplied into dX while it is still in
cache, nothing but the soft-max passes over the logits, and every product is of dense, cache-sized operands, which are the fastest. Label
smoothing is rank one. What belongs to the label itself, softmax − one-hot, is formed in the type of the loss before anything is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from heads_lightning.losses import chunked_kernels
from heads_lightning.losses.chunked_kernels import Gradients, RowStats, RowTerms, Spec, empty_stats

BLOCK_COLUMNS = 2048
"""Vocabulary entries of a block of fp32 or fp64; twice as many of bf16."""
FOLD_SHARE = 1e-3
"""The one-hot term is folded into a block (nothing cancels) unless the block holds less than this share of the row's probability."""
FEW_CHUNKS = 4
"""Up to so many chunks, dW in bf16 is as exact when it is added up in bf16 by the products themselves, which round their sum once, as when
products rounded to bf16 are added up in fp32. (Error at 4 chunks 3.6e-3 and 3.5e-3, at 16 chunks 5.4e-3 and 3.5e-3.)"""

Matmul = Callable[[Tensor, Tensor], Tensor]
"""a [M, K], b [N, K] → a @ b.T."""

KEPT_BYTES = 96 << 20
"""A larger workspace is given back."""
LINE_BYTES = 64
"""Of a cache line, on which each tensor of the workspace begins."""
_kept: list[Tensor] = []
"""The workspace of the last call, while no call has it: two calls at once have one each."""


@contextmanager
def _workspace(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[Tensor]]:
    """Tensors whose memory is kept for the next call: to fault in as much anew costs a tenth of the time of the products."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    starts = list(accumulate((-(-size // LINE_BYTES) * LINE_BYTES for size in sizes), initial=0))
    try:
        buffer = _kept.pop()
    except IndexError:
        buffer = torch.empty(0, dtype=torch.uint8)
    if buffer.nbytes < starts[-1]:
        del buffer  # before the larger one is made
        buffer = torch.empty(starts[-1], dtype=torch.uint8)
    yield [buffer[a : a + size].view(dtype).view(shape) for a, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)]
    if buffer.nbytes <= KEPT_BYTES:
        _kept[:] = [buffer]


def block_columns(dtype: torch.dtype) -> int:
    """Vocabulary entries of a block."""
    return BLOCK_COLUMNS * (2 if dtype.itemsize == 2 else 1)


class _LowRoom(NamedTuple):
    """What low precision keeps beside the blocks; the type is that of the loss but for product_CD."""

    piece: Tensor
    """A few rows of a block."""
    x_CD: Tensor
    sum_CD: Tensor
    """dX of a chunk."""
    scaled_CD: Tensor
    product_CD: Tensor

    @classmethod
    def shapes(cls, rows: int, width: int, dtype: torch.dtype, acc: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of each."""
        thin = (rows, width)
        return [((chunked_kernels.CACHED_BYTES // acc.itemsize,), acc), (thin, acc), (thin, acc), (thin, acc), (thin, dtype)]

    def rows(self, count: int) -> _LowRoom:
        """The same of a smaller chunk."""
        return _LowRoom(self.piece, *(room[:count] for room in self[1:]))


class _Problem(NamedTuple):
    """What all chunks share."""

    weight_VD: Tensor
    bias_V: Tensor | None
    smoothing: _Smoothing | None
    spec: Spec
    matmul: Matmul
    columns: int
    """Of a block."""
    acc: torch.dtype
    """Of the loss."""
    memory: Tensor
    """[rows of a chunk · classes]: room for the blocks of a chunk, one after the other; of one block, where no gradient is wanted."""
    scaled_CD: Tensor
    """Room for rows times a factor."""
    low: _LowRoom | None

    @property
    def early(self) -> _LowRoom | None:
        """Where dX is summed while a block is in cache. In fp32 its scaling from block to block costs more than that saves: None."""
        return self.low if self.spec.need_dx else None

    def block(self, columns: slice, rows: int) -> Tensor:
        """[rows, columns] of the memory."""
        first = rows * columns.start if self.spec.need_grad else 0
        return self.memory[first : first + rows * (columns.stop - columns.start)].view(rows, -1)

    def blocks(self) -> list[slice]:
        """The vocabulary in blocks."""
        classes = self.spec.classes
        return [slice(first, min(first + self.columns, classes)) for first in range(0, classes, self.columns)]


class _Chunk(NamedTuple):
    """Some rows."""

    x_CD: Tensor
    labels_C: Tensor
    terms: RowTerms


class _Normalised(NamedTuple):
    """A chunk after the first sweep over the vocabulary, block by block [B, C]: what the soft-max of each block by itself left out."""

    lse_BC: Tensor
    target_BC: Tensor
    """The label's logit, in the label's own block; in the others, that of another class."""
    label_BC: Tensor
    """Its probability within the block, likewise."""
    top_BC: Tensor | None
    """Largest logit; for token metrics."""
    entropy_BC: Tensor | None

    def of_label(self, values_BC: Tensor, labels_C: Tensor, columns: int) -> Tensor:
        """Of each row, the entry of the label's own block."""
        return values_BC.gather(0, (labels_C // columns).unsqueeze(0)).squeeze(0)


def blocked(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec, matmul: Matmul
) -> tuple[RowStats, Gradients]:
    """Loss and gradients, vocabulary in cached blocks; no soft cap. weight_VD and bias_V hold the real classes alone."""
    rows, acc = hidden_ND.shape[0], terms.weight_N.dtype
    stats = empty_stats(rows, acc, hidden_ND.device, terms, spec)
    gradients = _empty_gradients(hidden_ND, spec, acc)
    smoothing = _Smoothing.of(weight_VD, bias_V, terms) if terms.spread else None
    columns, chunk_rows, width = min(block_columns(spec.dtype), spec.classes), min(spec.rows, rows), hidden_ND.shape[1]
    kept = (chunk_rows * (spec.classes if spec.need_grad else columns),)
    low = [] if spec.dtype == acc else _LowRoom.shapes(chunk_rows, width, spec.dtype, acc)
    with _workspace([(kept, spec.dtype), ((chunk_rows, width), spec.dtype), *low]) as (memory, scaled_CD, *of_low):
        for start in range(0, rows, spec.rows):
            part = slice(start, min(start + spec.rows, rows))
            size = part.stop - part.start
            room = _LowRoom(*of_low).rows(size) if low else None
            problem = _Problem(weight_VD, bias_V, smoothing, spec, matmul, columns, acc, memory, scaled_CD[:size], room)
            chunk = _Chunk(hidden_ND[part], labels_N[part], terms.rows(part.start, part.stop))
            normalised, lse_C = _normalise_blocks(problem, chunk)
            _note_losses(problem, chunk, normalised, lse_C, stats, part)
            if spec.need_grad:
                _multiply_out(problem, chunk, normalised, lse_C, gradients, part)
    if rows == 0 and gradients.dw_VD is not None:
        gradients.dw_VD.zero_()
    if smoothing is not None:
        smoothing.add_gradient(hidden_ND, terms, gradients)
    return stats, gradients


def _empty_gradients(hidden_ND: Tensor, spec: Spec, acc: torch.dtype) -> Gradients:
    rows, width = hidden_ND.shape
    dtype = spec.dtype if rows <= FEW_CHUNKS * spec.rows else acc
    return Gradients(
        torch.empty_like(hidden_ND) if spec.need_dx else None,
        hidden_ND.new_empty(spec.classes, width, dtype=dtype) if spec.need_dw else None,
        hidden_ND.new_zeros(spec.classes, dtype=acc) if spec.need_db else None,
    )


def _normalise_blocks(problem: _Problem, chunk: _Chunk) -> tuple[_Normalised, Tensor]:
    """First sweep: every block's soft-max into the chunk's memory; the log-normalisers."""
    found: list[tuple[Tensor | None, ...]] = []
    lse_C = torch.full(chunk.labels_C.shape, -torch.inf, dtype=problem.acc)
    for columns in problem.blocks():
        weight_BD, block = problem.weight_VD[columns], problem.block(columns, len(lse_C))
        label_C = (chunk.labels_C - columns.start).clamp_(0, columns.stop - columns.start - 1)
        logits = problem.matmul(chunk.x_CD, weight_BD) if problem.low is None else torch.mm(chunk.x_CD, weight_BD.t(), out=block)
        lse_of_block, *others = _soft_max(problem, logits, block, columns, label_C.unsqueeze(1))
        del logits
        found.append((lse_of_block, *others))
        if problem.early is not None:
            own = (label_C == chunk.labels_C - columns.start).nonzero().squeeze(1)
            block[own, label_C[own]] = 0
            _add_to_sum(problem.early, block, weight_BD, torch.stack((lse_C, lse_of_block)), first=columns.start == 0)
        lse_C = torch.logaddexp(lse_C, lse_of_block)
    return _Normalised(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True))), lse_C  # pyright: ignore[reportArgumentType]


def _add_to_sum(room: _LowRoom, block: Tensor, weight_BD: Tensor, lse_2C: Tensor, *, first: bool) -> None:
    """Σ softmax · W of the classes seen so far, from that of the classes before and that of a block; log-normalisers of both."""
    torch.mm(block, weight_BD, out=room.product_CD)
    if first:
        room.sum_CD.copy_(room.product_CD)
    else:
        before_C1, own_C1 = lse_2C.softmax(0).unsqueeze(2)
        room.sum_CD.mul_(before_C1).addcmul_(room.scaled_CD.copy_(room.product_CD), own_C1)


def _soft_max(
    problem: _Problem, logits: Tensor, block: Tensor, columns: slice, label_C1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Soft-max of a block's logits (overwritten) into `block`, a few rows at a time, in the type of the loss; rows of _Normalised."""
    bias = None if problem.bias_V is None else problem.bias_V[columns]
    step = max(1, chunked_kernels.CACHED_BYTES // (logits.shape[1] * problem.acc.itemsize))
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, logits.shape[0], step):
        given, wanted, label = (rows[start : start + step] for rows in (logits, block, label_C1))
        values, probabilities = given, wanted
        if problem.low is not None:
            probabilities = values = problem.low.piece[: given.numel()].view(given.shape).copy_(given)
        if bias is not None:
            values.add_(bias)
        top = values.amax(1) if problem.spec.token_metrics else None
        own_bias = None if given is values else bias
        lse, target, of_label = chunked_kernels.soft_max(values, probabilities, label, logits=(given, own_bias))
        found.append((lse, target, of_label) if top is None else (lse, target, of_label, top, torch.special.entr(probabilities).sum(1)))
        if probabilities is not wanted and problem.spec.need_grad:
            wanted.copy_(probabilities)
    parts = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
    return (*parts, *([None] * (5 - len(parts))))  # pyright: ignore[reportReturnType]


def _note_losses(problem: _Problem, chunk: _Chunk, normalised: _Normalised, lse_C: Tensor, stats: RowStats, part: slice) -> None:
    terms, lse_BC = chunk.terms, normalised.lse_BC
    target_C = normalised.of_label(normalised.target_BC, chunk.labels_C, problem.columns)
    cross_entropy_C = terms.hot_N * (lse_C - target_C)
    if problem.smoothing is not None:
        cross_entropy_C += terms.spread * (terms.total * lse_C - problem.smoothing.logit_sum(chunk.x_CD))
    stats.cross_entropy_N[part] = cross_entropy_C
    stats.lse_N[part] = lse_C
    if stats.correct_N is not None and stats.entropy_N is not None and normalised.top_BC is not None and normalised.entropy_BC is not None:
        stats.correct_N[part] = (target_C >= normalised.top_BC.amax(0)).to(target_C.dtype)
        mean_logit = (lse_BC - normalised.entropy_BC) * (lse_BC - lse_C).exp()  # lse − entropy is a block's mean logit
        stats.entropy_N[part] = lse_C - mean_logit.sum(0)


def _multiply_out(problem: _Problem, chunk: _Chunk, normalised: _Normalised, lse_C: Tensor, gradients: Gradients, part: slice) -> None:
    """What is left when the normaliser is known: row factors of a dX that is summed, and a second sweep for the other gradients."""
    labels_C, terms, low = chunk.labels_C, chunk.terms, problem.low
    softmax_C = terms.softmax_factor(lse_C, problem.spec.z_loss_multiplier)
    factor_BC = normalised.lse_BC.softmax(0).mul_(softmax_C)
    hot_C = terms.weight_N * terms.hot_N
    factor_C = normalised.of_label(factor_BC, labels_C, problem.columns)
    label_C = normalised.of_label(normalised.label_BC, labels_C, problem.columns)
    dx_CD = None if gradients.dx_ND is None else gradients.dx_ND[part]
    if dx_CD is not None and (early := problem.early) is not None:
        own_CD = early.scaled_CD.copy_(torch.index_select(problem.weight_VD, 0, labels_C, out=early.product_CD))
        dx_CD.copy_(early.sum_CD.mul_(softmax_C.unsqueeze(1)).addcmul_(own_CD, (label_C * factor_C - hot_C).unsqueeze(1)))
        dx_CD = None
    late = gradients._replace(dx_ND=None if dx_CD is None else dx_CD.zero_())
    if all(gradient is None for gradient in late):
        return
    folds_C = factor_C.abs() > FOLD_SHARE * hot_C.abs()
    _put_labels(problem, chunk, label_C - torch.where(folds_C, hot_C / factor_C, 0.0))
    x_CD = chunk.x_CD if low is None else low.x_CD.copy_(chunk.x_CD)
    for number, columns in enumerate(problem.blocks()):
        block, factor_C1 = problem.block(columns, len(labels_C)), factor_BC[number].unsqueeze(1)
        if late.dx_ND is not None:
            late.dx_ND.addcmul_(problem.matmul(block, problem.weight_VD[columns].t()), factor_C1)
        if late.dw_VD is not None:
            torch.mul(x_CD, factor_C1, out=problem.scaled_CD if low is None else low.scaled_CD)
            scaled_CD = problem.scaled_CD if low is None else problem.scaled_CD.copy_(low.scaled_CD)
            _add_product(late.dw_VD[columns], block, scaled_CD, part.start == 0, problem.matmul)
        if late.db_V is not None:
            late.db_V[columns].addmv_(block.t().to(problem.acc), factor_C1.squeeze(1))
    if not bool(folds_C.all()):
        _subtract_hot(x_CD, labels_C, torch.where(folds_C, 0.0, hot_C), problem.weight_VD, late)


def _put_labels(problem: _Problem, chunk: _Chunk, values_C: Tensor) -> None:
    """Write each row's label's entry of the chunk's memory."""
    rows, columns = len(chunk.labels_C), problem.columns
    first_C = chunk.labels_C // columns * columns
    width_C = (problem.spec.classes - first_C).clamp_(max=columns)
    place_C = rows * first_C + torch.arange(rows) * width_C + chunk.labels_C - first_C
    problem.memory[place_C] = values_C.to(problem.memory.dtype)  # scatter_ copies all of it


def _add_product(total: Tensor, block: Tensor, x_CD: Tensor, first: bool, matmul: Matmul) -> None:
    """Add block.T @ x, or set it."""
    if total.dtype.itemsize == 2:
        torch.addmm(total, block.t(), x_CD, beta=0 if first else 1, out=total)
        return
    add = total.copy_ if first else total.add_
    add(matmul(block.t(), x_CD.t()))  # unnamed: freed before the next is made


def _subtract_hot(x_CD: Tensor, labels_C: Tensor, hot_C: Tensor, weight_VD: Tensor, gradients: Gradients) -> None:
    """From the gradients of a chunk, the one-hot terms of rows whose label's block is too improbable to hold them."""
    own = hot_C.nonzero().squeeze(1)
    labels, hot = labels_C[own], hot_C[own].unsqueeze(1)
    if gradients.dx_ND is not None:
        gradients.dx_ND.index_add_(0, own, weight_VD[labels] * hot, alpha=-1)
    if gradients.dw_VD is not None:
        gradients.dw_VD.index_add_(0, labels, (x_CD[own] * hot).to(gradients.dw_VD.dtype), alpha=-1)
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
