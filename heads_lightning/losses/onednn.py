"""fp32 products by oneDNN instead of MKL, which torch.mm asks on x86 and which reaches half of oneDNN's rate on some AMD processors.

The operator is private to PyTorch, so it is used only where it exists, gives the right numbers and is faster: asked once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

PROBE_ROWS, PROBE_COLUMNS, PROBE_DEPTH = 256, 2048, 512


def mkl(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T by torch.mm."""
    return torch.mm(a_MK, b_NK.t())


def onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T by oneDNN; operands dense, possibly transposed. (Strided views of a wider matrix fall to a reference kernel: minutes.)"""
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


@cache
def onednn_wins(threads: int) -> bool:
    """Whether oneDNN's product exists here, is right, and beats torch.mm by 3 % with so many threads."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(PROBE_ROWS, PROBE_DEPTH, generator=generator)
    b = torch.randn(PROBE_COLUMNS, PROBE_DEPTH, generator=generator)
    exact = a.double() @ b.double().t()
    try:
        if (onednn(a, b) - exact).norm() > 1e-6 * exact.norm():
            return False
    except (AttributeError, RuntimeError):
        return False
    seconds: dict[Callable[[Tensor, Tensor], Tensor], float] = {onednn: float("inf"), mkl: float("inf")}
    for _ in range(4):
        for product in seconds:
            start = perf_counter()
            product(a, b)
            seconds[product] = min(seconds[product], perf_counter() - start)
    return seconds[onednn] < 0.97 * seconds[mkl]
