"""What may be seen, as one type. Four conventions are in use for tensors, two of them opposites that look alike:

    blocked     bool, True: the key is hidden                     Megatron-core
    keep        0 or 1, 1: the token is real                      Hugging Face's attention_mask
    attend      bool, True: the key is seen                       torch's scaled_dot_product_attention
    additive    float, 0: seen, -inf (or very negative): hidden   added to the scores

An `AttentionMask` is made from one of them by its name and turned into another by its name. Modules of this project take no bare tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN_BELOW = -1e3
"""An additive mask's numbers are 0, or below this (Megatron: -10000, transformers: the type's least)."""


@dataclass(frozen=True)
class AttentionMask:
    """Which key each query may see.

    Raises:
        TypeError: made from a tensor of another type than its convention has.
        ValueError: made from values that its convention does not have.
    """

    visible_BST: Tensor
    """bool [B or 1, S or 1, T]: True where query s may see key t."""

    def __post_init__(self) -> None:
        if not isinstance(self.visible_BST, Tensor) or self.visible_BST.dtype != torch.bool or self.visible_BST.ndim != 3:
            raise TypeError(
                "an AttentionMask holds a bool tensor [B, S, T], True where the key is seen; "
                "make it with AttentionMask.from_blocked, from_keep, from_attend or from_additive"
            )

    @classmethod
    def from_blocked(cls, blocked: Tensor) -> AttentionMask:
        """Megatron-core's: bool [B, S, T] (or [B, 1, S, T]), True where the key is hidden."""
        return cls(~_three(_bool(blocked, "blocked")))

    @classmethod
    def from_attend(cls, attend: Tensor) -> AttentionMask:
        """torch's: bool [B, S, T] (or [B, 1, S, T]), True where the key is seen."""
        return cls(_three(_bool(attend, "attend")))

    @classmethod
    def from_keep(cls, keep: Tensor) -> AttentionMask:
        """Hugging Face's: [B, T] of 1 (real) and 0 (padding), or the same per query, [B, S, T]."""
        if keep.dtype == torch.bool:
            raise TypeError("a keep mask holds the numbers 1 and 0; for a bool tensor take from_attend or from_blocked")
        if not bool(((keep == 0) | (keep == 1)).all()):
            raise ValueError("a keep mask holds 1 (real) and 0 (padding) alone; token ids are turned into one by `ids != padding_id`")
        return cls(_three(keep[:, None] if keep.ndim == 2 else keep) == 1)

    @classmethod
    def from_additive(cls, additive: Tensor) -> AttentionMask:
        """Added to scores: float [B, S, T] (or [B, 1, S, T]), 0 where the key is seen, -inf or very negative where it is hidden."""
        if not additive.is_floating_point():
            raise TypeError(f"an additive mask is of a floating type, not {additive.dtype}; 1 and 0 are from_keep")
        seen, hidden = additive == 0, additive < HIDDEN_BELOW
        if not bool((seen | hidden).all()):
            raise ValueError(f"an additive mask holds 0 and numbers below {HIDDEN_BELOW:g} alone; a bias of the scores is no mask")
        return cls(_three(seen))

    @classmethod
    def from_segments(cls, queries_BS: Tensor, keys_BT: Tensor) -> AttentionMask:
        """A query sees the keys of its own segment (batch.py): packed documents and padding are kept apart."""
        return cls(queries_BS[:, :, None] == keys_BT[:, None, :])

    @classmethod
    def causal(cls, size: int, *, old: int = 0, device: torch.device | None = None) -> AttentionMask:
        """The last `size` of `old + size` positions see themselves and what stands before them."""
        index = torch.arange(old + size, device=device)
        return cls((index[None, :] <= index[old:, None])[None])

    def __and__(self, other: AttentionMask) -> AttentionMask:
        return AttentionMask(self.visible_BST & other.visible_BST)

    def blocked(self) -> Tensor:
        """bool [B, 1, S, T], True where the key is hidden: Megatron-core's."""
        return ~self.visible_BST[:, None]

    def attend(self) -> Tensor:
        """bool [B, 1, S, T], True where the key is seen: torch's."""
        return self.visible_BST[:, None]

    def keep(self) -> Tensor:
        """int64 [B, S, T], 1 where the key is seen: Hugging Face's, per query."""
        return self.visible_BST.long()

    def additive(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, T], 0 where the key is seen, half the type's least number elsewhere: a row that sees nothing stays finite."""
        zeros = torch.zeros(self.visible_BST.shape, dtype=dtype, device=self.visible_BST.device)
        return zeros.masked_fill_(~self.visible_BST, torch.finfo(dtype).min / 2)[:, None]

    def sees_something(self) -> Tensor:
        """bool [B, S, 1]: False for queries that may see no key; what attention gives them is 0."""
        return self.visible_BST.any(dim=-1, keepdim=True)

    def seen_by_none(self) -> Tensor:
        """bool [B, T]: keys that no query sees: padding, where the mask hides it."""
        return ~self.visible_BST.any(dim=-2)


def _bool(mask: Tensor, name: str) -> Tensor:
    if mask.dtype != torch.bool:
        raise TypeError(f"from_{name} takes a bool tensor, not {mask.dtype}; 1 and 0 are from_keep, 0 and -inf are from_additive")
    return mask


def _three(mask: Tensor) -> Tensor:
    """[B, S, T] of [B, S, T] or [B, 1, S, T]."""
    if mask.ndim == 4 and mask.shape[1] == 1:
        return mask[:, 0]
    if mask.ndim != 3:
        raise ValueError(f"a mask is [B, S, T] or [B, 1, S, T], not {list(mask.shape)}")
    return mask


M = TypeVar("M", Tensor, AttentionMask)


def t5_extended_attention_mask(masks: Sequence[M | None]) -> list[M | None]:
    """[b, 1, s, s] of each [b, s, s]: the axis of the heads, values unchanged and of whatever convention they were; None stays None.

    An AttentionMask knows that axis already and is returned as it is.
    """
    return [mask if mask is None or isinstance(mask, AttentionMask) else mask.unsqueeze(1) for mask in masks]


def t5_position_ids(token_ids: Tensor, *, padding_id: int | None = None, segments: Tensor | None = None) -> Tensor:
    """Positions int64 [b, s] of tokens [b, s].

    Args:
        token_ids: int64 [b, s].
        padding_id: leading tokens with this id are padding, and positions count from the first other one. None: nothing is padding.
        segments: int [b, s]: positions count from the first of each run of equal segments.
    """
    index = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    if segments is not None:
        starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        return index - torch.where(starts, index, 0).cummax(dim=1).values
    if padding_id is None:
        return index.clone()
    return positions_after(token_ids == padding_id)


def positions_after(padding_BS: Tensor) -> Tensor:
    """int64 [B, S]: index counted from the first position that is no padding; 0 before it."""
    leading_B1 = padding_BS.long().cumprod(dim=1).sum(dim=1, keepdim=True)
    index = torch.arange(padding_BS.shape[1], device=padding_BS.device)
    return (index - leading_B1).clamp(min=0)
