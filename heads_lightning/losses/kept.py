"""Memory that is kept from call to call on a CPU, where the C library gives large blocks back and faults them in anew.

To fault a fresh gradient in takes up to a sixth of the time of a loss of few labels (experiments/loss_implementations). An accelerator's
allocator keeps its memory anyway.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

ROOM_BYTES = 96 << 20
"""A larger room is given back."""
LINE_BYTES = 64
"""Of a cache line, on which each tensor of a room begins."""
LEAST_BYTES = 1 << 20
"""Smaller tensors are recycled by the C library."""
MOST_BUFFERS = 4
"""That wait to be lent again: low precision takes three in a call, and gradients that are added up over micro-batches one more."""

_room: list[Tensor] = []
"""That of the last call, while no call has it: two calls at once have one each."""
_returned: dict[int, list[Tensor]] = {}
"""Buffers that nobody has, by size in bytes."""


@contextmanager
def room(shapes: list[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> Iterator[list[Tensor]]:
    """Uninitialised tensors for as long as the block lasts; sizes may differ from call to call."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        return
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    starts = list(accumulate((-(-size // LINE_BYTES) * LINE_BYTES for size in sizes), initial=0))
    try:
        buffer = _room.pop()
    except IndexError:
        buffer = torch.empty(0, dtype=torch.uint8)
    if buffer.nbytes < starts[-1]:
        del buffer  # before the larger one is made
        buffer = torch.empty(starts[-1], dtype=torch.uint8)
    yield [buffer[a : a + size].view(dtype).view(shape) for a, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)]
    if buffer.nbytes <= ROOM_BYTES:
        _room[:] = [buffer]


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for tensors of the weight's size. On a CPU the memory comes back when the tensor and all that shares it are gone.

    A gradient's memory is then there for the next step's; in between it holds what the head's backward pass will need again in any case.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST_BYTES or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        buffer = _returned.get(size, []).pop()
    except IndexError:
        _returned.clear()  # of another model: not beside the new one
        buffer = torch.empty(size, dtype=torch.uint8)
    # the tensor's memory belongs to an array of its own, which ends with the last tensor that shares it
    lent = buffer.numpy()[:]
    weakref.finalize(lent, _give_back, buffer).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), for tensors of the weight's size."""
    return tensor if tensor.dtype == dtype else empty(*tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def _give_back(buffer: Tensor) -> None:
    if sum(map(len, _returned.values())) < MOST_BUFFERS:
        _returned.setdefault(buffer.nbytes, []).append(buffer)
