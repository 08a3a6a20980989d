"""What the implementations that others wrote (`fused_linear`, `cce`, `torch`) share: when they are asked, with what, and what is made of
their answer.

One that cannot run here is refused in words. What it does not do is computed by `chunked`, and the log says so once. It is never handed a
row that could hurt: rows without a target are zeros labelled MASKED, and nothing at all is the business of `default`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from heads_lightning.losses import chunked, default
from heads_lightning.losses.base import (
    Feature,
    LossImplementation,
    LossOptions,
    LossSum,
    Projection,
    features_of,
    loss_dtype,
    mask_ignored,
    matmul_dtype,
    report_fallback,
)
from heads_lightning.registry import ConfigError

MASKED = -100
"""Label of rows that are to count nothing."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs GPU kernels on a CPU, for tests at tiny size. It knows neither tanh nor log1p."""
INSTEAD = "head.loss_implementation=chunked computes the same loss"


def triton_unavailable(name: str, package: str, install: str) -> str | None:
    """Why an implementation made of Triton kernels cannot run on this machine."""
    if any(importlib.util.find_spec(needed) is None for needed in (package, "triton")):
        distribution = package.replace("_", "-")
        return f"head.loss_implementation={name} needs {distribution}, which is not installed here ({install}); {INSTEAD}"
    if not (torch.cuda.is_available() or INTERPRETED):
        return f"head.loss_implementation={name} needs a GPU that Triton supports, and this machine has none; {INSTEAD}"
    return None


def guarded(
    name: str, native: frozenset[Feature], unavailable: Callable[[], str | None], *, on_gpu: bool = False
) -> Callable[[LossImplementation], LossImplementation]:
    """Decorator of a linear_cross_entropy_sum that does no more than `native` features, on a GPU alone where it says so."""

    def decorate(compute: LossImplementation) -> LossImplementation:
        @wraps(compute)
        def linear_cross_entropy_sum(
            hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
        ) -> LossSum:
            if reason := unavailable():
                raise ConfigError(reason)
            if on_gpu and not (hidden_ND.is_cuda or INTERPRETED):
                raise ConfigError(f"head.loss_implementation={name} computes on a GPU, not on {hidden_ND.device}; {INSTEAD}")
            if missing := features_of(hidden_ND, projection, options, weights_N) - native:
                report_fallback(name, missing)
                return chunked.linear_cross_entropy_sum(hidden_ND, projection, labels_N, options, weights_N)
            if hidden_ND.shape[0] == 0:
                return default.linear_cross_entropy_sum(hidden_ND, projection, labels_N, options, weights_N)
            ignored_N = None if options.all_targets else labels_N == options.ignore_index
            hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
            if ignored_N is not None:
                labels_N = torch.where(ignored_N, MASKED, labels_N)
            return compute(hidden_ND, projection, labels_N, options, weights_N)

        return linear_cross_entropy_sum

    return decorate


def operands(hidden_ND: Tensor, projection: Projection) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias in the type of the product, without the padding of the vocabulary."""
    dtype, classes = matmul_dtype(hidden_ND, projection.weight_VD), slice(projection.classes)
    bias_V = None if projection.bias_V is None else projection.bias_V[classes].to(dtype)
    return hidden_ND.to(dtype).contiguous(), projection.weight_VD[classes].to(dtype), bias_V


def loss_sum(loss: Tensor, z_loss: Tensor | None, weights_N: Tensor | None, options: LossOptions) -> LossSum:
    """LossSum of losses [N], or of their sum where nothing weighs them; z_loss is the part of `loss` that it is."""

    def finish(value: Tensor) -> Tensor:
        value = value.to(loss_dtype(value.dtype))
        value = value if weights_N is None else value * weights_N
        return value if options.per_token else value.sum()

    total, z_part = finish(loss), None if z_loss is None else finish(z_loss.detach())
    return LossSum(total, total.detach() if z_part is None else total.detach() - z_part, z_part)
