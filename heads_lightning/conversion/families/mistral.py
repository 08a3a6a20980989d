"""Mistral: Llama's weights, with a sliding window in every layer or in none."""

from __future__ import annotations

from typing import Any, ClassVar

from heads_lightning.configs.layers import LocalAttention
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families import decoder
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, refuse
from heads_lightning.conversion.mapping import StateMappingTemplate


class Mistral(Family):
    """`MistralForCausalLM`."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    defaults: ClassVar[HFConfig] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096}

    def read(self, config: HFConfig) -> NativeModel:
        refuse(config, layer_types=None)
        return decoder.decoder_model(config, local_attention=LocalAttention(window=config["sliding_window"]))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        told = decoder.decoder_fields(model)
        assert isinstance(model.backbone, TransformerConfig)
        return told | {"sliding_window": model.backbone.local_attention.window}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        return decoder.decoder_templates(model)

    def copies(self, model: NativeModel) -> dict[str, str]:
        return decoder.decoder_copies(model)
