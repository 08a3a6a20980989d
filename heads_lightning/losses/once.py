"""A guard for losses whose gradients exist once: a second backward pass, which would return wrong ones silently, is refused in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, name: str) -> Tensor:
        ctx.name, ctx.used = name, False
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_again(ctx.name, used=ctx.used)
        ctx.used = True
        return grads[0], None


def once(loss: Tensor, name: str) -> Tensor:
    """The same loss, which can be differentiated once."""
    return _Once.apply(loss, name)


def refuse_again(name: str, *, used: bool) -> None:
    """Raise when a backward pass of implementation `name` is a repetition, or is itself to be differentiated."""
    if used:
        raise RuntimeError(
            f"{name} hands its gradients over in the first backward pass and cannot repeat it; "
            "use head.loss_implementation=default to backward twice (retain_graph)"
        )
    if torch.is_grad_enabled():  # autograd runs a backward pass with gradients on for create_graph alone
        raise RuntimeError(f"{name} has no second derivative (create_graph); use head.loss_implementation=default for that")
