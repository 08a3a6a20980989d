"""What the checks share: how near is near, gradients of everything, and what holds of every module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Largest error relative to the norm. fp32: thirty times the rounding of sums over a few thousand terms; bf16: two units of it."""
Device = torch.device | str


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: object) -> None:
    """Refuse a difference whose norm is more than `tolerance` of the norm of `want`."""
    error, size = (got.detach().double() - want.detach().double()).norm(), want.detach().double().norm()
    assert bool(error <= tolerance * size + 1e-12), f"{what}: relative error {float(error / size):.1e} is more than {tolerance}"


def gradients(loss: Tensor, leaves: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Of every leaf; zeros where none arrives."""
    found = torch.autograd.grad(loss, leaves, upstream.to(loss), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def check_module(build: Callable[[str], nn.Module], num_params: int) -> None:
    """Built on meta, materialised and reset equals built directly; its numbers come from the generator; its size is as declared."""
    here, late = build("cpu"), build("meta")
    assert all(t.is_meta for t in (*late.parameters(), *late.buffers())), "init_device=meta must leave every parameter and buffer on meta"
    built = sum(p.numel() for p in late.parameters())
    assert built == num_params, f"num_params says {num_params}, but {built} are built"
    late.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*late.parameters(), *late.buffers()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 99)
    for module in (here, late):
        module.reset_parameters(torch.Generator().manual_seed(3))  # pyright: ignore[reportCallIssue]
    for (name, a), b in zip(here.state_dict().items(), late.state_dict().values(), strict=True):
        assert bool(b.isfinite().all()), f"reset_parameters leaves {name} as to_empty made it"
        assert torch.equal(a, b), f"{name} does not come from reset_parameters' generator alone"
    late.reset_parameters(torch.Generator().manual_seed(4))  # pyright: ignore[reportCallIssue]
    matrices = [torch.equal(a, b) for a, b in zip(here.parameters(), late.parameters(), strict=True) if a.ndim > 1]
    assert not matrices or not all(matrices), "another generator gives the same matrices"
