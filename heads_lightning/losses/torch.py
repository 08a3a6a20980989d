"""`torch`: PyTorch's own torch.nn.functional.linear_cross_entropy with its chunked options, where the installed version has it (≥ 2.13).

Kept for comparison. Two of its habits are outside our reach and documented instead: in bf16 its loss is summed and returned in bf16 (8 to
11 % off at V = 8192 in torch 2.13; gradients are usable), and `auto` never picks it while that is so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection
from heads_lightning.losses.foreign import MASKED, guarded, loss_sum, operands
from heads_lightning.losses.once import once

FEATURES = frozenset(
    {
        Feature.bias,
        Feature.padded_vocabulary,
        Feature.class_weights,
        Feature.token_weights,
        Feature.per_token,
        Feature.frozen_hidden,
        Feature.float32,
        Feature.float64,
    }
)


def unavailable() -> str | None:
    """The operator appeared in torch 2.13; asked for by name, not by version."""
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return (
        f"head.loss_implementation=torch needs torch.nn.functional.linear_cross_entropy with options, which torch {torch.__version__} "
        "does not have; head.loss_implementation=chunked computes the same loss"
    )


@guarded("torch", FEATURES, unavailable)
def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    per_token = options.per_token or weights_N is not None
    hidden_ND, weight_VD, bias_V = operands(hidden_ND, projection)
    class_weights_V = None if options.class_weights_V is None else options.class_weights_V.to(hidden_ND.dtype)
    function: Any = torch.nn.functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        loss = function(
            hidden_ND,
            weight_VD,
            labels_N,
            linear_bias=bias_V,
            weight=class_weights_V,
            reduction="none" if per_token else "sum",
            ignore_index=MASKED,
            options=torch.nn.LinearCrossEntropyOptions(),  # pyright: ignore[reportAttributeAccessIssue]
        )
    return loss_sum(once(loss, "torch"), None, weights_N, options)
