"""Inputs of a loss, what an implementation makes of them, and the reference in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from heads_lightning.losses import Feature, Projection, linear_cross_entropy, loss_module
from heads_lightning.testing.base import assert_near
from heads_lightning.testing.losses import reference_logits, reference_loss

N, D, V = 41, 16, 101


class Case(NamedTuple):
    """The inputs of one loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    weights: Tensor | None
    class_weights: Tensor | None


def make_case(
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    masked: float = 0.3,
    weights: bool = False,
    class_weights: bool = False,
    n: int = N,
    v: int = V,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g).to(dtype)
    weight = (torch.randn(v, D, generator=g) * 0.5).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < masked] = -100
    maths = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        hidden,
        weight,
        torch.randn(v, generator=g).to(dtype) if bias else None,
        labels,
        torch.rand(n, generator=g, dtype=maths) if weights else None,
        torch.rand(v, generator=g, dtype=maths) + 0.5 if class_weights else None,
    )


class Result(NamedTuple):
    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    correct: Tensor
    entropy: Tensor
    grads: dict[str, Tensor]


def reference(case: Case, *, reduction: str, z: float, smoothing: float, softcap: float | None, upstream: Tensor | None) -> Result:
    """The definition in losses/base.py (testing.losses.reference_loss), reduced; gradients by autograd."""
    leaves = {
        k: getattr(case, k).detach().double().clone().requires_grad_() for k in ("hidden", "weight", "bias") if getattr(case, k) is not None
    }
    logits = reference_logits(leaves["hidden"], Projection(leaves["weight"], leaves.get("bias"), softcap))
    total, ce, z_loss, hits, entropy = reference_loss(
        logits, case.labels, z=z, smoothing=smoothing, weights_N=case.weights, classes_V=case.class_weights
    )
    if reduction != "none":
        counted = case.labels[case.labels != -100]
        targets = len(counted) if case.class_weights is None else float(case.class_weights.double()[counted].sum())
        divide = targets or 1.0 if reduction == "mean" else 1.0
        total, ce, z_loss, hits, entropy = total.sum() / divide, ce.sum() / divide, z_loss.sum() / divide, hits.sum(), entropy.sum()
    total.backward(torch.ones_like(total) if upstream is None else upstream.double())
    return Result(total.detach(), ce, z_loss, hits, entropy, {k: v.grad for k, v in leaves.items()})


def run(implementation: str, case: Case, *, frozen: str = "", upstream: Tensor | None = None, **options: Any) -> Result:
    leaves = {
        k: None if getattr(case, k) is None else getattr(case, k).detach().clone().requires_grad_(k != frozen)
        for k in ("hidden", "weight", "bias")
    }
    loss = linear_cross_entropy(
        leaves["hidden"],
        leaves["weight"],
        case.labels,
        bias=leaves["bias"],
        weights=case.weights,
        class_weights=case.class_weights,
        implementation=implementation,
        token_metrics=Feature.token_metrics in loss_module(implementation).FEATURES,
        **options,
    )
    loss.total.backward(torch.ones_like(loss.total) if upstream is None else upstream.to(loss.total.dtype))
    z_loss = torch.zeros_like(loss.total) if loss.z_loss is None else loss.z_loss
    grads = {k: v.grad for k, v in leaves.items() if v is not None and v.grad is not None}
    unknown = torch.full_like(loss.total, torch.nan)
    correct, entropy = (unknown if value is None else value for value in (loss.correct, loss.entropy))
    return Result(loss.total.detach(), loss.cross_entropy, z_loss, correct, entropy, grads)


def assert_same(got: Result, want: Result, tolerance: float, what: object, *, metrics: bool = True) -> None:
    metrics = metrics and not bool(got.correct.isnan().any())  # NaN: not asked for, as the implementation has none
    for name in ("total", "cross_entropy", "z_loss", *(("correct", "entropy") if metrics else ())):
        assert_near(getattr(got, name), getattr(want, name), tolerance, (what, name))
    for name, grad in got.grads.items():
        assert_near(grad, want.grads[name], tolerance, (what, "gradient of", name))
