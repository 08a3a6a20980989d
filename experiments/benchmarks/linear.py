"""Does what the loss gains from oneDNN hold for a model's linear layers? Forward and backward in fp32, oneDNN's time over torch's.

    python experiments/benchmarks/linear.py

Both in turn in one process, processor time of one thread, median of ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses.onednn import onednn

SHAPES = [(256, 128, 512), (1024, 256, 1024), (1024, 1024, 256), (2048, 512, 2048), (1024, 768, 3072)]
"""Rows, inputs, outputs."""


class ByOneDNN(torch.autograd.Function):
    """A linear layer without a bias, its three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return onednn(grads[0], weight.t()), onednn(grads[0].t(), x.t())


def measure(rows: int, inputs: int, outputs: int, rounds: int = 9) -> float:
    """oneDNN ÷ torch."""
    x, weight = torch.randn(rows, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    upstream = torch.randn(rows, outputs)
    taken: dict[Any, list[float]] = {torch.nn.functional.linear: [], ByOneDNN.apply: []}
    for _ in range(rounds):
        for product, seconds in taken.items():
            x.grad = weight.grad = None
            start = time.process_time()
            product(x, weight).backward(upstream)
            seconds.append(time.process_time() - start)
    plain, ours = taken.values()
    return statistics.median(b / a for a, b in zip(plain, ours, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape in SHAPES:
        print(f"{shape!s:20} oneDNN ÷ torch {measure(*shape):.2f}", flush=True)
