"""`fused_linear`: Liger's Triton kernel (liger-kernel 0.8.x), which forms gradients in the forward pass, chunk by chunk, on a GPU.

Called by keyword through its module class (the values its Function returns changed in 0.7 and 0.8) and imported only when used, which takes
seconds. Its traps are routed around:

* a hidden state that needs no gradient loses the weight's: it is made to need one;
* a second backward pass doubles the gradients: refused in words;
* labels are unchecked: the callers of this package check them;
* a z-term is added when nobody asked: the scale is 0.0 when off;
* sums over chunks are in the weight's type unless asked otherwise: asked for fp32.

What it does not do is computed by `chunked`, and the log says so once.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses import chunked
from heads_lightning.losses.base import (
    Feature,
    LossOptions,
    LossSum,
    Projection,
    features_of,
    mask_ignored,
    matmul_dtype,
    report_fallback,
)
from heads_lightning.losses.once import once
from heads_lightning.registry import ConfigError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernel on a CPU, for tests at tiny size; its floats lack a method that the soft cap's code calls."""
FEATURES = frozenset(
    {
        Feature.bias,
        Feature.padded_vocabulary,
        Feature.z_loss,
        Feature.label_smoothing,
        Feature.per_token,
        Feature.token_weights,
        Feature.frozen_hidden,
    }
    | (set() if INTERPRETED else {Feature.softcap})
)
MASKED = -100
"""Label of rows that are to count nothing."""


def unavailable() -> str | None:
    """Liger has to be installed and Triton has to have a device (or its interpreter, TRITON_INTERPRET=1, for tests at tiny size)."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return (
            "head.loss_implementation=fused_linear needs liger-kernel, which is not installed here (pip install liger-kernel; "
            "Linux only); head.loss_implementation=chunked computes the same loss"
        )
    if not (torch.cuda.is_available() or INTERPRETED):
        return (
            "head.loss_implementation=fused_linear needs a GPU that Triton supports, and this machine has none; "
            "head.loss_implementation=chunked computes the same loss"
        )
    return None


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    if reason := unavailable():
        raise ConfigError(reason)
    missing = features_of(hidden_ND, projection, options, weights_N) - FEATURES
    if missing:
        report_fallback("fused_linear", missing)
        return chunked.linear_cross_entropy_sum(hidden_ND, projection, labels_N, options, weights_N)
    ignored_N = None if options.all_targets else labels_N == options.ignore_index
    hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
    if ignored_N is not None:
        labels_N = torch.where(ignored_N, MASKED, labels_N)
    rows = hidden_ND.shape[0]
    if rows == 0:  # Triton cannot launch nothing; one masked row is worth nothing too
        hidden_ND, labels_N = torch.cat([hidden_ND, hidden_ND.new_zeros(1, hidden_ND.shape[1])]), labels_N.new_full((1,), MASKED)
        weights_N = None if weights_N is None else weights_N.new_zeros(1)
    loss = _call(hidden_ND, projection, labels_N, options, weights_N)
    return LossSum(*(value if value is None or value.dim() == 0 else value[:rows] for value in loss))  # pyright: ignore[reportArgumentType]


def _call(hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None) -> LossSum:
    per_token = options.per_token or weights_N is not None
    loss_module = _liger()(
        ignore_index=MASKED,
        lse_square_scale=options.z_loss_multiplier,
        label_smoothing=options.label_smoothing,
        reduction="none" if per_token else "sum",
        softcap=projection.softcap,
        return_z_loss=options.z_loss_multiplier != 0,
        accum_dtype=torch.float32,
    )
    hidden_ND, weight_VD, bias_V = _operands(hidden_ND, projection)
    result = loss_module(weight_VD, hidden_ND, labels_N, bias=bias_V)
    total, z_loss = (result, None) if isinstance(result, Tensor) else (result.loss, result.z_loss.detach().float())
    if not per_token:  # losses per token are recomputed in the backward pass, which may be repeated
        total = once(total, "fused_linear")
    total = total.float()
    if weights_N is not None:
        total, z_loss = total * weights_N, None if z_loss is None else z_loss * weights_N
    if per_token and not options.per_token:
        total, z_loss = total.sum(), None if z_loss is None else z_loss.sum()
    cross_entropy = total.detach() if z_loss is None else total.detach() - z_loss
    return LossSum(total, cross_entropy, z_loss)


def _operands(hidden_ND: Tensor, projection: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands in the type of the product; a frozen hidden state is made to want a gradient, without which Liger forms none."""
    dtype = matmul_dtype(hidden_ND, projection.weight_VD)
    weight_VD = projection.weight_VD[: projection.classes].to(dtype)
    bias_V = None if projection.bias_V is None else projection.bias_V[: projection.classes].to(dtype)
    hidden_ND = hidden_ND.to(dtype).contiguous()
    trains = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if torch.is_grad_enabled() and trains and not hidden_ND.requires_grad:
        hidden_ND = hidden_ND.detach().requires_grad_()
    return hidden_ND, weight_VD, bias_V


@cache
def _liger() -> Any:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss
