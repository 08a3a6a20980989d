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
    """generate() for a causal model that makes its GenerationState in the first forward pass. Prompts are padded on the left.

    transformers looks for GenerationMixin among the bases of a model's class itself: name it there too.
    """

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes ours

    @staticmethod
    def _reorder_cache(past_key_values: GenerationState, beam_idx: Tensor) -> GenerationState:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers does, for masks that end with a token."""
        check_mask(attention_mask, 0 if attention_mask is None else attention_mask.shape[-1])
        theirs: Any = super()
        return theirs.prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)


def check_mask(attention_mask: Tensor | None, read: int) -> None:
    """Refuse to go on from padding: what follows would continue it, and not the prompt before it.

    Args:
        attention_mask: [B, positions so far], 0 at padding.
        read: positions that were read; the last of them is continued.
    """
    if attention_mask is not None and 0 < read <= attention_mask.shape[-1] and bool((attention_mask[:, read - 1] == 0).any()):
        raise ValueError("a prompt that is padded on the right cannot be continued; pad on the left: tokenizer.padding_side = 'left'")
