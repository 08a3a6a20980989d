"""`chunked`: ours. Gradients are formed in the forward pass, chunk by chunk, so that no more than a chunk of logits ever exists.

Works on any device and with any type, with every feature, natively; three matrix products in all, four for losses per token (which are
recomputed in the backward pass, since the gradient of each is unknown before). The loss is fp32, and so are sums over chunks (of a few
chunks of bf16 on a CPU the products themselves add dW up, in fp32 within each: chunked_kernels.FEW_CHUNKS). The gradients are handed over
once: a second backward pass is refused in words, as is a second derivative; `default` does both.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from heads_lightning import onednn
from heads_lightning.losses import chunked_blocks, kept
from heads_lightning.losses import chunked_kernels as kernels
from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection, loss_dtype, mask_ignored, matmul_dtype
from heads_lightning.losses.chunked_blocks import Matmul, blocked
from heads_lightning.losses.chunked_kernels import Gradients, Operands, RowStats, Spec
from heads_lightning.losses.once import refuse_again

FEATURES = frozenset(Feature)
WORKSPACE_BYTES = 50 << 20
"""Logits that exist at a time on a CPU: every chunk passes over dW, and beside it this is small."""
WORKSPACE_BYTES_ACCELERATOR = 512 << 20
MAX_ROWS = 1024
"""More rows in a chunk gain nothing on a CPU."""
CASTS = (Tensor.to, kept.cast, Tensor.to)
"""Of the gradients of hidden states, weight and bias."""
PROBE_FLOP = 2**27
"""Below this size of one matrix product it is not worth finding out which library is faster."""


def unavailable() -> str | None:
    """None: it runs everywhere."""
    return None


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    if weights_N is not None and weights_N.requires_grad and torch.is_grad_enabled():
        return _differentiable_weights(hidden_ND, projection, labels_N, options, weights_N)
    counted_N = None if options.all_targets or not options.token_metrics else labels_N != options.ignore_index
    hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
    if projection.is_sharded:
        projection = vocab_parallel().local_projection(projection)
    spec = _spec(hidden_ND, projection, options)
    operands = Operands(hidden_ND, projection.weight_VD, projection.bias_V, labels_N, weights_N, options.class_weights_V, counted_N)
    if torch.compiler.is_compiling() and spec.shard is None:
        from heads_lightning.losses.chunked_op import compiled

        return LossSum(*compiled(operands, spec, per_token=options.per_token))
    return LossSum(*(_PerToken if options.per_token else _Summed).apply(spec, *operands))


@cache
def vocab_parallel() -> ModuleType:
    """losses/vocab_parallel.py, imported for shards alone: PyTorch's distributed tensors take a second."""
    return importlib.import_module("heads_lightning.losses.vocab_parallel")


def _spec(hidden_ND: Tensor, projection: Projection, options: LossOptions) -> Spec:
    wants_grad = torch.is_grad_enabled()
    dtype = matmul_dtype(hidden_ND, projection.weight_VD)
    return Spec(
        z_loss_multiplier=options.z_loss_multiplier,
        label_smoothing=options.label_smoothing,
        softcap=projection.softcap,
        classes=projection.own_classes,
        token_metrics=options.token_metrics,
        need_dx=wants_grad and hidden_ND.requires_grad,
        need_dw=wants_grad and projection.weight_VD.requires_grad,
        need_db=wants_grad and projection.bias_V is not None and projection.bias_V.requires_grad,
        dtype=dtype,
        # gradients of fp16 stay unscaled until the backward pass: 1 ÷ tokens would underflow in them
        scale=1.0 if dtype == torch.float16 else options.expected_grad,
        shard=projection.shard,
        all_classes=0 if projection.shard is None else projection.classes,
    )


