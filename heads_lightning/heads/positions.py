"""`logits_to_keep`: which positions of a sequence a head looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """What belongs to the positions of a batch."""

    hidden: Tensor
    """[B, S, D]; of a mask: [kept, D]."""
    labels: Tensor | None
    weights: Tensor | None

    def map(self, select: _Select) -> Positions:
        """The same selection of all three."""
        return Positions(*(None if value is None else select(value) for value in self))  # pyright: ignore[reportArgumentType]


def keep_positions(positions: Positions, keep: int | Tensor) -> Positions:
    """The positions that `keep` names: 0 all, N the last N (all if there are fewer), [K] the same of every row, [B, K], or a mask [B, S].

    Raises:
        ValueError: a negative number or position, a position past the end, another shape or type, labels of another shape.
    """
    _check_shapes(positions)
    batch, length = positions.hidden.shape[:2]
    if not isinstance(keep, Tensor):
        if isinstance(keep, bool) or keep < 0:
            raise ValueError(f"logits_to_keep={keep} must be 0 (all positions) or the number of last positions to keep")
        return positions if keep == 0 or keep >= length else positions.map(_Last(keep))
    keep = keep.to(positions.hidden.device)
    if keep.dtype == torch.bool:
        if keep.shape != (batch, length):
            raise ValueError(f"logits_to_keep: a mask has the shape [B, S] = {[batch, length]}, not {list(keep.shape)}")
        return positions.map(_Masked(keep))
    if keep.is_floating_point() or keep.dim() not in (1, 2) or (keep.dim() == 2 and keep.shape[0] != batch):
        raise ValueError(
            f"logits_to_keep: a tensor holds positions [K] or [{batch}, K], or is a mask [B, S]; not {keep.dtype} {list(keep.shape)}"
        )
    index = keep.long() if keep.dim() == 2 else keep.long().expand(batch, -1)
    inside = (index >= 0) & (index < length)
    if torch.compiler.is_compiling() or index.device.type == "cuda":
        torch._assert_async(inside.all(), f"logits_to_keep: a position is outside 0..{length - 1}")
    elif not bool(inside.all()):
        raise ValueError(f"logits_to_keep: position {int(index[~inside][0])} is outside 0..{length - 1}")
    return positions.map(_Gathered(index))


def _check_shapes(positions: Positions) -> None:
    hidden = positions.hidden
    if hidden.dim() != 3:
        raise ValueError(f"hidden states have the shape [B, S, D], not {list(hidden.shape)}")
    for name, value in (("labels", positions.labels), ("weights", positions.weights)):
        if value is not None and value.shape != hidden.shape[:2]:
            raise ValueError(f"{name} of shape {list(value.shape)} do not fit hidden states of shape {list(hidden.shape)}")


class _Last(NamedTuple):
    number: int

    def __call__(self, value: Tensor) -> Tensor:
        return value[:, -self.number :]


class _Masked(NamedTuple):
    mask_BS: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return value[self.mask_BS]


class _Gathered(NamedTuple):
    index_BK: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return torch.take_along_dim(value, self.index_BK if value.dim() == 2 else self.index_BK.unsqueeze(-1), dim=1)


_Select = _Last | _Masked | _Gathered
