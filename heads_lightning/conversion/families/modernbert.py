"""ModernBERT with its head for masked language modelling: local and global layers alternate, each kind with its own rotary base."""

from __future__ import annotations

from typing import Any

from heads_lightning.batch import Attention
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.configs.head import MLMHeadConfig
from heads_lightning.configs.layers import AttentionBias, LocalAttention, RotaryScalingType
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families.base import (
    ACTIVATIONS,
    LAYER,
    SPELLED,
    Family,
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
from heads_lightning.conversion.families.decoder import full_layers
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError

BLOCK, LAYERS = f"backbone.blocks.{LAYER}", f"model.layers.{LAYER}"
QKV = tuple(f"{BLOCK}.attention.{name}" for name in ("query", "key", "value"))
GATED = tuple(f"{BLOCK}.feed_forward.{name}" for name in ("gate", "up"))
DEFAULTS = {
    **{"hidden_activation": "gelu", "classifier_activation": "gelu", "norm_eps": 1e-5, "local_attention": 128},
    **{"decoder_bias": True, "tie_word_embeddings": True, "global_attn_every_n_layers": 3},
}
"""What transformers assumes where config.json is silent."""


class ModernBert(Family):
    """`ModernBertForMaskedLM`."""

    name = "modernbert"
    architecture = "ModernBertForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    objective = "mlm"
    attention = Attention.bidirectional
    head_prefixes = ("head.", "decoder.")
    defaults = DEFAULTS
    harmless = frozenset(
        {
            *("classifier_pooling", "embedding_dropout", "mlp_dropout", "initializer_cutoff_factor", "sparse_prediction"),
            *("sparse_pred_ignore_index", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad"),
            *("position_embedding_type", "layer_norm_eps"),  # in published files; the class reads neither
        }
    )

    def read(self, config: HFConfig) -> NativeModel:
        base, scaling = rotary(config, default_base=float(config.get("global_rope_theta", 160000.0)))
        norm = LayerNormConfig(name=NormType.layer_norm, eps=float(config["norm_eps"]), bias=bool(config.get("norm_bias", False)))
        backbone = TransformerConfig(
            d_model=needed(config, "hidden_size"),
            num_layers=needed(config, "num_hidden_layers"),
            num_heads=needed(config, "num_attention_heads"),
            feed_forward_dim=needed(config, "intermediate_size"),
            activation=activation(config, "hidden_activation"),
            norm=NormType.layer_norm,
            norm_eps=norm.eps,
            norm_bias=norm.bias,
            embedding_norm=True,
            attention_bias=AttentionBias.all if config.get("attention_bias", False) else AttentionBias.none,
            feed_forward_bias=bool(config.get("mlp_bias", False)),
            local_attention=_local(config),
            rotary_base=base,
            rotary_scaling=scaling,
            max_positions=config.get("max_position_embeddings", 8192),
            init_std=float(config.get("initializer_range", 0.02)),
        )
        head = MLMHeadConfig(
            activation=activation(config, "classifier_activation").value,
            dense_bias=bool(config.get("classifier_bias", False)),
            layer_norm=norm,
            bias=bool(config["decoder_bias"]),
            tie_embeddings=bool(config["tie_word_embeddings"]),
        )
        return NativeModel(backbone, head, needed(config, "vocab_size"))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        backbone, head = model.backbone, model.head
        if not isinstance(backbone, TransformerConfig) or not isinstance(head, MLMHeadConfig):
            raise ConfigError(f"backbone={backbone.name} with head={head.name} is not a transformer with head=mlm")
        local = backbone.local_attention
        local_base = backbone.rotary_base if local.rotary_base is None else local.rotary_base
        rope = {"full_attention": rotary_fields(backbone)["rope_parameters"]}
        rope["sliding_attention"] = {"rope_type": "default", "rope_theta": local_base}
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": backbone.d_model,
            "num_hidden_layers": backbone.num_layers,
            "num_attention_heads": backbone.num_heads,
            "intermediate_size": backbone.ff_dim,
            "hidden_activation": SPELLED[backbone.activation],
            "max_position_embeddings": backbone.max_positions,
            "initializer_range": backbone.init_std,
            "norm_eps": backbone.norm_eps,
            "norm_bias": backbone.norm_config().bias,
            "attention_bias": backbone.biases_of_attention == AttentionBias.all,
            "mlp_bias": backbone.has_feed_forward_bias,
            "local_attention": 128 if local.window is None else 2 * (local.window - 1),
            "layer_types": ["sliding_attention" if backbone.is_local(i) else "full_attention" for i in range(backbone.num_layers)],
            "rope_parameters": rope,
            "global_rope_theta": backbone.rotary_base,
            "local_rope_theta": local_base,
            "classifier_activation": SPELLED[ACTIVATIONS[_spelled(head.activation)]],
            "classifier_bias": head.dense_bias,
            "decoder_bias": head.has_bias,
            "tie_word_embeddings": head.is_tied,
            **_every(backbone),
        }

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        backbone, head = model.backbone, model.head
        assert isinstance(backbone, TransformerConfig)
        assert isinstance(head, MLMHeadConfig)
        norm_bias, attention = backbone.norm_config().bias, backbone.biases_of_attention == AttentionBias.all
        found = [
            rename("model.embeddings.tok_embeddings.weight", "backbone.embedding.weight"),
            *with_bias("model.embeddings.norm", "backbone.embedding_norm", norm_bias),
            *with_bias("model.final_norm", "backbone.norm", norm_bias),
            *with_bias(f"{LAYERS}.mlp_norm", f"{BLOCK}.feed_forward_norm", norm_bias),
            *with_bias(f"{LAYERS}.attn.Wo", f"{BLOCK}.attention.output", attention),
            *with_bias(f"{LAYERS}.mlp.Wo", f"{BLOCK}.feed_forward.down", backbone.has_feed_forward_bias),
            *_split(f"{LAYERS}.attn.Wqkv", QKV, attention),
            *_split(f"{LAYERS}.mlp.Wi", GATED, backbone.has_feed_forward_bias),
            *with_bias("head.dense", "head.dense", head.dense_bias),
            *with_bias("head.norm", "head.norm", norm_bias),
        ]
        for layer in range(1, backbone.num_layers):  # the first layer reads the embedding's norm
            found += with_bias(f"model.layers.{layer}.attn_norm", f"backbone.blocks.{layer}.attention_norm", norm_bias)
        if not head.is_tied:
            found.append(rename("decoder.weight", "head.w_out.weight"))
        if head.has_bias:
            found.append(rename("decoder.bias", "head.w_out.bias"))
        same = {"model.embeddings.norm": "backbone.embedding_norm", f"{LAYERS}.attn": f"{BLOCK}.attention", LAYERS: BLOCK}
        return [*found, *modules(same | {"model.final_norm": "backbone.norm", "head": "head.norm"})]

    def copies(self, model: NativeModel) -> dict[str, str]:
        return {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if model.head.is_tied else {}


def _split(source: str, dests: tuple[str, ...], bias: bool) -> list[StateMappingTemplate]:
    """A linear layer that is several, one below the other."""
    return [StateMappingTemplate(f"{source}.{p}", tuple(f"{d}.{p}" for d in dests)) for p in (("weight", "bias") if bias else ("weight",))]


def _local(config: HFConfig) -> LocalAttention:
    layers, every = range(config["num_hidden_layers"]), config["global_attn_every_n_layers"]
    kinds = config.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in layers]
    full, theta = full_layers(kinds, len(layers)), float(config.get("local_rope_theta", 10000.0))
    width = config["local_attention"]
    if len(full) == len(layers):
        return LocalAttention()
    base, scaling = rotary(config, default_base=theta, layers="sliding_attention")
    if scaling.type != RotaryScalingType.none:
        raise ConfigError("rope_parameters.sliding_attention of modernbert is scaled, which has no native counterpart")
    return LocalAttention(window=width // 2 + 1, global_layers=full, rotary_base=base)


def _every(backbone: TransformerConfig) -> dict[str, int]:
    """transformers 4 knows a period alone."""
    full = [i for i in range(backbone.num_layers) if not backbone.is_local(i)]
    fits = [n for n in range(1, backbone.num_layers + 1) if full == list(range(0, backbone.num_layers, n))]
    return {"global_attn_every_n_layers": fits[0]} if fits else {}


def _spelled(activation: str) -> str:
    return "gelu_new" if activation == "gelu_tanh" else activation
