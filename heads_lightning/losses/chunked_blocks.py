"""The kernel of `chunked` for fp32 and fp64 on a CPU: chunks of rows, and the vocabulary in blocks that stay in cache.

Each block is normalised on its own, and what is left to make it global, exp(lse_block − lse), is a factor of the row, like 1/N, z-loss and
the weights: it multiplies the thin [rows, D] operands and never the [rows, V] one. So nothing but the soft-max passes over the logits, and
every product is of dense, cache-sized operands, which are the fastest. Label smoothing is rank one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from heads_lightning.losses import chunked_kernels, kept
from heads_lightning.losses.chunked_kernels import Gradients, RowStats, RowTerms, Spec, empty_stats, empty_weight_gradient

BLOCK_COLUMNS = 1024
"""Vocabulary entries of a block."""
FOLD_SHARE = 1e-3
"""The one-hot term is folded into a block (nothing cancels) unless the block holds less than this share of the row's probability."""

Matmul = Callable[[Tensor, Tensor], Tensor]
"""a [M, K], b [N, K] → a @ b.T."""


class _Problem(NamedTuple):
    """What all chunks share."""

    weight_VD: Tensor
    bias_V: Tensor | None
    smoothing: _Smoothing | None
    spec: Spec
    matmul: Matmul
    memory: Tensor
    """[rows of a chunk · classes]: room for the blocks of a chunk, one after the other; of one block, where no gradient is wanted."""
    scaled_CD: Tensor
    """Room for rows times a factor."""

    def block(self, columns: slice, rows: int) -> Tensor:
        """[rows, columns] of the memory."""
        first = rows * columns.start if self.spec.need_grad else 0
        return self.memory[first : first + rows * (columns.stop - columns.start)].view(rows, -1)

    def blocks(self) -> list[slice]:
        """The vocabulary in blocks."""
        classes = self.spec.classes
        return [slice(first, min(first + BLOCK_COLUMNS, classes)) for first in range(0, classes, BLOCK_COLUMNS)]


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

    def of_label(self, values_BC: Tensor, labels_C: Tensor) -> Tensor:
        """Of each row, the entry of the label's own block."""
        return values_BC.gather(0, (labels_C // BLOCK_COLUMNS).unsqueeze(0)).squeeze(0)


def blocked(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec, matmul: Matmul
) -> tuple[RowStats, Gradients]:
    """Loss and gradients, vocabulary in cached blocks; no soft cap. weight_VD and bias_V hold the real classes alone."""
    rows, width = hidden_ND.shape
    stats = empty_stats(rows, spec.dtype, hidden_ND.device, terms, spec)
    dw_VD = empty_weight_gradient(spec, width, spec.dtype, hidden_ND.device)
    gradients = Gradients(
        torch.empty_like(hidden_ND) if spec.need_dx else None,
        None if dw_VD is None else dw_VD[: spec.classes],
        hidden_ND.new_zeros(spec.classes) if spec.need_db else None,
    )
    smoothing = _Smoothing.of(weight_VD, bias_V, terms) if terms.spread else None
    chunk_rows = min(spec.rows, rows)
    probabilities = chunk_rows * (spec.classes if spec.need_grad else min(BLOCK_COLUMNS, spec.classes))
    shapes = [((probabilities,), spec.dtype), ((chunk_rows, width), spec.dtype)]
    with kept.room(shapes, hidden_ND.device) as (memory, scaled_CD):
        for start in range(0, rows, spec.rows):
            part = slice(start, min(start + spec.rows, rows))
            problem = _Problem(weight_VD, bias_V, smoothing, spec, matmul, memory, scaled_CD[: part.stop - start])
            chunk = _Chunk(hidden_ND[part], labels_N[part], terms.rows(part.start, part.stop))
            normalised = _normalise_blocks(problem, chunk)
            lse_C = normalised.lse_BC.logsumexp(0)
            _note_losses(problem, chunk, normalised, lse_C, stats, part)
            if spec.need_grad:
                _multiply_out(problem, chunk, normalised, lse_C, gradients, part)
    if rows == 0 and gradients.dw_VD is not None:
        gradients.dw_VD.zero_()
    if smoothing is not None:
        smoothing.add_gradient(hidden_ND, terms, gradients)
    return stats, gradients._replace(dw_VD=dw_VD)


def _normalise_blocks(problem: _Problem, chunk: _Chunk) -> _Normalised:
    """First sweep: every block's soft-max into the chunk's memory."""
    found: list[tuple[Tensor | None, ...]] = []
    for columns in problem.blocks():
        label_C = (chunk.labels_C - columns.start).clamp_(0, columns.stop - columns.start - 1)
        logits = problem.matmul(chunk.x_CD, problem.weight_VD[columns])
        found.append(_soft_max(problem, logits, problem.block(columns, len(label_C)), columns, label_C.unsqueeze(1)))
        del logits  # freed before the next are made
    return _Normalised(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)))  # pyright: ignore[reportArgumentType]


