"""How much memory a loss will take, before it is taken."""

from __future__ import annotations

import torch

from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import chunked, chunked_blocks, kept
from heads_lightning.losses.auto import choose
from heads_lightning.losses.base import loss_dtype
from heads_lightning.losses.chunked_kernels import ACCELERATOR_CACHED_BYTES, CACHED_BYTES, direct_chunks


def loss_memory_bytes(
    implementation: LMLossImplementation | str, *, targets: int, d_model: int, vocab_size: int, dtype: torch.dtype, device: str = "cpu"
) -> int:
    """Peak of forward and backward of the plain cross-entropy beyond hidden states and weight, their gradients included.

    Args:
        implementation: `default`, `chunked` or `auto`; the others manage their own memory.
        targets: rows that have a target.
        d_model: width of the hidden states.
        vocab_size: rows of the projection.
        dtype: of the matrix products (autocast's, where it is on).
        device: `cpu`, `cuda` or `mps`.
    """
    name = choose(targets, vocab_size)[0] if implementation == "auto" else str(getattr(implementation, "value", implementation))
    if name == "default":
        return _default(targets, d_model, vocab_size, dtype)
    if name == "chunked":
        return _chunked(targets, d_model, vocab_size, dtype, device)
    raise ValueError(f"no estimate for loss_implementation={name}; there is one for default, chunked and auto")


def _default(n: int, d: int, v: int, dtype: torch.dtype) -> int:
    """The log-soft-max and two gradients of its size are alive at once; afterwards one of them beside dX and dW."""
    maths = loss_dtype(dtype).itemsize
    rounded = 0 if dtype.itemsize == maths else dtype.itemsize
    return max(3 * maths * n * v, (maths + rounded) * n * v, dtype.itemsize * (n * v + n * d + v * d))


def _chunked(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> int:
    """A chunk of logits, the gradients, and what is made in passing."""
    rows = chunked.chunk_rows(n, v, d, dtype, device)
    blocked = device == "cpu" and dtype.itemsize > 2 and v > chunked_blocks.BLOCK_COLUMNS
    return _blocked(n, d, v, dtype.itemsize, rows) if blocked else _dense(n, d, v, dtype, device, rows)


def _blocked(n: int, d: int, v: int, size: int, rows: int) -> int:
    """chunked_blocks.blocked: a block of the vocabulary at a time beside the chunk's memory."""
    return size * (rows * (v + d) + n * d + v * d + max(rows, d) * chunked_blocks.BLOCK_COLUMNS)


def _dense(n: int, d: int, v: int, dtype: torch.dtype, device: str, rows: int) -> int:
    """chunked_kernels.dense: in low precision, the gradient of the weight may be summed in fp32 and rounded in the end."""
    size, maths = dtype.itemsize, loss_dtype(dtype).itemsize
    scratch = 0
    if size != maths:
        scratch = min(rows * v * maths, CACHED_BYTES if device == "cpu" else ACCELERATOR_CACHED_BYTES)
    room, gradients, dw = rows * v * size + scratch, n * d * size, v * d * size
    if n <= rows * direct_chunks(dtype, device):
        return room + gradients + dw
    is_kept = device == "cpu" and room <= kept.ROOM_BYTES
    return gradients + v * d * maths + (room + dw if is_kept else max(room, dw))