def _differentiable_weights(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor
) -> LossSum:
    """Weights that want a gradient multiply losses per token, outside."""
    loss = linear_cross_entropy_sum(hidden_ND, projection, labels_N, options._replace(per_token=True, expected_grad=1.0))
    weighted = [None if value is None else value * weights_N for value in (loss.total, loss.cross_entropy, loss.z_loss)]
    cross_entropy, z_loss = (None if value is None else value.detach() for value in weighted[1:])
    parts = (weighted[0], cross_entropy, z_loss, loss.correct, loss.entropy)
    return LossSum(*(value if value is None or options.per_token else value.sum() for value in parts))  # pyright: ignore[reportArgumentType]


def chunk_rows(rows: int, classes: int, width: int, dtype: torch.dtype, device: str) -> int:
    """Rows of a chunk: what the workspace holds, in chunks of equal size; more, when that costs less than an fp32 dW that sums chunks."""
    workspace, most = (WORKSPACE_BYTES, MAX_ROWS) if device == "cpu" else (WORKSPACE_BYTES_ACCELERATOR, rows)
    accumulator = 0
    if dtype.itemsize == 2:
        accumulator, most = 4 * classes * width, rows
        workspace += workspace // 4 if device == "cpu" else 0  # the matrices beside it are half as large
    size = max(1, classes) * dtype.itemsize
    fits = max(16, min(workspace // size, most))
    without_sum = math.ceil(rows / kernels.direct_chunks(dtype, device))
    if without_sum * size <= workspace + accumulator:
        fits = max(fits, without_sum)
    if rows <= fits:
        return max(1, rows)
    even = math.ceil(rows / math.ceil(rows / fits))
    return min(rows, math.ceil(even / 16) * 16)


def compute(operands: Operands, spec: Spec) -> tuple[RowStats, Gradients]:
    """Losses of the rows and gradients of spec.scale · their weighted sum, in the types of the operands."""
    hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V, _ = operands
    rows, width = hidden_ND.shape
    classes = spec.classes if spec.shard is None else spec.shard.total  # ranks must agree on the chunks that they exchange numbers of
    chunk = chunk_rows(rows, classes, width, spec.dtype, hidden_ND.device.type)
    spec = spec._replace(rows=chunk, padding=weight_VD.shape[0] - spec.classes)
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        acc = loss_dtype(spec.dtype)
        terms = kernels.row_terms(labels_N, weights_N, class_weights_V, spec, acc)
        x_ND, w_VD = hidden_ND.to(spec.dtype), kept.cast(weight_VD[: spec.classes], spec.dtype)
        b_V = None if bias_V is None else bias_V[: spec.classes].to(acc)
        product = _block_matmul(x_ND, w_VD, spec)
        if spec.shard is not None:
            stats, gradients = vocab_parallel().sharded(x_ND, w_VD, b_V, labels_N, terms, spec)
        elif product is None:
            stats, gradients = kernels.dense(x_ND, w_VD, b_V, labels_N, terms, spec)
        else:
            stats, gradients = blocked(x_ND, w_VD, b_V, labels_N, terms, spec, product)
        return stats, Gradients(*_like_operands(gradients, operands, keep_accumulator=spec.dtype == torch.float16))


def _like_operands(gradients: Gradients, operands: Operands, *, keep_accumulator: bool) -> list[Tensor | None]:
    """Gradients in the types of what they belong to, rows of padding zero."""
    result: list[Tensor | None] = []
    for gradient, operand, cast in zip(gradients, operands[:3], CASTS, strict=True):
        if gradient is None or operand is None:
            result.append(None)
            continue
        if not keep_accumulator:
            gradient = cast(gradient, operand.dtype)
        missing = operand.shape[0] - gradient.shape[0]
        result.append(torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])]) if missing else gradient)
    return result


