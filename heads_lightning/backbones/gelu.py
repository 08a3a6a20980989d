"""GELU in its tanh approximation, x/2·(1 + tanh u) with u = √(2/π)·(x + 0.044715·x³), as the same number x·σ(2u).

On a CPU torch's tanh is slow and its sigmoid is not: in fp32 the forward pass takes 0.4 of F.gelu's time. The backward pass is F.gelu's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh")."""
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32
    return _GeluTanh.apply(x) if plain and not torch.compiler.is_compiling() else F.gelu(x, approximate="tanh")


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mul_(CUBIC).add_(LINEAR).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grads[0], *ctx.saved_tensors, approximate="tanh")
