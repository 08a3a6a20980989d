"""Every backbone in the forms that its tests range over, and batches for them."""

from __future__ import annotations

from typing import Any

import torch

from heads_lightning.backbones.base import Backbone
from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import backbones
from heads_lightning.configs.base import NormType
from heads_lightning.configs.layers import (
    AttentionBias,
    CausalForm,
    Direction,
    FeedForward,
    GateActivation,
    LocalAttention,
    NormPlacement,
    Position,
    QKNormWidth,
    RotaryScaling,
    RotaryScalingType,
)
from heads_lightning.testing.backbones import enlarged

VOCAB = 61
TINY: dict[str, dict[str, Any]] = {
    "transformer": {"d_model": 32, "num_layers": 3, "num_heads": 4},
    "ngpt": {"d_model": 32, "num_layers": 3, "num_heads": 4},
    "bigs": {"d_model": 32, "num_layers": 3, "state_size": 8, "max_positions": 64},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer-gqa-qknorm": ("transformer", {"num_kv_heads": 2, "qk_norm": True, "head_dim": 12}),
    "transformer-gpt2": (
        "transformer",
        {"position": "learned", "norm": "layer_norm", "bias": True, "feed_forward": "plain", "activation": "gelu", "max_positions": 40},
    ),
    "transformer-layernorm-nobias": ("transformer", {"norm": "layer_norm", "activation": "relu_squared", "position": "none"}),
    "transformer-bert": (
        "transformer",
        {
            **{
                "position": "learned",
                "norm": "layer_norm",
                "bias": True,
                "feed_forward": "plain",
                "activation": "gelu",
                "max_positions": 40,
            },
            **{"norm_placement": NormPlacement.post, "embedding_norm": True, "token_types": 2},
        },
    ),
    "transformer-modernbert": (
        "transformer",
        {
            **{"norm": "layer_norm", "embedding_norm": True, "activation": "gelu", "rotary_base": 160000.0},
            "local_attention": LocalAttention(window=30, global_layers=[0], rotary_base=10000.0),
        },
    ),
    "transformer-olmo2": (
        "transformer",
        {"norm_placement": NormPlacement.reordered, "qk_norm": True, "qk_norm_width": QKNormWidth.full, "num_kv_heads": 2},
    ),
    "transformer-qwen2-scaled": (
        "transformer",
        {
            **{"attention_bias": AttentionBias.qkv, "num_kv_heads": 2, "embedding_scale": 2.0, "attention_scale": 0.5},
            "rotary_scaling": RotaryScaling(type=RotaryScalingType.yarn, factor=4.0, original_positions=16),
        },
    ),
    "ngpt": ("ngpt", {}),
    "ngpt-gqa": ("ngpt", {"num_kv_heads": 2, "alpha_init": 0.3, "feed_forward_dim": 48}),
    "bigs": ("bigs", {}),
    "bigs-dual": ("bigs", {"direction": "causal"}),
    "bigs-gate": ("bigs", {"direction": "causal", "causal_form": "gate", "position": "none"}),
    "bigs-single": ("bigs", {"direction": "causal", "causal_form": "single", "gate_activation": "gelu", "num_token_types": 0}),
}
ENUMS = {
    "direction": Direction, "causal_form": CausalForm, "gate_activation": GateActivation,
    "position": Position, "norm": NormType, "feed_forward": FeedForward,
}  # fmt: skip


def config(variant: str) -> Any:
    name, fields = VARIANTS[variant]
    fields = {k: ENUMS[k](v) if k in ENUMS else v for k, v in fields.items()}
    return backbones[name](**(TINY[name] | fields))


def build(variant: str, dtype: torch.dtype = torch.float64, gain: float = 8.0, seed: int = 0) -> Backbone:
    """See testing.backbones.enlarged."""
    return enlarged(config(variant), VOCAB, dtype, gain, seed)


def any_attention(variant: str) -> Attention:
    """Causal, where the variant gives it."""
    supported = config(variant).attention_supported()
    return Attention.causal if Attention.causal in supported else min(supported)
