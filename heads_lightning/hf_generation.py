"""What transformers' generate() needs of a model whose cache is one of ours (backbones.base.Cache). Needs transformers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from transformers import GenerationMixin

from heads_lightning.backbones.base import Cache


class _Reordered(Protocol):
    def reorder(self, rows: Tensor) -> None: ...


class GenerationState:
    """The keys, values or states of a backbone as generate() hands them around."""

    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get_seq_length(self) -> int:
        """Positions read."""
        return self.cache.length

    def reorder_cache(self, rows: Tensor) -> None:
        """Row b goes on with what row rows[b] has read (beam search)."""
        cache: Any = self.cache
        ordered: _Reordered = cache
        ordered.reorder(rows)


class GeneratesFromState(GenerationMixin):
    """generate() for a causal model that makes its GenerationState in the first forward pass. Prompts are padded on the left."""

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes ours

    @staticmethod
    def _reorder_cache(past_key_values: GenerationState, beam_idx: Tensor) -> GenerationState:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers does, for masks that a causal model can go on from."""
        check_mask(attention_mask, ends=True)
        return super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)


def check_mask(attention_mask: Tensor | None, *, ends: bool) -> None:
    """Refuse a mask with padding in the middle, or (`ends`) at the end: what follows would continue the padding.

    Args:
        attention_mask: [B, positions so far], 0 at padding.
        ends: the last position of each row is to be continued.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return
    hidden = attention_mask == 0
    if bool((hidden[:, 1:] & ~hidden[:, :-1]).any()) or (ends and bool(hidden[:, -1].any())):
        raise ValueError("a prompt that is padded on the right cannot be continued; pad on the left: tokenizer.padding_side = 'left'")