def _soft_max(
    problem: _Problem, logits: Tensor, block: Tensor, columns: slice, label_C1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Soft-max of a block's logits into `block`, a few rows at a time; rows of _Normalised."""
    bias = None if problem.bias_V is None else problem.bias_V[columns]
    step = max(1, chunked_kernels.CACHED_BYTES // (logits.shape[1] * logits.itemsize))
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, logits.shape[0], step):
        values, probabilities, label = (rows[start : start + step] for rows in (logits, block, label_C1))
        if bias is not None:
            values.add_(bias)
        lse, target, of_label = chunked_kernels.soft_max(values, probabilities, label, logits=(values, None))
        metrics = (values.amax(1), torch.special.entr(probabilities).sum(1)) if problem.spec.token_metrics else ()
        found.append((lse, target, of_label, *metrics))
    parts = [torch.cat(pieces) for pieces in zip(*found, strict=True)]
    return (*parts, *([None] * (5 - len(parts))))  # pyright: ignore[reportReturnType]


def _note_losses(problem: _Problem, chunk: _Chunk, normalised: _Normalised, lse_C: Tensor, stats: RowStats, part: slice) -> None:
    terms, lse_BC = chunk.terms, normalised.lse_BC
    target_C = normalised.of_label(normalised.target_BC, chunk.labels_C)
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
    """Second sweep, now that the normaliser is known: the gradients."""
    x_CD, labels_C, terms = chunk.x_CD, chunk.labels_C, chunk.terms
    factor_BC = normalised.lse_BC.softmax(0).mul_(terms.softmax_factor(lse_C, problem.spec.z_loss_multiplier))
    hot_C = terms.weight_N * terms.hot_N
    factor_C = normalised.of_label(factor_BC, labels_C)
    folds_C = factor_C.abs() > FOLD_SHARE * hot_C.abs()
    label_C = normalised.of_label(normalised.label_BC, labels_C)
    _put_labels(problem, chunk, label_C - torch.where(folds_C, hot_C / factor_C, 0.0))
    dx_CD = None if gradients.dx_ND is None else gradients.dx_ND[part].zero_()
    for number, columns in enumerate(problem.blocks()):
        block, factor_C1 = problem.block(columns, len(labels_C)), factor_BC[number].unsqueeze(1)
        if dx_CD is not None:
            dx_CD.addcmul_(problem.matmul(block, problem.weight_VD[columns].t()), factor_C1)
        if gradients.dw_VD is not None:
            torch.mul(x_CD, factor_C1, out=problem.scaled_CD)
            add = gradients.dw_VD[columns].copy_ if part.start == 0 else gradients.dw_VD[columns].add_
            add(_sum_of_rows(problem, block))  # unnamed: freed before the next is made
        if gradients.db_V is not None:
            gradients.db_V[columns].addmv_(block.t(), factor_C1.squeeze(1))
    if not bool(folds_C.all()):
        _subtract_hot(x_CD, labels_C, torch.where(folds_C, 0.0, hot_C), problem.weight_VD, gradients._replace(dx_ND=dx_CD))


def _sum_of_rows(problem: _Problem, block: Tensor) -> Tensor:
    """block.T @ scaled_CD. oneDNN copies a first operand that lies transposed in memory: let it be the smaller one."""
    rows, width = problem.scaled_CD.shape
    if rows >= 2 * width:
        return problem.matmul(problem.scaled_CD.t(), block.t()).t()
    return problem.matmul(block.t(), problem.scaled_CD.t())


def _put_labels(problem: _Problem, chunk: _Chunk, values_C: Tensor) -> None:
    """Write each row's label's entry of the chunk's memory."""
    rows = len(chunk.labels_C)
    first_C = chunk.labels_C // BLOCK_COLUMNS * BLOCK_COLUMNS
    width_C = (problem.spec.classes - first_C).clamp_(max=BLOCK_COLUMNS)
    problem.memory[rows * first_C + torch.arange(rows) * width_C + chunk.labels_C - first_C] = values_C


def _subtract_hot(x_CD: Tensor, labels_C: Tensor, hot_C: Tensor, weight_VD: Tensor, gradients: Gradients) -> None:
    """From the gradients of a chunk, the one-hot terms of rows whose label's block is too improbable to hold them."""
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
