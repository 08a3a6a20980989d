"""What is alive at a time, counted storage by storage: no loss holds more than it says, and `chunked` never holds the logits."""

from __future__ import annotations

import pytest
import torch

from heads_lightning import onednn
from heads_lightning.losses import chunked, kept, linear_cross_entropy
from heads_lightning.losses.memory import loss_memory_bytes
from heads_lightning.testing.memory import PeakMemory


def measure(implementation: str, n: int, d: int, v: int, dtype: torch.dtype, masked: float = 0.0) -> int:
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(0, v, (n,))
    labels[torch.rand(n) < masked] = -100
    onednn.is_faster()  # asked once a process, which is no part of a loss
    with PeakMemory() as peak:
        linear_cross_entropy(hidden, weight, labels, implementation=implementation).total.backward()
    return peak.bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["default", "chunked", "auto"])
@pytest.mark.parametrize("workspace", [4 << 20, 1 << 20])
@pytest.mark.parametrize(("n", "d", "v"), [(512, 64, 8192), (192, 256, 6144), (2048, 64, 8192)])
def test_the_estimate_is_within_a_tenth(
    implementation: str, dtype: torch.dtype, n: int, d: int, v: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(kept, "_room", [])
    monkeypatch.setattr(kept, "_returned", {})
    for module in ("chunked_kernels", "memory"):
        monkeypatch.setattr(f"heads_lightning.losses.{module}.CACHED_BYTES", 1 << 18)
    got = measure(implementation, n, d, v, dtype)
    estimate = loss_memory_bytes(implementation, targets=n, d_model=d, vocab_size=v, dtype=dtype)
    assert abs(estimate - got) < 0.1 * got, (estimate / 2**20, got / 2**20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_target_cost_nothing(dtype: torch.dtype) -> None:
    whole, few = (measure("default", 512, 32, 4096, dtype, masked) for masked in (0.0, 0.85))
    assert few < 0.25 * whole
