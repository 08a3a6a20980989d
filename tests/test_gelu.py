"""GELU and its product against torch's, values and derivatives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from heads_lightning.backbones.gelu import gelu_tanh, gelu_tanh_product


def test_gelu_by_a_sigmoid_is_gelu() -> None:
    """No farther from the exact number than torch's own, up to a rounding; its two derivatives too."""
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([1e-20, -1e4, 1e4])))
    found = []
    for gelu, kind in (
        (partial(F.gelu, approximate="tanh"), torch.float64),
        (partial(F.gelu, approximate="tanh"), x.dtype),
        (gelu_tanh, x.dtype),
    ):
        given = x.to(kind).requires_grad_()
        y = gelu(given)
        (first,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        found.append((y, first, *torch.autograd.grad(first.sum(), given)))
    for exact, theirs, ours in zip(*found, strict=True):
        scale = exact.abs().clamp(min=1)
        assert ((ours - exact).abs() / scale).max() <= ((theirs - exact).abs() / scale).max() + 1e-6


def test_the_first_derivative_of_gelu_is_as_exact_as_torchs() -> None:
    """And those of the product of two, in blocks of which the last is smaller; also where x³ overflows."""
    generator, theirs = torch.Generator().manual_seed(0), partial(F.gelu, approximate="tanh")
    a, b = (2 * torch.randn(3, 100_001, generator=generator) for _ in range(2))
    a[0, :4] = torch.tensor([1e4, -1e4, 1e15, -1e15])
    found = []
    for gelu, product, kind in (
        (theirs, lambda x, y: theirs(x) * theirs(y), torch.float64),
        (theirs, lambda x, y: theirs(x) * theirs(y), torch.float32),
        (gelu_tanh, gelu_tanh_product, torch.float32),
    ):
        given = [x.to(kind).requires_grad_() for x in (a, b)]
        both, alone = product(*given), gelu(given[0])
        found.append((both, *torch.autograd.grad(alone.sum(), given[0]), *torch.autograd.grad(both.sum(), given)))
    for exact, torchs, ours in zip(*found, strict=True):
        scale = exact.abs().clamp(min=1)
        assert ((ours - exact).abs() / scale).max() <= ((torchs - exact).abs() / scale).max() + 1e-6
    exact, _, ours = (derivatives for _, derivatives, *_ in found)
    assert (ours - exact).abs().max() <= 4 * 2**-23  # a few roundings
    with torch.no_grad():
        assert torch.equal(gelu_tanh_product(a, b), gelu_tanh(a) * gelu_tanh(b))
    assert torch.equal(gelu_tanh_product(a.T.requires_grad_(), b.T).T, gelu_tanh_product(a.requires_grad_(), b))
    x = a[:, :5].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gelu_tanh_product(x, x).sum(), x, create_graph=True)
