"""The convolution of a long real kernel with every channel, by Fourier transforms (`convolution=fft` of a state-space model).

Operators of their own: torch.compile then sees no complex tensor, for which it has no code. The kernel is real, so two neighbouring
channels are convolved as real and imaginary part of one: no more frequencies than a real transform has for both, and memory is copied in
pairs. Transforms run along contiguous memory, on a CPU a few at a time, which stay in cache between the two; that of the input is made
again in the backward pass, which costs less than keeping it (experiments/benchmarks/bigs.py).

conj_physical and not conj: in a compiled graph, the lazy one is silently left out inside an operator. G: frequencies, E: pairs,
R: rows to transform, B·E of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_BYTES = 2**19
"""Complex numbers of one thread's block on a CPU."""


def fast_size(least: int) -> int:
    """The smallest 2^a·3^b·5^c ≥ least that is even: sizes that Fourier transforms are fast at."""
    best = 2 ** max(1, math.ceil(math.log2(least)))
    for five in (1, 5, 25):
        for three in (1, 3, 9):
            size = 2 * three * five
            while size < least:
                size *= 2
            best = min(best, size)
    return best


def fft_convolution(u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> Tensor:
    """By Fourier transforms of twice the length, so that nothing wraps around. fp32 or fp64."""
    return _fft_convolution(u_BSD, kernel_S, reverse)


@torch.library.custom_op("heads_lightning::fft_convolution", mutates_args=())
def _fft_convolution(u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> Tensor:
    """y [B, S, D]."""
    u_RS, size = _pairs(u_BSD), fast_size(2 * u_BSD.shape[1])
    kernel_G = torch.fft.fft(kernel_S, n=size)
    factor_G = kernel_G.conj_physical() if reverse else kernel_G
    y_RS = torch.empty_like(u_RS)
    for some_u, some_y in _blocks(size, u_RS, y_RS):
        some_y[:] = torch.fft.ifft(torch.fft.fft(some_u, n=size).mul_(factor_G))[:, : u_RS.shape[1]]
    return _channels(y_RS, u_BSD)


@torch.library.custom_op("heads_lightning::fft_convolution_backward", mutates_args=())
def _fft_convolution_backward(grad_BSD: Tensor, u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of input and kernel: a correlation where the forward pass convolves, and the other way round."""
    u_RS, grad_RS, size = _pairs(u_BSD), _pairs(grad_BSD), fast_size(2 * u_BSD.shape[1])
    kernel_G = torch.fft.fft(kernel_S, n=size)
    factor_G = kernel_G if reverse else kernel_G.conj_physical()
    product_G = torch.zeros_like(kernel_G)
    for some_u, some_grad in _blocks(size, u_RS, grad_RS):
        grad_RG = torch.fft.fft(some_grad, n=size)
        product_G += torch.fft.fft(some_u, n=size).conj_physical_().mul_(grad_RG).sum(0)
        some_grad[:] = torch.fft.ifft(grad_RG.mul_(factor_G))[:, : u_RS.shape[1]]
    # the correlations of a pair's channels with themselves add up in the real part; those of one with the other are the imaginary part
    grad_kernel_S = torch.fft.ifft(product_G.conj_physical() if reverse else product_G).real[: len(kernel_S)]
    return _channels(grad_RS, u_BSD), grad_kernel_S.contiguous()


def _pairs(x_BSD: Tensor) -> Tensor:
    """A copy with neighbouring channels as one complex number, a row for each pair: [B·E, S]. The last of an odd number has zeros by it."""
    even_BSD = F.pad(x_BSD, (0, 1)) if x_BSD.shape[2] % 2 else x_BSD.contiguous()
    return _turned(torch.view_as_complex(even_BSD.unflatten(2, (-1, 2)))).flatten(0, 1)


def _channels(x_RS: Tensor, like_BSD: Tensor) -> Tensor:
    """Back to [B, S, D]."""
    x_BSE = _turned(x_RS.unflatten(0, (len(like_BSD), -1)))
    return torch.view_as_real(x_BSE).flatten(2)[..., : like_BSD.shape[2]].contiguous()


def _turned(x: Tensor) -> Tensor:
    """x.mT in memory. Matrix by matrix: for one, torch has a fast way."""
    turned = torch.empty_like(x.mT, memory_format=torch.contiguous_format)
    for matrix, to in zip(x, turned, strict=True):
        to.copy_(matrix.mT)
    return turned


def _blocks(size: int, *given: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, as many as are transformed together; all on an accelerator."""
    rows, like = len(given[0]), given[0]
    at_once = max(CACHED_BYTES * torch.get_num_threads() // (size * like.itemsize), 1) if like.device.type == "cpu" else rows
    return zip(*(x_RS.split(at_once) for x_RS in given), strict=True)


@_fft_convolution.register_fake
def _(u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(u_BSD)


@_fft_convolution_backward.register_fake
def _(grad_BSD: Tensor, u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad_BSD), torch.empty_like(kernel_S)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.reverse = inputs[2]


def _differentiate(ctx, grad_BSD: Tensor):
    return *_fft_convolution_backward(grad_BSD.contiguous(), *ctx.saved_tensors, ctx.reverse), None


_fft_convolution.register_autograd(_differentiate, setup_context=_remember)
