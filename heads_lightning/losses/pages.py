"""Memory for large results on a CPU."""

import math

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 4 << 20
"""From here on NumPy asks Linux for huge pages."""
ALIGNMENT = 2 << 20
"""Of a huge page; what lies before the first one would be faulted in by 4 KiB."""


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, on a CPU in huge pages where Linux has them: NumPy asks for them, PyTorch does not.

    The gradient of a large matrix is new memory at every step. To fault it in by pages of 4 KiB takes several times as long as to write it,
    and up to 0.4 of the time of the products where few positions are labelled (`experiments/benchmarks/loss.py split`).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
