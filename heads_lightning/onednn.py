"""fp32 products by oneDNN in place of MKL, which PyTorch asks on x86 and which reaches half of oneDNN's rate on some AMD processors.

`product` is one product; `use_for_linear_layers` has the linear layers of a model computed by it, forward and backward. Choices. The
operator is private to PyTorch, so it is used only where it exists, is right and is clearly faster, which is asked once (`is_faster`). A
layer asks at every call whether it is a call for oneDNN (`_fits`); all others go to torch: another type, autocast, another device, meta,
DTensors, torch.compile, few multiplications. A layer keeps its class, its hooks and the names of its weights: its `forward` alone is
replaced, by one that is copied and pickled with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from time import thread_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLEARLY = 0.85
"""Share of torch's time below which oneDNN counts as faster. Processors take about half or about all of it: noise decides nothing."""
LEAST_MULTIPLICATIONS = 2**22
"""Multiplications up to which a layer's call is torch's: an autograd function in Python costs more than it gains there. Measured
(experiments/benchmarks/linear.py)."""
MANY_ROWS = 2048
PROBE_ROWS, PROBE_COLUMNS, PROBE_DEPTH = 256, 1024, 512


def torch_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a @ b.T by torch.mm."""
    return torch.mm(a_MK, b_NK.t())


def product(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a @ b.T + bias by oneDNN; a [..., K].

    The operands lie densely in memory, possibly transposed: for a strided view of a wider matrix there is a reference kernel, of minutes.
    """
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")


@cache
def is_right() -> bool:
    """Whether oneDNN's product exists here and gives the right numbers."""
    a, b = _probe()
    exact = a.double() @ b.double().t()
    try:
        return bool((product(a, b) - exact).norm() <= 1e-6 * exact.norm())
    except (AttributeError, RuntimeError):
        return False


@cache
def share_of_torch() -> float:
    """oneDNN's time over torch's for a product, where it is right."""
    a, b = _probe()
    ours, theirs = least_seconds(lambda: product(a, b), lambda: torch_product(a, b))
    return ours / theirs


def is_faster() -> bool:
    """Whether oneDNN's product is right and clearly faster than torch's."""
    return is_right() and share_of_torch() < CLEARLY


def _probe() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, PROBE_DEPTH, generator=generator) for size in (PROBE_ROWS, PROBE_COLUMNS))  # pyright: ignore


def least_seconds(*works: Callable[[], Any], repeats: int = 9) -> list[float]:
    """Least processor time of each, in turn on one thread: a busy machine must not change what a run computes with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [float("inf")] * len(works)
        for _ in range(repeats):
            for i, work in enumerate(works):
                start = thread_time()
                work()
                best[i] = min(best[i], thread_time() - start)
        return best
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------------- linear layers


def use_for_linear_layers(model: nn.Module) -> None:
    """From now on the linear layers below `model` multiply by oneDNN what it is for. Layers with a forward of their own keep it."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and getattr(layer.forward, "__func__", None) is nn.Linear.forward:
            layer.forward = partial(_forward, layer)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """[..., I] → [..., O]; the argument's name is nn.Linear's."""
    return linear(input, layer.weight, layer.bias)


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by oneDNN where the call is one for it."""
    if not _fits(x, weight_OI, bias_O):
        return F.linear(x, weight_OI, bias_O)
    return _Linear.apply(x.contiguous(), weight_OI, bias_O)


def _fits(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    given = (x, weight_OI) if bias_O is None else (x, weight_OI, bias_O)
    # a subclass (a DTensor, a fake tensor) has ways of its own, which the operator knows nothing of
    plain = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
    # torch has the words for shapes that do not fit
    return (
        plain and x.shape[-1:] == weight_OI.shape[1:] and x.numel() * len(weight_OI) > LEAST_MULTIPLICATIONS and weight_OI.is_contiguous()
    )


class _Linear(torch.autograd.Function):
    """x [..., I], weight [O, I] and bias [O] to x @ weight.T + bias, [..., O]; contiguous fp32 tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        learns_x, learns_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if learns_weight else None, weight_OI if learns_x else None)
        return product(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        multiply = torch_product if torch.is_grad_enabled() else product  # with create_graph; of the two, torch's has a derivative
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        return (
            None if weight_OI is None else multiply(grad_NO, weight_OI.t()).view(*grads[0].shape[:-1], -1),
            None if x is None else _weight_gradient(multiply, grad_NO, x.view(-1, x.shape[-1])),
            grad_NO.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _weight_gradient(multiply: Callable[[Tensor, Tensor], Tensor], grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """[O, I]. A sum over many rows is faster where the result has fewer rows than columns, by more than turning it round costs."""
    rows, outputs = grad_NO.shape
    if outputs <= x_NI.shape[1] or rows < MANY_ROWS:
        return multiply(grad_NO.t(), x_NI.t())
    return multiply(x_NI.t(), grad_NO.t()).t().contiguous()
