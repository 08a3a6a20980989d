"""`fused_linear`: Liger's Triton kernel (liger-kernel 0.8.x), which forms gradients in the forward pass, chunk by chunk, on a GPU.

Called by keyword through its module class (the values its Function returns changed in 0.7 and 0.8) and imported only when used, which takes
seconds. Its traps are routed around:

* a hidden state that needs no gradient loses the weight's: it is made to need one;
* a second backward pass doubles the gradients: refused in words;
* labels are unchecked: the callers of this package check them;
* a z-term is added when nobody asked: the scale is 0.0 when off;
* sums over chunks are in the weight's type unless asked otherwise: asked for fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection
from heads_lightning.losses.foreign import INTERPRETED, MASKED, guarded, loss_sum, operands, triton_unavailable
from heads_lightning.losses.once import once

FEATURES = frozenset(
    {
        Feature.bias,
        Feature.padded_vocabulary,
        Feature.z_loss,
        Feature.label_smoothing,
        Feature.per_token,
        Feature.token_weights,
        Feature.frozen_hidden,
        Feature.float32,
    }
    | (set() if INTERPRETED else {Feature.softcap})
)


def unavailable() -> str | None:
    """Liger has to be installed and Triton has to have a device (or its interpreter, TRITON_INTERPRET=1, for tests at tiny size)."""
    return triton_unavailable("fused_linear", "liger_kernel", "pip install liger-kernel; Linux only")


@guarded("fused_linear", FEATURES, unavailable, on_gpu=True)
def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
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
    hidden_ND, weight_VD, bias_V = operands(hidden_ND, projection)
    trains = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if torch.is_grad_enabled() and trains and not hidden_ND.requires_grad:  # without which Liger forms no gradient at all
        hidden_ND = hidden_ND.detach().requires_grad_()
    result = loss_module(weight_VD, hidden_ND, labels_N, bias=bias_V)
    total, z_loss = (result, None) if isinstance(result, Tensor) else (result.loss, result.z_loss)
    if not per_token:  # losses per token are recomputed in the backward pass, which may be repeated
        total = once(total, "fused_linear")
    return loss_sum(total, z_loss, weights_N, options)


@cache
def _liger() -> Any:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss
