"""GELU in its tanh approximation, x/2·(1 + tanh u) with u = √(2/π)·(x + 0.044715·x³), as the same number x·σ(z) with z = 2u.

On a CPU torch's tanh is slow and its sigmoid is not. The derivative is σ(z) + x·dz/dx·σ(z)·(1 − σ(z)), with dz/dx = LINEAR + 3·CUBIC·x².
What is not plain (`is_plain`) goes to torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
BLOCK = 2**18
"""Numbers of each tensor that are worked on at a time: what lies between the passes over them stays in cache."""
_LINEAR = torch.tensor(LINEAR)


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh")."""
    return _Gelu.apply(x) if is_plain(x) else F.gelu(x, approximate="tanh")


def gelu_tanh_product(a: Tensor, b: Tensor) -> Tensor:
    """gelu_tanh(a) * gelu_tanh(b) for tensors of one shape. Keeps two derivatives for the backward pass in place of four factors."""
    if torch.is_grad_enabled() and is_plain(a) and is_plain(b):
        return _Product.apply(a.contiguous(), b.contiguous())
    return gelu_tanh(a) * gelu_tanh(b)


def is_plain(x: Tensor) -> bool:
    """Whether it is computed here: a plain fp32 tensor on a CPU, not under torch.compile."""
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _argument(x: Tensor) -> Tensor:
    """z."""
    return torch.addcmul(_LINEAR, x, x, value=CUBIC).mul_(x)


def _derivative(x: Tensor, z: Tensor, sigmoid: Tensor, out: Tensor | None = None) -> Tensor:
    """Of x·σ(z); z is used up. 1 − σ(z) as σ(−z): where σ(z) is nearly 1, its rounding would be multiplied by a large x·dz/dx. By x in the
    end: x³ overflows long before x², and the other factors are 0 by then."""
    slope = torch.addcmul(_LINEAR, x, x, value=3 * CUBIC, out=out).mul_(sigmoid)
    return slope.mul_(z.neg_().sigmoid_()).mul_(x).add_(sigmoid)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _argument(x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        z = _argument(x)
        return _derivative(x, z, z.sigmoid()).mul_(grads[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        y, by_a, by_b = (torch.empty_like(a) for _ in range(3))
        for part_a, part_b, out, out_a, out_b in zip(*(x.view(-1).split(BLOCK) for x in (a, b, y, by_a, by_b)), strict=True):
            z_a, z_b = _argument(part_a), _argument(part_b)
            gelu_a, gelu_b = z_a.sigmoid(), z_b.sigmoid()
            _derivative(part_a, z_a, gelu_a, out_a)
            _derivative(part_b, z_b, gelu_b, out_b)
            torch.mul(gelu_a.mul_(part_a), gelu_b.mul_(part_b), out=out)
            out_a.mul_(gelu_b)
            out_b.mul_(gelu_a)
        ctx.save_for_backward(by_a, by_b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # what is kept does not say how it changes: the result would be a constant
            raise RuntimeError("the product of two GELUs (gelu_tanh_product) has no second derivative")
        by_a, by_b = ctx.saved_tensors
        return by_a * grads[0], by_b * grads[0]
