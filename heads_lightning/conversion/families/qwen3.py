"""Qwen3: Llama with a norm of each head's queries and keys, and sliding windows in some layers."""

from __future__ import annotations

from typing import Any, ClassVar

from heads_lightning.configs.layers import AttentionBias, QKNormWidth
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families import decoder
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel
from heads_lightning.conversion.mapping import StateMappingTemplate


class Qwen3(Family):
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults: ClassVar[HFConfig] = {
        **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32},
        **{"head_dim": 128, "sliding_window": 4096},
    }

    def read(self, config: HFConfig) -> NativeModel:
        own = {"qk_norm": True, "qk_norm_width": QKNormWidth.head, "local_attention": decoder.sliding_layers(config)}
        return decoder.decoder_model(config, attention_bias=decoder.attention_bias(config), **own)

    def describe(self, model: NativeModel) -> dict[str, Any]:
        told = decoder.decoder_fields(model)
        assert isinstance(model.backbone, TransformerConfig)
        told |= decoder.sliding_fields(model.backbone)
        return told | {"attention_bias": model.backbone.biases_of_attention == AttentionBias.all}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        return decoder.decoder_templates(model)

    def copies(self, model: NativeModel) -> dict[str, str]:
        return decoder.decoder_copies(model)
