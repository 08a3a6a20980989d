"""What only a GPU can show: kernels against `default` in fp32, in the types and at the sizes that they are for. Skipped without one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import linear_cross_entropy, unavailable

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
IMPLEMENTATIONS = [name.value for name in LMLossImplementation]
N, D, V = 300, 128, 1000
ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Of sums of 128 products in TF32 (Triton's fp32) and in bf16."""


def results(implementation: str, dtype: torch.dtype, *, frozen: str, **options: Any) -> list[torch.Tensor]:
    """Loss and gradients, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    leaves = {
        name: (torch.randn(shape, generator=generator) * 0.3).to("cuda", torch.bfloat16).to(dtype).requires_grad_(name != frozen)
        for name, shape in (("hidden", (N, D)), ("weight", (V, D)))
    }
    labels = torch.randint(0, V, (N,), generator=generator).cuda()
    labels[::7] = -100
    loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, implementation=implementation, **options).total
    loss.sum().backward()
    return [loss.detach().float(), *(leaf.grad.float() for leaf in leaves.values() if leaf.grad is not None)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "per_token": {"reduction": "none"},
    "z_loss": {"z_loss_multiplier": 1e-3},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "known number of targets": {"num_targets": N - len(range(0, N, 7))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_and_gradients(implementation: str, dtype: torch.dtype) -> None:
    """Frozen trunks and frozen heads too."""
    if reason := unavailable(implementation):
        pytest.skip(reason)
    if implementation == "torch" and dtype == torch.bfloat16:
        pytest.skip("PyTorch sums its loss in bf16: documented, and never chosen by auto")
    for (name, options), frozen in itertools.product(OPTIONS.items(), ("", "hidden", "weight")):
        got = results(implementation, dtype, frozen=frozen, **options)
        want = results("default", torch.float32, frozen=frozen, **options)
        assert len(got) == len(want) == (3 if not frozen else 2), (name, frozen)
        for ours, theirs in zip(got, want, strict=True):
            assert (ours - theirs).norm() <= ROUNDING[dtype] * theirs.norm(), (name, frozen)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_is_not_that_of_the_logits(implementation: str) -> None:
    if (reason := unavailable(implementation)) or implementation == "default":
        pytest.skip(reason or "it holds the logits")
    n, d, v = 16384, 256, 65536
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, v, (n,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, implementation=implementation, num_targets=n).total.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.5 * n * v * 2


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name in ("fused_linear", "cce")])
def test_tensors_elsewhere_are_refused_in_words(implementation: str) -> None:
    if reason := unavailable(implementation):
        pytest.skip(reason)
    with pytest.raises(ValueError, match=r"computes on a GPU, not on cpu; head\.loss_implementation=chunked"):
        linear_cross_entropy(torch.randn(4, 8), torch.randn(9, 8), torch.arange(4), implementation=implementation)
