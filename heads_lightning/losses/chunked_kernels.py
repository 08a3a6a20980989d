"""The arithmetic of `chunked`: loss and gradients of a linear cross-entropy in one sweep over chunks of rows, three matrix products in all.

This kernel runs on any device with any type: a chunk of logits is formed, turned into its own gradient a few cached rows at a time (fp32
maths, rounded once), and multiplied out. chunked_blocks.py holds a faster one for fp32 on CPUs, vocab_parallel.py one for shards.

With row weight w, class weight c_y and smoothing ε (losses/base.py), the gradient of row i with respect to its logits is

    k·softmax(z) − b·onehot(y) − s·c_v,     k = w·((1 − ε)·c_y + s/w·Σc + 2·m·c_y·lse),   b = w·(1 − ε)·c_y,   s = w·ε/V
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heads_lightning.losses import kept
from heads_lightning.losses.base import VocabShard

CACHED_BYTES = 4 << 20
"""Size of a piece that is worked on in cache. Below 32 MiB, glibc also recycles it instead of giving it back and faulting it in again."""
ACCELERATOR_CACHED_BYTES = 256 << 20
"""The same elsewhere, where only the number of calls counts."""
UNDERFLOW = 1e-30
"""Below this a probability is no longer exact enough, or is zero, for its logarithm."""
FEW_CHUNKS = 4
"""Up to so many chunks, dW in low precision is as exact when it is added up in it by the products themselves, which round their sum once,
as when products rounded to it are added up in fp32. (bf16, error at 4 chunks 3.6e-3 and 3.5e-3, at 16 chunks 5.4e-3 and 3.5e-3.)"""
MIN_COLUMNS = 2048
"""Fewer vocabulary entries at a time make the products of the weight's gradient inefficient."""


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
    shard: VocabShard | None = None
    """Of the vocabulary; `classes` counts its rows."""
    all_classes: int = 0
    """Classes of the whole vocabulary; 0 where there is no shard."""
    rows: int = 0
    """Rows of a chunk; set when the shape is known, like `padding`."""
    padding: int = 0
    """Rows of the weight at the end that are no classes."""

    @property
    def need_grad(self) -> bool:
        """Any gradient at all."""
        return self.need_dx or self.need_dw or self.need_db

    def without_gradients(self) -> Spec:
        """The losses alone."""
        return self._replace(need_dx=False, need_dw=False, need_db=False)

    def for_backward(self) -> Spec:
        """The gradients alone, of losses per token whose own gradients have become the rows' weights."""
        return self._replace(token_metrics=False, scale=1.0)


class Operands(NamedTuple):
    """Every tensor of a call."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    weights_N: Tensor | None
    class_weights_V: Tensor | None
    counted_N: Tensor | None
    """Rows that have a target, for token metrics; None: all."""

    def weighed(self, grad_N: Tensor) -> Operands:
        """The same, each row's weight multiplied by the gradient of its loss."""
        return self._replace(weights_N=grad_N if self.weights_N is None else grad_N * self.weights_N)


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
    """c of the own classes; None for all ones."""
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
    classes = spec.all_classes or spec.classes
    keep, spread = 1 - spec.label_smoothing, spec.label_smoothing / classes
    if class_weights_V is None:
        return RowTerms(weight_N, None, ones_N * keep, spread, None, float(classes))
    class_weights_V = class_weights_V.to(dtype)
    of_label_N = class_weights_V[labels_N]
    first = 0 if spec.shard is None else spec.shard.start
    return RowTerms(weight_N, of_label_N, of_label_N * keep, spread, class_weights_V[first : first + spec.classes], class_weights_V.sum())


