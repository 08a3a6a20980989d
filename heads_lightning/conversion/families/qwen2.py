"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values, and sliding windows in some layers."""

from __future__ import annotations

from typing import Any, ClassVar

from heads_lightning.configs.layers import AttentionBias
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families import decoder
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel
from heads_lightning.conversion.mapping import StateMappingTemplate


class Qwen2(Family):
    """`Qwen2ForCausalLM`."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults: ClassVar[HFConfig] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "sliding_window": 4096}

    def read(self, config: HFConfig) -> NativeModel:
        return decoder.decoder_model(config, attention_bias=AttentionBias.qkv, local_attention=decoder.sliding_layers(config))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        told = decoder.decoder_fields(model)
        assert isinstance(model.backbone, TransformerConfig)
        return told | decoder.sliding_fields(model.backbone)

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        return decoder.decoder_templates(model)

    def copies(self, model: NativeModel) -> dict[str, str]:
        return decoder.decoder_copies(model)
