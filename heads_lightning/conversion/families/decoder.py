"""What the families shaped like Llama share: names of weights, and most of config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.layers import AttentionBias, LocalAttention
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families.base import (
    LAYER,
    SPELLED,
    HFConfig,
    NativeModel,
    activation,
    modules,
    needed,
    rename,
    rotary,
    rotary_fields,
    with_bias,
)
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError

BLOCK, LAYERS = f"backbone.blocks.{LAYER}", f"model.layers.{LAYER}"
MODULES = {
    "model.embed_tokens": "backbone.embedding",
    f"{LAYERS}.self_attn": f"{BLOCK}.attention",
    f"{LAYERS}.mlp": f"{BLOCK}.feed_forward",
    LAYERS: BLOCK,
    "model.norm": "backbone.norm",
}


def decoder_model(config: HFConfig, **fields: Any) -> NativeModel:
    """The native model of a Llama-shaped config.json; `fields` are what the family has of its own."""
    base, scaling = rotary(config)
    backbone = TransformerConfig(
        **(
            {
                "d_model": needed(config, "hidden_size"),
                "num_layers": needed(config, "num_hidden_layers"),
                "num_heads": needed(config, "num_attention_heads"),
                "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
                "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                "feed_forward_dim": needed(config, "intermediate_size"),
                "activation": activation(config, "hidden_act"),
                "norm_eps": float(config["rms_norm_eps"]),
                "rotary_base": base,
                "rotary_scaling": scaling,
                "max_positions": config.get("max_position_embeddings") or 2048,
                "init_std": float(config.get("initializer_range", 0.02)),
            }
            | fields
        )
    )
    head = DefaultLMHeadConfig(bias=False, tie_embeddings=bool(config.get("tie_word_embeddings", False)))
    return NativeModel(backbone, head, needed(config, "vocab_size"))


def decoder_fields(model: NativeModel) -> dict[str, Any]:
    """config.json of a native model, as far as all these families spell it alike."""
    backbone = model.backbone
    if not isinstance(backbone, TransformerConfig):
        raise ConfigError(f"backbone={backbone.name} is no transformer")
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": backbone.d_model,
        "intermediate_size": backbone.ff_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.kv_heads,
        "head_dim": backbone.width_of_head,
        "hidden_act": SPELLED[backbone.activation],
        "max_position_embeddings": backbone.max_positions,
        "initializer_range": backbone.init_std,
        "rms_norm_eps": backbone.norm_eps,
        "tie_word_embeddings": model.head.is_tied,
        "attention_dropout": 0.0,
        "use_cache": True,
        **rotary_fields(backbone),
    }


def decoder_templates(
    model: NativeModel, *, attention_norm: str = "input_layernorm", feed_forward_norm: str = "post_attention_layernorm"
) -> list[StateMappingTemplate]:
    """How the weights of a Llama-shaped model are named."""
    backbone = model.backbone
    assert isinstance(backbone, TransformerConfig)
    biases = backbone.biases_of_attention
    qkv = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    found = [
        rename("model.embed_tokens.weight", "backbone.embedding.weight"),
        rename("model.norm.weight", "backbone.norm.weight"),
        rename(f"{LAYERS}.{attention_norm}.weight", f"{BLOCK}.attention_norm.weight"),
        rename(f"{LAYERS}.{feed_forward_norm}.weight", f"{BLOCK}.feed_forward_norm.weight"),
        *with_bias(f"{LAYERS}.self_attn.o_proj", f"{BLOCK}.attention.output", biases == AttentionBias.all),
    ]
    for theirs, ours in qkv:
        found += with_bias(f"{LAYERS}.self_attn.{theirs}", f"{BLOCK}.attention.{ours}", biases != AttentionBias.none)
    for part in ("gate", "up", "down"):
        found += with_bias(f"{LAYERS}.mlp.{part}_proj", f"{BLOCK}.feed_forward.{part}", backbone.has_feed_forward_bias)
    if backbone.qk_norm:
        found += [
            rename(f"{LAYERS}.self_attn.{p}_norm.weight", f"{BLOCK}.attention.{o}_norm.weight") for p, o in (("q", "query"), ("k", "key"))
        ]
    if not model.head.is_tied:
        found.append(rename("lm_head.weight", "head.w_out.weight"))
    return [*found, *modules(MODULES)]


def decoder_copies(model: NativeModel) -> dict[str, str]:
    """A tied projection that was saved all the same."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.head.is_tied else {}


def attention_bias(config: HFConfig) -> AttentionBias:
    """`attention_bias` of config.json: all four projections or none."""
    return AttentionBias.all if config.get("attention_bias", False) else AttentionBias.none


def sliding_layers(config: HFConfig) -> LocalAttention:
    """Sliding windows by layer, as Qwen writes them."""
    layers, window = range(config["num_hidden_layers"]), config.get("sliding_window")
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in layers]
    if not config.get("use_sliding_window") or window is None:
        if config.get("layer_types") and set(kinds) != {"full_attention"}:
            raise ConfigError("layer_types names sliding layers, but use_sliding_window and sliding_window say no window")
        return LocalAttention()
    return LocalAttention(window=window, global_layers=full_layers(kinds, len(layers)))


def full_layers(kinds: Sequence[str], count: int) -> list[int]:
    """The layers of `layer_types` that see everything."""
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer_types holds {', '.join(sorted(unknown))}; known: full_attention, sliding_attention")
    if len(kinds) != count:
        raise ConfigError(f"layer_types names {len(kinds)} layers where there are {count}")
    return [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


def sliding_fields(backbone: TransformerConfig) -> dict[str, Any]:
    """The same, written."""
    window = backbone.local_attention.window
    kinds = ["sliding_attention" if backbone.is_local(i) else "full_attention" for i in range(backbone.num_layers)]
    told: dict[str, Any] = {"use_sliding_window": window is not None, "sliding_window": window}
    first = next((i for i, kind in enumerate(kinds) if kind == "sliding_attention"), backbone.num_layers)
    return told | {"max_window_layers": first, "layer_types": kinds}
