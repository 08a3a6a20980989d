"""`chunked` under torch.compile: one opaque operator, so that the graph does not break, with its own gradient.

The eager path stays an autograd.Function, which can give its gradients away instead of keeping them: an operator's outputs are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses import chunked
from heads_lightning.losses.base import loss_dtype
from heads_lightning.losses.chunked_kernels import Spec

Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compiled(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor | None,
    class_weights_V: Tensor | None,
    counted_N: Tensor | None,
    spec: Spec,
    *,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The fields of LossSum."""
    tensors = (hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V, counted_N)
    total, cross_entropy, z_loss, correct, entropy, *_ = forward(*tensors, *spec[:-1], per_token)
    metrics = (correct.detach(), entropy.detach()) if spec.token_metrics else (None, None)
    return total, cross_entropy.detach(), z_loss.detach() if spec.z_loss_multiplier else None, *metrics


@torch.library.custom_op("heads_lightning::chunked_linear_cross_entropy", mutates_args=())
def forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor | None,
    class_weights_V: Tensor | None,
    counted_N: Tensor | None,
    z_loss_multiplier: float,
    label_smoothing: float,
    softcap: float | None,
    classes: int,
    token_metrics: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dtype: torch.dtype,
    scale: float,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, cross-entropy, z-loss, correct, entropy, dX, dW, db); what is not asked for is empty."""
    spec = Spec(z_loss_multiplier, label_smoothing, softcap, classes, token_metrics, need_dx, need_dw, need_db, dtype, scale)
    if per_token:
        spec = spec._replace(need_dx=False, need_dw=False, need_db=False)
    stats, gradients = chunked.compute(hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V, spec)
    outputs = chunked.sums(stats, weights_N, counted_N, spec, per_token=per_token)
    return _filled((*outputs, *gradients), hidden_ND, loss_dtype(dtype))


def _filled(values: tuple[Tensor | None, ...], like: Tensor, dtype: torch.dtype) -> Eight:
    return tuple(like.new_empty(0, dtype=dtype) if value is None else value for value in values)  # pyright: ignore[reportReturnType]


@forward.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor | None,
    class_weights_V: Tensor | None,
    counted_N: Tensor | None,
    z_loss_multiplier: float,
    label_smoothing: float,
    softcap: float | None,
    classes: int,
    token_metrics: bool,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dtype: torch.dtype,
    scale: float,
    per_token: bool,
) -> Eight:
    maths = loss_dtype(dtype)
    shape = (hidden_ND.shape[0],) if per_token else ()

    def loss(wanted: bool) -> Tensor | None:
        return hidden_ND.new_empty(shape, dtype=maths) if wanted else None

    parts = (loss(True), loss(True), loss(bool(z_loss_multiplier)), loss(token_metrics), loss(token_metrics))
    gradients: list[Tensor | None] = []
    for operand, needed in ((hidden_ND, need_dx), (weight_VD, need_dw), (bias_V, need_db)):
        formed = operand is not None and needed and not per_token
        kept = maths if dtype == torch.float16 else None
        gradients.append(operand.new_empty(operand.shape, dtype=kept) if operand is not None and formed else None)
    return _filled((*parts, *gradients), hidden_ND, maths)


@torch.library.custom_op("heads_lightning::chunked_linear_cross_entropy_backward", mutates_args=())
def backward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor,
    class_weights_V: Tensor | None,
    z_loss_multiplier: float,
    label_smoothing: float,
    softcap: float | None,
    classes: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db) of Σ weights_N · loss_N; what is not asked for is empty."""
    spec = Spec(z_loss_multiplier, label_smoothing, softcap, classes, False, need_dx, need_dw, need_db, dtype, 1.0)
    _, gradients = chunked.compute(hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V, spec)
    operands = (hidden_ND, weight_VD, bias_V)
    typed = (
        hidden_ND.new_empty(0) if g is None or o is None else g.to(o.dtype, copy=False) for g, o in zip(gradients, operands, strict=True)
    )
    return tuple(typed)  # pyright: ignore[reportReturnType]


@backward.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    weights_N: Tensor,
    class_weights_V: Tensor | None,
    z_loss_multiplier: float,
    label_smoothing: float,
    softcap: float | None,
    classes: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((hidden_ND, need_dx), (weight_VD, need_dw), (bias_V, need_db))
    return tuple(  # pyright: ignore[reportReturnType]
        torch.empty_like(operand) if operand is not None and needed else hidden_ND.new_empty(0) for operand, needed in wanted
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Eight) -> None:
    hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V, _ = inputs[:7]
    ctx.spec, ctx.per_token = Spec(*inputs[7:-1]), inputs[-1]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V))
    ctx.set_materialize_grads(False)
    if ctx.per_token:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V)
    else:
        ctx.save_for_backward(*output[5:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    spec = ctx.spec
    needed = (spec.need_dx, spec.need_dw, spec.need_db)
    if grad is None:
        return (None,) * 18
    if ctx.per_token:
        hidden_ND, weight_VD, bias_V, labels_N, weights_N, class_weights_V = ctx.saved_tensors
        row_grad_N = grad if weights_N is None else grad * weights_N
        arguments = (spec.z_loss_multiplier, spec.label_smoothing, spec.softcap, spec.classes, *needed, spec.dtype)
        gradients = backward(hidden_ND, weight_VD, bias_V, labels_N, row_grad_N, class_weights_V, *arguments)
    else:
        factor = grad / spec.scale
        gradients = [(g * factor).to(dtype or g.dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return (*(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *(None,) * 15)


forward.register_autograd(_differentiate, setup_context=_keep)
