"""T5 in its two shapes: v1.0 (ReLU, tied, scaled before the projection) and v1.1, which Flan-T5 has too (gated GELU, a head of its own)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import NormType
from heads_lightning.configs.layers import FeedForward
from heads_lightning.configs.t5 import T5Config, T5LMHeadConfig, T5Position, T5Preset
from heads_lightning.conversion.families.base import (
    ACTIVATIONS,
    LAYER,
    SPELLED,
    Family,
    HFConfig,
    NativeModel,
    modules,
    needed,
    rename,
)
from heads_lightning.conversion.mapping import StateMappingTemplate, TemplatePlaceholder
from heads_lightning.registry import ConfigError

DECODER_LAYER = TemplatePlaceholder("[decoder_layer]")
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output"}
DEFAULTS = {"feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6}
"""What transformers assumes where config.json is silent."""


class T5(Family):
    """`T5ForConditionalGeneration`."""

    name = "t5"
    architecture = "T5ForConditionalGeneration"
    auto_class = "AutoModelForSeq2SeqLM"
    objective = "span_corruption"
    attention = Attention.encoder_decoder
    prefix = ""
    defaults = DEFAULTS
    harmless = frozenset({"dense_act_fn", "is_gated_act", "is_encoder_decoder", "dropout_rate", "initializer_factor", "n_positions"})
    left_out: ClassVar[Mapping[str, str]] = {
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias": "a table that T5 never reads"
    }

    def read(self, config: HFConfig) -> NativeModel:
        gated, _, spelled = config["feed_forward_proj"].rpartition("-")
        if gated not in ("", "gated") or spelled not in ACTIVATIONS:
            raise ConfigError(f"feed_forward_proj={config['feed_forward_proj']} has no native counterpart")
        # v1.1 says tie_word_embeddings=false; transformers 5 writes true for both and tells them apart by the scale
        tied = config.get("tie_word_embeddings") is not False
        scaled = config.get("scale_decoder_outputs", tied)
        preset = T5Preset.t5_v1_0 if scaled else T5Preset.t5_v1_1
        backbone = T5Config(
            preset=preset,
            d_model=needed(config, "d_model"),
            num_layers=needed(config, "num_layers"),
            num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
            num_heads=needed(config, "num_heads"),
            head_dim=needed(config, "d_kv"),
            feed_forward_dim=needed(config, "d_ff"),
            norm_eps=float(config["layer_norm_epsilon"]),
            feed_forward=FeedForward.gated if gated else FeedForward.plain,
            # transformers reads "gated-gelu" as the approximation
            activation=ACTIVATIONS["gelu_new" if gated and spelled == "gelu" else spelled],
            relative_buckets=config.get("relative_attention_num_buckets", 32),
            relative_max_distance=config.get("relative_attention_max_distance", 128),
        )
        return NativeModel(backbone, T5LMHeadConfig(preset=preset), needed(config, "vocab_size"))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        backbone, head = model.backbone, model.head
        if not isinstance(backbone, T5Config) or not isinstance(head, T5LMHeadConfig):
            raise ConfigError(f"backbone={backbone.name} with head={head.name} is not backbone=t5 with head=t5")
        style = backbone.style
        if style.position_embedding_type != T5Position.relative or style.norm != NormType.rms:
            raise ConfigError("T5 of transformers has position_embedding_type=relative and norm=rms")
        spelled = SPELLED[style.activation]
        gated = style.feed_forward == FeedForward.gated
        if gated and spelled in ("gelu", "gelu_pytorch_tanh"):
            if spelled == "gelu":
                raise ConfigError("backbone.activation=gelu with a gate is read as gelu_tanh by transformers")
            spelled = "gelu"
        return {
            "vocab_size": model.vocab_size,
            "d_model": backbone.d_model,
            "d_kv": backbone.width_of_head,
            "d_ff": backbone.ff_dim,
            "num_layers": backbone.num_layers,
            "num_decoder_layers": backbone.decoder_layers,
            "num_heads": backbone.num_heads,
            "relative_attention_num_buckets": backbone.relative_buckets,
            "relative_attention_max_distance": backbone.relative_max_distance,
            "layer_norm_epsilon": style.norm_eps,
            "feed_forward_proj": f"gated-{spelled}" if gated else spelled,
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            "tie_word_embeddings": head.scales,
            "scale_decoder_outputs": head.scales,
        }

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        backbone = model.backbone
        assert isinstance(backbone, T5Config)
        found = [rename("shared.weight", "backbone.embedding.weight")]
        for stack, layer, branches in (("encoder", LAYER, ("attention",)), ("decoder", DECODER_LAYER, ("attention", "cross_attention"))):
            found += _stack(stack, layer, branches, gated=backbone.style.feed_forward == FeedForward.gated)
        if not model.head.is_tied:
            found.append(rename("lm_head.weight", "head.w_out.weight"))
        same = {f"{stack}.final_layer_norm": f"backbone.{stack}.norm" for stack in ("encoder", "decoder")}
        blocks = {f"{s}.block.{n}": f"backbone.{s}.blocks.{n}" for s, n in (("encoder", LAYER), ("decoder", DECODER_LAYER))}
        return [*found, *modules(blocks | same)]

    def copies(self, model: NativeModel) -> dict[str, str]:
        found = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight")
        return found | ({"lm_head.weight": "shared.weight"} if model.head.is_tied else {})

    def bounds(self, model: NativeModel) -> dict[TemplatePlaceholder, int]:
        assert isinstance(model.backbone, T5Config)
        return {LAYER: model.backbone.num_layers, DECODER_LAYER: model.backbone.decoder_layers}


def _stack(stack: str, layer: str, branches: tuple[str, ...], *, gated: bool) -> list[StateMappingTemplate]:
    """Encoder or decoder: the parts of a block are numbered in the order in which they run."""
    theirs, ours = f"{stack}.block.{layer}.layer", f"backbone.{stack}.blocks.{layer}"
    found = [
        rename(f"{stack}.final_layer_norm.weight", f"backbone.{stack}.norm.weight"),
        rename(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"backbone.{stack}.relative_bias.weight"),
    ]
    for place, (branch, name) in enumerate(zip(branches, ("SelfAttention", "EncDecAttention"), strict=False)):
        found.append(rename(f"{theirs}.{place}.layer_norm.weight", f"{ours}.{branch}_norm.weight"))
        found += [rename(f"{theirs}.{place}.{name}.{q}.weight", f"{ours}.{branch}.{o}.weight") for q, o in PROJECTIONS.items()]
    last = f"{theirs}.{len(branches)}"
    found.append(rename(f"{last}.layer_norm.weight", f"{ours}.feed_forward_norm.weight"))
    linears = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    return found + [rename(f"{last}.DenseReluDense.{a}.weight", f"{ours}.feed_forward.{b}.weight") for a, b in linears.items()]
