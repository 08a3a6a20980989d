"""Our own classes for `transformers`: any native model, opened by AutoModelForCausalLM and AutoModelForMaskedLM without remote code.

import heads_lightning.conversion.auto  # registers
AutoModelForCausalLM.from_pretrained("FOLDER")
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from heads_lightning.batch import IGNORE, Attention
from heads_lightning.conversion.families import OWN
from heads_lightning.conversion.native import NativeLM


class HeadsLightningConfig(PreTrainedConfig):
    """Configs of backbone and head, as plain values."""

    model_type = "heads_lightning"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        vocab_size: int = 0,
        hidden_size: int = 0,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        options: dict[str, Any] = {"tie_word_embeddings": False} | kwargs
        super().__init__(**options)


class _HeadsLightningModel(PreTrainedModel):
    config_class = HeadsLightningConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: HeadsLightningConfig) -> None:
        super().__init__(config)
        built = NativeLM(OWN.native(config.to_dict()))
        self.backbone, self.head = built.backbone, built.head
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Modules initialise themselves when they are built."""

    def get_input_embeddings(self) -> Any:
        return self.backbone.embedding

    def _logits(self, tokens_BS: Tensor, mask_BS: Tensor | None, attention: Attention) -> Tensor:
        return NativeLM.forward(self, tokens_BS, mask_BS, attention=attention)  # pyright: ignore[reportArgumentType]


class HeadsLightningForCausalLM(_HeadsLightningModel):
    """A native model that reads from left to right. It keeps no cache; `heads-lightning generate` does."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        """Logits, and with labels [B, S] (not shifted, as transformers has it) their mean loss."""
        logits = self._logits(input_ids, attention_mask, Attention.causal)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
        return CausalLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


class HeadsLightningForMaskedLM(_HeadsLightningModel):
    """A native model that sees both sides."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> MaskedLMOutput:
        """Logits, and with labels [B, S] their mean loss."""
        logits = self._logits(input_ids, attention_mask, Attention.bidirectional)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        return MaskedLMOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


def register() -> None:
    """Make the Auto classes know these. Importing this module does it too."""
    AutoConfig.register(HeadsLightningConfig.model_type, HeadsLightningConfig, exist_ok=True)
    AutoModelForCausalLM.register(HeadsLightningConfig, HeadsLightningForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(HeadsLightningConfig, HeadsLightningForMaskedLM, exist_ok=True)


register()
