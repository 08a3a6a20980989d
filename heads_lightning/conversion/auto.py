"""Our own classes for `transformers`: any native model, opened by its Auto classes without remote code.

import heads_lightning.conversion.auto  # registers
AutoModelForCausalLM.from_pretrained("FOLDER")
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, TokenClassifierOutput

from heads_lightning.backbones.layers import KeyValueCache
from heads_lightning.batch import IGNORE, PADDING, Attention, Batch
from heads_lightning.conversion.families import OWN
from heads_lightning.conversion.native import NativeLM
from heads_lightning.models.hf_generation import GeneratesFromState, GenerationState, check_mask


class HeadsLightningConfig(PreTrainedConfig):
    """Configs of backbone and head (and of the objective that judges values), as plain values."""

    model_type = "heads_lightning"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        vocab_size: int = 0,
        hidden_size: int = 0,
        attention: str | None = None,
        objective: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.attention = attention
        self.objective = objective
        self.use_cache = kwargs.pop("use_cache", True)
        options: dict[str, Any] = {"tie_word_embeddings": False} | kwargs
        super().__init__(**options)


class _HeadsLightningModel(PreTrainedModel):
    config_class = HeadsLightningConfig
    base_model_prefix = ""
    _supports_sdpa = True
    # a recurrence in bf16 is another one, and values have three digits in it
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"forward_system", "backward_system", "summary"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: HeadsLightningConfig) -> None:
        super().__init__(config)
        native = OWN.native(config.to_dict())
        built = NativeLM(native)
        self.attention = native.attention or Attention.causal
        self.backbone, self.head = built.backbone, built.head
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Modules initialise themselves when they are built."""

    def get_input_embeddings(self) -> Any:
        return self.backbone.embedding

    def _hidden(self, tokens_BS: Tensor, mask: Tensor | None, attention: Attention, state: GenerationState | None = None) -> Tensor:
        """Hidden states [B, S, D] of the new positions; `mask` is of them, or of all positions so far."""
        shown_BS = None if mask is None else mask[:, -tokens_BS.shape[1] :].bool()
        segments_BS = None if shown_BS is None or bool(shown_BS.all()) else torch.where(shown_BS, 0, PADDING)
        batch = Batch(tokens_BS, tokens_BS, attention, 0, 0, segments_BS=segments_BS)
        return self.backbone(batch, None if state is None else state.cache)


class HeadsLightningForCausalLM(_HeadsLightningModel, GeneratesFromState, GenerationMixin):
    """A native model that reads from left to right; generate() keeps keys and values, or states."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: GenerationState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels [B, S] (not shifted, as transformers has it) their mean loss.

        Args:
            input_ids: int64 [B, S]; with past_key_values, the new positions.
            attention_mask: [B, positions so far], 0 at padding. Positions are counted from the first that is shown.
            labels: the input ids; -100: no target.
            past_key_values: what was read before; it is brought forward in place.
            use_cache: make such a state. None: as config.use_cache, when there are no labels and the model is not in training.
            logits_to_keep: so many of the last positions, or these; 0: all.

        Raises:
            ValueError: padding between what was read and what follows.
        """
        keeps = self.config.use_cache and not self.training and labels is None if use_cache is None else use_cache
        if past_key_values is not None:
            check_mask(attention_mask, past_key_values.get_seq_length())
        state = self._state(past_key_values, input_ids) if keeps or past_key_values is not None else None
        hidden_BSD = self._hidden(input_ids, attention_mask, Attention.causal, state)
        logits = self.head(hidden_BSD, logits_to_keep=logits_to_keep)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state)  # pyright: ignore[reportArgumentType]

    def _state(self, state: GenerationState | None, input_ids: Tensor) -> GenerationState:
        """A state with room for the new positions."""
        rows, size = input_ids.shape
        state = GenerationState(self.backbone.new_cache(rows, size)) if state is None else state
        if isinstance(state.cache, KeyValueCache):
            state.cache.reserve(state.cache.length + size)
        return state


class HeadsLightningForMaskedLM(_HeadsLightningModel):
    """A native model that sees both sides."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> MaskedLMOutput:
        """Logits, and with labels [B, S] their mean loss."""
        logits = self.head(self._hidden(input_ids, attention_mask, Attention.bidirectional))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return MaskedLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


class HeadsLightningForTokenClassification(_HeadsLightningModel):
    """A native model with a value head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> TokenClassifierOutput:
        """The head's outputs at each position as `logits`, fp32 [B, S, K]; K is 1 but for bins (objective.loss=hl_gauss)."""
        if kwargs.get("labels") is not None:
            raise ValueError("values are trained by heads_lightning (objective=value), which knows how they are judged; leave labels out")
        return TokenClassifierOutput(logits=self.head(self._hidden(input_ids, attention_mask, self.attention)))


def register() -> None:
    """Make the Auto classes know these. Importing this module does it too."""
    AutoConfig.register(HeadsLightningConfig.model_type, HeadsLightningConfig, exist_ok=True)
    AutoModelForCausalLM.register(HeadsLightningConfig, HeadsLightningForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(HeadsLightningConfig, HeadsLightningForMaskedLM, exist_ok=True)
    AutoModelForTokenClassification.register(HeadsLightningConfig, HeadsLightningForTokenClassification, exist_ok=True)


register()
