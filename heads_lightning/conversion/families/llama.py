"""Llama 1 to 3 and everything that is saved as model_type=llama."""

from __future__ import annotations

from typing import Any, ClassVar

from heads_lightning.configs.layers import AttentionBias
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families import decoder
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel
from heads_lightning.conversion.mapping import StateMappingTemplate


class Llama(Family):
    """`LlamaForCausalLM`."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    defaults: ClassVar[HFConfig] = {"hidden_act": "silu", "rms_norm_eps": 1e-6}

    def read(self, config: HFConfig) -> NativeModel:
        return decoder.decoder_model(
            config, attention_bias=decoder.attention_bias(config), feed_forward_bias=bool(config.get("mlp_bias", False))
        )

    def describe(self, model: NativeModel) -> dict[str, Any]:
        told = decoder.decoder_fields(model)
        assert isinstance(model.backbone, TransformerConfig)
        told |= {"attention_bias": model.backbone.biases_of_attention == AttentionBias.all}
        return told | {"mlp_bias": model.backbone.has_feed_forward_bias}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        return decoder.decoder_templates(model)

    def copies(self, model: NativeModel) -> dict[str, str]:
        return decoder.decoder_copies(model)
