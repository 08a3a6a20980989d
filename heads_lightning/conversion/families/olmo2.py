"""OLMo 2: norms after the branches instead of before them, and a norm of all heads' queries and keys together."""

from __future__ import annotations

from typing import Any, ClassVar

from heads_lightning.configs.layers import AttentionBias, NormPlacement, QKNormWidth
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families import decoder
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel
from heads_lightning.conversion.mapping import StateMappingTemplate


class Olmo2(Family):
    """`Olmo2ForCausalLM`."""

    name = "olmo2"
    architecture = "Olmo2ForCausalLM"
    defaults: ClassVar[HFConfig] = {"hidden_act": "silu", "rms_norm_eps": 1e-5}

    def read(self, config: HFConfig) -> NativeModel:
        own = {"qk_norm": True, "qk_norm_width": QKNormWidth.full, "norm_placement": NormPlacement.reordered}
        return decoder.decoder_model(config, attention_bias=decoder.attention_bias(config), **own)

    def describe(self, model: NativeModel) -> dict[str, Any]:
        told = decoder.decoder_fields(model)
        assert isinstance(model.backbone, TransformerConfig)
        return told | {"attention_bias": model.backbone.biases_of_attention == AttentionBias.all}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        return decoder.decoder_templates(model, attention_norm="post_attention_layernorm", feed_forward_norm="post_feedforward_layernorm")

    def copies(self, model: NativeModel) -> dict[str, str]:
        return decoder.decoder_copies(model)
