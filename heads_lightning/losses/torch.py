"""`torch`: PyTorch's own torch.nn.functional.linear_cross_entropy with its chunked options, where the installed version has it (≥ 2.13).

Kept for comparison. Two of its habits are outside our reach and documented instead: in bf16 its loss is summed and returned in bf16 (8 to
11 % off at V = 8192 in torch 2.13; gradients are usable), and `auto` never picks it while that is so. What it does not do is computed by
`chunked`, and the log says so once.
"""

from __future__ import annotations

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
    loss_dtype,
    mask_ignored,
    matmul_dtype,
    report_fallback,
)
from heads_lightning.losses.once import once
from heads_lightning.registry import ConfigError

FEATURES = frozenset(
    {
        Feature.bias,
        Feature.padded_vocabulary,
        Feature.class_weights,
        Feature.token_weights,
        Feature.per_token,
        Feature.frozen_hidden,
        Feature.float64,
    }
)
MASKED = -100


def unavailable() -> str | None:
    """The operator appeared in torch 2.13; asked for by name, not by version."""
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return (
        f"head.loss_implementation=torch needs torch.nn.functional.linear_cross_entropy with options, which torch {torch.__version__} "
        "does not have; head.loss_implementation=chunked computes the same loss"
    )


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    if reason := unavailable():
        raise ConfigError(reason)
    missing = features_of(hidden_ND, projection, options, weights_N) - FEATURES
    if missing:
        report_fallback("torch", missing)
        return chunked.linear_cross_entropy_sum(hidden_ND, projection, labels_N, options, weights_N)
    ignored_N = None if options.all_targets else labels_N == options.ignore_index
    hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
    if ignored_N is not None:
        labels_N = torch.where(ignored_N, MASKED, labels_N)
    per_token = options.per_token or weights_N is not None
    loss = once(_call(hidden_ND, projection, labels_N, options, "none" if per_token else "sum"), "torch").to(loss_dtype(hidden_ND.dtype))
    if weights_N is not None:
        loss = loss * weights_N
    total = loss.sum() if per_token and not options.per_token else loss
    return LossSum(total, total.detach(), None)


def _call(hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, reduction: str) -> Tensor:
    dtype = matmul_dtype(hidden_ND, projection.weight_VD)
    classes = slice(projection.classes)
    weight_VD = projection.weight_VD[classes].to(dtype)
    bias_V = None if projection.bias_V is None else projection.bias_V[classes].to(dtype)
    class_weights_V = None if options.class_weights_V is None else options.class_weights_V.to(dtype)
    function: Any = torch.nn.functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return function(
            hidden_ND.to(dtype),
            weight_VD,
            labels_N,
            linear_bias=bias_V,
            weight=class_weights_V,
            reduction=reduction,
            ignore_index=MASKED,
            options=torch.nn.LinearCrossEntropyOptions(),  # pyright: ignore[reportAttributeAccessIssue]
        )
