"""How much memory a loss will take, before it is taken."""

from __future__ import annotations

import torch

from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses import chunked
from heads_lightning.losses.auto import choose
from heads_lightning.losses.base import loss_dtype
from heads_lightning.losses.chunked_blocks import FEW_CHUNKS, block_columns
from heads_lightning.losses.chunked_kernels import ACCELERATOR_CACHED_BYTES, CACHED_BYTES


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
    blocked = device == "cpu" and dtype != torch.float16 and v > block_columns(dtype)
    blocked &= dtype != torch.bfloat16 or n >= chunked.MIN_BLOCKED_ROWS
    return (_blocked if blocked else _dense)(n, d, v, dtype, device, rows)


def _blocked(n: int, d: int, v: int, dtype: torch.dtype, device: str, rows: int) -> int:
    """chunked_blocks.blocked: a block of the vocabulary at a time beside the chunk's memory."""
    size, maths, columns = dtype.itemsize, loss_dtype(dtype).itemsize, block_columns(dtype)
    kept = size * rows * (v + d)
    if size == maths:
        return kept + size * (n * d + v * d + max(rows, d) * columns)
    kept += CACHED_BYTES + (3 * maths + size) * rows * d
    rounded_in_the_end = n > FEW_CHUNKS * rows
    return kept + size * n * d + v * d * (size + maths if rounded_in_the_end else size)


def _dense(n: int, d: int, v: int, dtype: torch.dtype, device: str, rows: int) -> int:
    """chunked_kernels.dense: in low precision, the gradient of the weight is summed in fp32 and rounded in the end."""
    size, maths = dtype.itemsize, loss_dtype(dtype).itemsize
    logits, gradients = rows * v * size, n * d * size
    if size == maths:
        return logits + gradients + v * d * size
    scratch = CACHED_BYTES if device == "cpu" else ACCELERATOR_CACHED_BYTES
    scratch = min(scratch, rows * v * maths)
    if rows >= n:
        return logits + gradients + max(scratch, v * d * size)
    return gradients + v * d * maths + max(logits + scratch, v * d * size)