def dense(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, terms: RowTerms, spec: Spec
) -> tuple[RowStats, Gradients]:
    """Loss and gradients chunk by chunk; operands are in spec.dtype, weight_VD and bias_V hold the real classes alone."""
    rows, width = hidden_ND.shape
    acc = terms.weight_N.dtype
    low = spec.dtype != acc
    columns = spec.classes
    stats = empty_stats(rows, acc, hidden_ND.device, terms, spec)
    dx_ND = torch.empty_like(hidden_ND) if spec.need_dx else None
    weight_grad = WeightGradient(rows, width, spec, acc, hidden_ND.device)
    db_V = torch.zeros(columns, dtype=acc, device=hidden_ND.device) if spec.need_db else None
    cached_bytes = CACHED_BYTES if hidden_ND.device.type == "cpu" else ACCELERATOR_CACHED_BYTES
    step = max(1, min(spec.rows, rows, cached_bytes // (columns * acc.itemsize)))
    chunk, scratch = (min(spec.rows, rows), columns), (step if low else 0, columns)
    with kept.room([(chunk, spec.dtype), (scratch, acc)], hidden_ND.device) as (logits_CV, scratch_CV):
        for start in range(0, rows, spec.rows):
            stop = min(start + spec.rows, rows)
            x_CD, chunk_CV = hidden_ND[start:stop], logits_CV[: stop - start]
            torch.mm(x_CD, weight_VD.t(), out=chunk_CV)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                piece = chunk_CV[first - start : last - start]
                values = scratch_CV[: last - first].copy_(piece) if low else piece
                _logits_to_gradient(values, piece, bias_V, labels_N[first:last], terms.rows(first, last), spec, stats, first, last)
            if dx_ND is not None:
                torch.mm(chunk_CV, weight_VD, out=dx_ND[start:stop])
            weight_grad.add(chunk_CV, x_CD)
            if db_V is not None:
                db_V.add_(chunk_CV.sum(0, dtype=acc))
    return stats, Gradients(dx_ND, weight_grad.result(), db_V)


def empty_stats(rows: int, acc: torch.dtype, device: torch.device, terms: RowTerms, spec: Spec) -> RowStats:
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
    top = values.amax(1) if spec.token_metrics else None
    spread_sum = None
    if terms.spread:
        spread_sum = values.sum(1) if terms.classes_V is None else values @ terms.classes_V
    untouched = out is not values and out.device.type == "cpu" and spec.softcap is None  # to look at numbers makes an accelerator wait
    lse, target, of_label = soft_max(values, values, label, logits=(out, bias_V) if untouched else None)
    cross_entropy = terms.hot_N * (lse - target)
    if spread_sum is not None:
        cross_entropy += terms.spread * (terms.total * lse - spread_sum)
    stats.cross_entropy_N[first:last] = cross_entropy
    stats.lse_N[first:last] = lse
    if stats.correct_N is not None and stats.entropy_N is not None and top is not None:
        stats.correct_N[first:last] = (target >= top).to(values.dtype)
        stats.entropy_N[first:last] = torch.special.entr(values).sum(1)
    if not spec.need_grad:
        return
    factor = terms.softmax_factor(lse, spec.z_loss_multiplier)
    hot = of_label * factor - terms.weight_N * terms.hot_N
    if not terms.spread and slope is None and rounds_in_passing(out.device.type):
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


def rounds_in_passing(device: str) -> bool:
    """Whether a product of fp32 that is stored in less is one pass. On a CPU it goes through fresh memory of its own: much slower."""
    return device != "cpu"


def soft_max(
    values: Tensor, out: Tensor, label_C1: Tensor, *, logits: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-max of rows into `out`, which may be `values`; the log-normaliser, and the label's logit and probability.

    Where the logits (and a bias to be added to them) are still there afterwards, the label's two numbers tell the normaliser, which saves
    two passes; of a label too improbable for that it is computed from them.
    """
    target = values.gather(1, label_C1).squeeze(1)
    if logits is None:
        top = values.amax(1)
        torch._softmax(values, 1, False, out=out)
        return top - out.amax(1).log(), target, out.gather(1, label_C1).squeeze(1)  # the largest is exactly 1 ÷ the normaliser
    torch._softmax(values, 1, False, out=out)
    of_label = out.gather(1, label_C1).squeeze(1)
    lse = target - of_label.log()
    far = (of_label < UNDERFLOW).nonzero().squeeze(1)
    if len(far):
        rows, bias_V = logits[0][far].to(values.dtype), logits[1]
        lse[far] = torch.logsumexp(rows if bias_V is None else rows + bias_V, 1)
    return lse, target, of_label


def empty_weight_gradient(spec: Spec, width: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[V + padding, D], where it is needed: undefined but for the padding, which is 0."""
    if not spec.need_dw:
        return None
    dw_VD = kept.empty(spec.classes + spec.padding, width, dtype=dtype, device=device)
    dw_VD[spec.classes :].zero_()
    return dw_VD


def direct_chunks(dtype: torch.dtype, device: str) -> int:
    """Up to so many chunks, products of dW go straight to where their sum is wanted, in the type of the products."""
    return FEW_CHUNKS if device == "cpu" and dtype == torch.bfloat16 else 1


class WeightGradient:
    """dW summed over chunks: in the accumulation type, or by the products in their own where they are few."""

    def __init__(self, rows: int, width: int, spec: Spec, acc: torch.dtype, device: torch.device) -> None:
        few = rows <= spec.rows * direct_chunks(spec.dtype, device.type)
        dtype = spec.dtype if few else acc
        self.direct = dtype == spec.dtype
        self.empty = True
        self.padded = empty_weight_gradient(spec, width, dtype, device)
        self.total = None if self.padded is None else self.padded[: spec.classes]

    def add(self, gradient_CV: Tensor, x_CD: Tensor) -> None:
        """Add gradient.T @ x."""
        if self.total is None or self.total.numel() == 0:
            return
        if self.direct:
            if self.empty:
                torch.mm(gradient_CV.t(), x_CD, out=self.total)
            else:
                torch.addmm(self.total, gradient_CV.t(), x_CD, out=self.total)
        elif self.total.device.type == "cuda":  # the product's own fp32 accumulator is added, never rounded
            if self.empty:
                self.total.zero_()
            torch.addmm(self.total, gradient_CV.t(), x_CD, out_dtype=torch.float32, out=self.total)
        else:
            self._add_blocks(self.total, gradient_CV, x_CD)
        self.empty = False

    def _add_blocks(self, total: Tensor, gradient_CV: Tensor, x_CD: Tensor) -> None:
        columns = max(MIN_COLUMNS, CACHED_BYTES // (total.shape[1] * total.dtype.itemsize))
        for start in range(0, total.shape[0], columns):
            block = total[start : start + columns]
            add = block.copy_ if self.empty else block.add_
            add(torch.mm(gradient_CV[:, start : start + columns].t(), x_CD))  # unnamed: freed before the next is made

    def result(self) -> Tensor | None:
        """dW, or None when it is not needed."""
        if self.total is not None and self.empty:
            self.total.zero_()
        return self.padded
