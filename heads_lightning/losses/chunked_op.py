"""`chunked` under torch.compile: one opaque operator, so that the graph does not break, with its own gradient.

The eager path stays an autograd.Function, which can give its gradients away instead of keeping them: an operator's outputs are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses import chunked
from heads_lightning.losses.base import loss_dtype
from heads_lightning.losses.chunked_kernels import Operands, Spec

STATIC = Spec._fields.index("shard")
"""The fields of Spec before this one are the operators' arguments, after those of Operands."""
ARGUMENTS = (
    "Tensor hidden_ND, Tensor weight_VD, Tensor? bias_V, Tensor labels_N, Tensor? weights_N, Tensor? class_weights_V, Tensor? counted_N, "
    "float z_loss_multiplier, float label_smoothing, float? softcap, SymInt classes, bool token_metrics, "
    "bool need_dx, bool need_dw, bool need_db, ScalarType dtype, float scale"
)
LOSSES, GRADIENTS = 5, 3


def compiled(operands: Operands, spec: Spec, *, per_token: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The fields of LossSum."""
    total, *parts = forward(*operands, *spec[:STATIC], per_token)[:LOSSES]
    wanted = (True, bool(spec.z_loss_multiplier), spec.token_metrics, spec.token_metrics)
    cross_entropy, *optional = (part.detach() if want else None for part, want in zip(parts, wanted, strict=True))
    assert cross_entropy is not None
    return total, cross_entropy, *optional  # pyright: ignore[reportReturnType]


def _read(arguments: Sequence[Any]) -> tuple[Operands, Spec]:
    return Operands(*arguments[: len(Operands._fields)]), Spec(*arguments[len(Operands._fields) :])


def _filled(values: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """An operator returns tensors: what is not asked for is empty."""
    return tuple(like.new_empty(0, dtype=dtype) if value is None else value for value in values)


@torch.library.custom_op(
    "heads_lightning::chunked_linear_cross_entropy",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool per_token) -> ({', '.join(['Tensor'] * (LOSSES + GRADIENTS))})",
)
def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """(total, cross-entropy, z-loss, correct, entropy, dX, dW, db)."""
    (operands, spec), per_token = _read(arguments[:-1]), arguments[-1]
    stats, gradients = chunked.compute(operands, spec.without_gradients() if per_token else spec)
    losses = chunked.sums(stats, operands, spec, per_token=per_token)
    return _filled((*losses, *gradients), operands.hidden_ND, loss_dtype(spec.dtype))


@forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    (operands, spec), per_token = _read(arguments[:-1]), arguments[-1]
    maths = loss_dtype(spec.dtype)
    shape = (operands.hidden_ND.shape[0],) if per_token else ()
    wanted = (True, True, bool(spec.z_loss_multiplier), spec.token_metrics, spec.token_metrics)
    losses = [operands.hidden_ND.new_empty(shape, dtype=maths) if want else None for want in wanted]
    kept = maths if spec.dtype == torch.float16 else None
    gradients = [None if per_token or t is None else t.new_empty(t.shape, dtype=kept) for t in _differentiated(operands, spec)]
    return _filled((*losses, *gradients), operands.hidden_ND, maths)


def _differentiated(operands: Operands, spec: Spec) -> list[Tensor | None]:
    """Hidden states, weight and bias: those whose gradient is asked for."""
    wanted = (spec.need_dx, spec.need_dw, spec.need_db)
    return [operand if want else None for operand, want in zip(operands[:GRADIENTS], wanted, strict=True)]


@torch.library.custom_op(
    "heads_lightning::chunked_linear_cross_entropy_backward", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """(dX, dW, db) of Σ weights_N · loss_N."""
    operands, spec = _read(arguments)
    _, gradients = chunked.compute(operands, spec)
    typed = [None if g is None or o is None else g.to(o.dtype) for g, o in zip(gradients, operands[:GRADIENTS], strict=True)]
    return _filled(typed, operands.hidden_ND, operands.hidden_ND.dtype)


@backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands, spec = _read(arguments)
    like = [None if t is None else torch.empty_like(t) for t in _differentiated(operands, spec)]
    return _filled(like, operands.hidden_ND, operands.hidden_ND.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (operands, ctx.spec), ctx.per_token = _read(inputs[:-1]), inputs[-1]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in operands[:GRADIENTS])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(operands if ctx.per_token else output[LOSSES:]))


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    spec, arguments = ctx.spec, len(Operands._fields) + STATIC + 1
    if grad is None:
        return (None,) * arguments
    if ctx.per_token:
        operands = Operands(*ctx.saved_tensors).weighed(grad)
        gradients = backward(*operands, *spec.for_backward()[:STATIC])
    else:
        factor = grad / spec.scale
        gradients = [(g * factor).to(dtype or g.dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    needed = (spec.need_dx, spec.need_dw, spec.need_db)
    formed = [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]
    return (*formed, *(None,) * (arguments - GRADIENTS))


forward.register_autograd(_differentiate, setup_context=_keep)
