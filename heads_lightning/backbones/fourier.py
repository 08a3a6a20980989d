"""The convolution of a long real kernel with every channel, by Fourier transforms (`convolution=fft` of a state-space model).

Operators of their own: torch.compile then sees no complex tensor, for which it has no code. The kernel is real, so two neighbouring
channels are convolved as real and imaginary part of one: no more frequencies than a real transform has for both, and memory is copied in
pairs. Transforms run along contiguous memory, on a CPU a few at a time, which stay in cache from the first copy to the last; that of the
input is made again in the backward pass, which costs less than keeping it (experiments/benchmarks/bigs.py).

conj_physical and not conj: in a compiled graph, the lazy one is silently left out inside an operator. G: frequencies, E: pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_BYTES = 2**18
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
    u_BSE, size = _pairs(u_BSD), fast_size(2 * u_BSD.shape[1])
    kernel_G = torch.fft.fft(kernel_S, n=size)
    factor_G = kernel_G.conj_physical() if reverse else kernel_G
    y_BSE = torch.empty_like(u_BSE)
    for block in _blocks(u_BSE, size):
        y_BSE[block] = _back(_transform(u_BSE[block], size).mul_(factor_G), y_BSE.shape[1])
    return _channels(y_BSE, u_BSD)


@torch.library.custom_op("heads_lightning::fft_convolution_backward", mutates_args=())
def _fft_convolution_backward(grad_BSD: Tensor, u_BSD: Tensor, kernel_S: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of input and kernel: a correlation where the forward pass convolves, and the other way round."""
    u_BSE, grad_BSE, size = _pairs(u_BSD), _pairs(grad_BSD), fast_size(2 * u_BSD.shape[1])
    kernel_G = torch.fft.fft(kernel_S, n=size)
    factor_G = kernel_G if reverse else kernel_G.conj_physical()
    grad_u_BSE, product_G = torch.empty_like(u_BSE), torch.zeros_like(kernel_G)
    for block in _blocks(u_BSE, size):
        grad_BEG = _transform(grad_BSE[block], size)
        product_G += _transform(u_BSE[block], size).conj_physical_().mul_(grad_BEG).sum((0, 1))
        grad_u_BSE[block] = _back(grad_BEG.mul_(factor_G), u_BSE.shape[1])
    # the correlations of a pair's channels with themselves add up in the real part; those of one with the other are the imaginary part
    grad_kernel_S = torch.fft.ifft(product_G.conj_physical() if reverse else product_G).real[: len(kernel_S)]
    return _channels(grad_u_BSE, u_BSD), grad_kernel_S.contiguous()


def _pairs(x_BSD: Tensor) -> Tensor:
    """Neighbouring channels as one complex number, [B, S, E]; the last of an odd number has none beside it."""
    return torch.view_as_complex(F.pad(x_BSD, (0, x_BSD.shape[2] % 2)).contiguous().unflatten(2, (-1, 2)))


def _channels(x_BSE: Tensor, like_BSD: Tensor) -> Tensor:
    return torch.view_as_real(x_BSE).flatten(2)[..., : like_BSD.shape[2]].contiguous()


def _blocks(x_BSE: Tensor, size: int) -> Iterator[tuple[slice, slice, slice]]:
    """Parts of [B, S, E] whose transforms are made together: whole rows, or some pairs of one; all of it on an accelerator."""
    rows, _, pairs = x_BSE.shape
    budget = CACHED_BYTES * torch.get_num_threads() // (size * x_BSE.itemsize) if x_BSE.device.type == "cpu" else rows * pairs
    pairs_at_once, rows_at_once = min(max(budget, 1), pairs), max(budget // max(pairs, 1), 1)
    for row in range(0, rows, rows_at_once):
        for pair in range(0, pairs, pairs_at_once):
            yield slice(row, row + rows_at_once), slice(None), slice(pair, pair + pairs_at_once)


def _transform(x_BSE: Tensor, size: int) -> Tensor:
    """Fourier transform over `size` positions, zeros after those given: [B, E, G]."""
    rows, length, pairs = x_BSE.shape
    padded_BEG = x_BSE.new_empty(rows, pairs, size)
    padded_BEG[..., :length] = x_BSE.mT
    padded_BEG[..., length:] = 0
    return torch.fft.fft(padded_BEG)


def _back(x_BEG: Tensor, length: int) -> Tensor:
    """The first positions, [B, S, E]."""
    return torch.fft.ifft(x_BEG)[..., :length].mT


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
