"""GPT-2. Its matrices are stored input by output, and queries, keys and values are one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.configs.base import NormType
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.layers import Activation, FeedForward, Position
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion.families.base import (
    LAYER,
    SPELLED,
    Family,
    HFConfig,
    NativeModel,
    activation,
    modules,
    needed,
    refuse,
    rename,
    with_bias,
)
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError

BLOCK, LAYERS = f"backbone.blocks.{LAYER}", f"transformer.h.{LAYER}"
QKV = tuple(f"{BLOCK}.attention.{name}" for name in ("query", "key", "value"))


class GPT2(Family):
    """`GPT2LMHeadModel`."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    defaults: ClassVar[HFConfig] = {"activation_function": "gelu_new", "tie_word_embeddings": True}
    harmless = frozenset(
        {
            *("attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx", "summary_activation"),
            *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        }
    )
    left_out: ClassVar[Mapping[str, str]] = {r"\.attn\.(masked_)?bias$": "a causal mask, not a weight"}

    def read(self, config: HFConfig) -> NativeModel:
        refuse(config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
        d_model = needed(config, "n_embd")
        backbone = TransformerConfig(
            d_model=d_model,
            num_layers=needed(config, "n_layer"),
            num_heads=needed(config, "n_head"),
            feed_forward=FeedForward.plain,
            feed_forward_dim=config.get("n_inner") or 4 * d_model,
            activation=activation(config, "activation_function"),
            norm=NormType.layer_norm,
            norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
            bias=True,
            position=Position.learned,
            max_positions=config.get("n_positions", 1024),
            attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
            init_std=float(config.get("initializer_range", 0.02)),
        )
        head = DefaultLMHeadConfig(bias=False, tie_embeddings=bool(config["tie_word_embeddings"]))
        return NativeModel(backbone, head, needed(config, "vocab_size"))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        backbone = model.backbone
        if not isinstance(backbone, TransformerConfig):
            raise ConfigError(f"backbone={backbone.name} is no transformer")
        return {
            "vocab_size": model.vocab_size,
            "n_embd": backbone.d_model,
            "n_layer": backbone.num_layers,
            "n_head": backbone.num_heads,
            "n_inner": backbone.ff_dim,
            "n_positions": backbone.max_positions,
            "activation_function": "gelu_new" if backbone.activation == Activation.gelu_tanh else SPELLED[backbone.activation],
            "layer_norm_epsilon": backbone.norm_eps,
            "initializer_range": backbone.init_std,
            "scale_attn_weights": backbone.attention_scale is None,
            "tie_word_embeddings": model.head.is_tied,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        }

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        found = [
            rename("transformer.wte.weight", "backbone.embedding.weight"),
            rename("transformer.wpe.weight", "backbone.positions.weight"),
            *with_bias("transformer.ln_f", "backbone.norm", True),
            *with_bias(f"{LAYERS}.ln_1", f"{BLOCK}.attention_norm", True),
            *with_bias(f"{LAYERS}.ln_2", f"{BLOCK}.feed_forward_norm", True),
            StateMappingTemplate(f"{LAYERS}.attn.c_attn.weight", tuple(f"{m}.weight" for m in QKV), dims_permutation=(1, 0)),
            StateMappingTemplate(f"{LAYERS}.attn.c_attn.bias", tuple(f"{m}.bias" for m in QKV)),
        ]
        for theirs, ours in (("attn.c_proj", "attention.output"), ("mlp.c_fc", "feed_forward.up"), ("mlp.c_proj", "feed_forward.down")):
            found.append(StateMappingTemplate(f"{LAYERS}.{theirs}.weight", f"{BLOCK}.{ours}.weight", dims_permutation=(1, 0)))
            found.append(rename(f"{LAYERS}.{theirs}.bias", f"{BLOCK}.{ours}.bias"))
        if not model.head.is_tied:
            found.append(rename("lm_head.weight", "head.w_out.weight"))
        same = {"transformer.wte": "backbone.embedding", f"{LAYERS}.attn": f"{BLOCK}.attention", f"{LAYERS}.mlp": f"{BLOCK}.feed_forward"}
        return [*found, *modules(same | {LAYERS: BLOCK, "transformer.ln_f": "backbone.norm"})]

    def copies(self, model: NativeModel) -> dict[str, str]:
        return {"lm_head.weight": "transformer.wte.weight"} if model.head.is_tied else {}