def sums(
    stats: RowStats, operands: Operands, spec: Spec, *, per_token: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The fields of LossSum."""
    weights_N, counted_N = operands.weights_N, operands.counted_N

    def finish(values_N: Tensor, factor_N: Tensor | None) -> Tensor:
        if factor_N is not None:
            values_N = values_N * factor_N.to(values_N.dtype)
        return values_N if per_token else values_N.sum()

    cross_entropy = finish(stats.cross_entropy_N, weights_N)
    total, z_loss = cross_entropy.clone(), None
    if spec.z_loss_multiplier:
        square_N = spec.z_loss_multiplier * stats.lse_N.square()
        z_loss = finish(square_N if stats.class_weight_N is None else square_N * stats.class_weight_N, weights_N)
        total = cross_entropy + z_loss
    if stats.correct_N is None or stats.entropy_N is None:
        return total, cross_entropy, z_loss, None, None
    return total, cross_entropy, z_loss, finish(stats.correct_N, counted_N), finish(stats.entropy_N, counted_N)


class _Summed(torch.autograd.Function):
    """Gradients formed in the forward pass and handed over in the backward pass."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands(*tensors)  # pyright: ignore[reportArgumentType]
        stats, ctx.gradients = compute(operands, spec)
        ctx.spec, ctx.dtypes = spec, _dtypes(operands)
        return _differentiable_first(ctx, sums(stats, operands, spec, per_token=False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * (1 + len(Operands._fields))
        refuse_again("chunked", used=ctx.gradients is None)
        gradients, ctx.gradients = ctx.gradients, None
        return (None, *_scaled(gradients, grad, ctx.spec.scale, ctx.dtypes), None, None, None, None)


def _dtypes(operands: Operands) -> list[torch.dtype | None]:
    """Of the gradients of hidden states, weight and bias."""
    return [None if tensor is None else tensor.dtype for tensor in operands[:3]]


def _differentiable_first(ctx: Any, outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    ctx.mark_non_differentiable(*(value for value in outputs[1:] if value is not None))
    ctx.set_materialize_grads(False)
    return outputs


def _scaled(gradients: Gradients, grad: Tensor, scale: float, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
    """gradients · grad / scale, in place; on a CPU, where asking is free, nothing is done when the two are equal."""
    known = grad.device.type == "cpu" and not torch.compiler.is_compiling()
    as_expected = known and abs(float(grad) / scale - 1) < 2**-23  # one rounding of fp32
    factor = None if as_expected else grad / scale
    result: list[Tensor | None] = []
    for gradient, dtype, cast in zip(gradients, dtypes, CASTS, strict=True):
        if gradient is not None and factor is not None:
            gradient = gradient.mul_(factor)
        result.append(gradient if gradient is None or dtype is None else cast(gradient, dtype))
    return result


class _PerToken(torch.autograd.Function):
    """Losses [N]; the backward pass computes the logits again, now that it knows the gradient of each."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands(*tensors)  # pyright: ignore[reportArgumentType]
        stats, _ = compute(operands, spec.without_gradients())
        ctx.save_for_backward(*tensors)
        ctx.spec = spec
        return _differentiable_first(ctx, sums(stats, operands, spec, per_token=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_N = grads[0]
        if grad_N is None:
            return (None,) * (1 + len(Operands._fields))
        refuse_again("chunked", used=False)
        operands = Operands(*ctx.saved_tensors)
        _, gradients = compute(operands.weighed(grad_N), ctx.spec.for_backward())
        typed = (None if g is None or d is None else g.to(d) for g, d in zip(gradients, _dtypes(operands), strict=True))
        return (None, *typed, None, None, None, None)


def _block_matmul(hidden_ND: Tensor, weight_VD: Tensor, spec: Spec) -> Matmul | None:
    """The product for the blocked kernel, where that kernel is the better one; else None."""
    if hidden_ND.device.type != "cpu" or spec.softcap is not None or spec.classes <= chunked_blocks.BLOCK_COLUMNS:
        return None
    if spec.dtype not in (torch.float32, torch.float64):
        return None
    if spec.dtype == torch.float32 and weight_VD.is_contiguous() and 2 * hidden_ND.shape[0] * weight_VD.numel() >= PROBE_FLOP:
        return onednn.product if onednn.is_faster() else onednn.torch_product
    return onednn.torch_product
