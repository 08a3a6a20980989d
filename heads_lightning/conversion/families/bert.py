"""BERT with its head for masked language modelling. The pooler and the next-sentence head are no part of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.configs.head import MLMHeadConfig
from heads_lightning.configs.layers import FeedForward, NormPlacement, Position
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

POOLER = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
BLOCK, LAYERS = f"backbone.blocks.{LAYER}", f"bert.encoder.layer.{LAYER}"
LINEARS = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}


class Bert(Family):
    """`BertForMaskedLM`."""

    name = "bert"
    architecture = "BertForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    objective = "mlm"
    attention = Attention.bidirectional
    prefix = "bert."
    head_prefixes = ("cls.",)
    defaults: ClassVar[HFConfig] = {
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512},
    }
    harmless = frozenset({"directionality", *(f"pooler_{part}" for part in POOLER)})
    left_out: ClassVar[Mapping[str, str]] = {
        r"\.position_ids$": "a table that is computed",
        r"^bert\.pooler\.": "the pooler, which no language-model head reads",
        r"^cls\.seq_relationship\.": "the next-sentence head",
    }

    def read(self, config: HFConfig) -> NativeModel:
        # untied, transformers 5 has two biases of which one is read; which of them a file means depends on who wrote it
        refuse(config, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False, tie_word_embeddings=True)
        eps = float(config["layer_norm_eps"])
        backbone = TransformerConfig(
            d_model=needed(config, "hidden_size"),
            num_layers=needed(config, "num_hidden_layers"),
            num_heads=needed(config, "num_attention_heads"),
            feed_forward=FeedForward.plain,
            feed_forward_dim=needed(config, "intermediate_size"),
            activation=activation(config, "hidden_act"),
            norm=NormType.layer_norm,
            norm_eps=eps,
            norm_placement=NormPlacement.post,
            embedding_norm=True,
            bias=True,
            token_types=config["type_vocab_size"],
            position=Position.learned,
            max_positions=config["max_position_embeddings"],
            init_std=float(config.get("initializer_range", 0.02)),
        )
        norm = LayerNormConfig(name=NormType.layer_norm, eps=eps, bias=True)
        head = MLMHeadConfig(activation=activation(config, "hidden_act").value, layer_norm=norm, bias=True, tie_embeddings=True)
        return NativeModel(backbone, head, needed(config, "vocab_size"))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        backbone = model.backbone
        if not isinstance(backbone, TransformerConfig):
            raise ConfigError(f"backbone={backbone.name} is no transformer")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": backbone.d_model,
            "num_hidden_layers": backbone.num_layers,
            "num_attention_heads": backbone.num_heads,
            "intermediate_size": backbone.ff_dim,
            "hidden_act": SPELLED[backbone.activation],
            "layer_norm_eps": backbone.norm_eps,
            "type_vocab_size": backbone.token_types,
            "max_position_embeddings": backbone.max_positions,
            "initializer_range": backbone.init_std,
            "tie_word_embeddings": model.head.is_tied,
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        }

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        found = [
            rename("bert.embeddings.word_embeddings.weight", "backbone.embedding.weight"),
            rename("bert.embeddings.position_embeddings.weight", "backbone.positions.weight"),
            rename("bert.embeddings.token_type_embeddings.weight", "backbone.token_types.weight"),
            *with_bias("bert.embeddings.LayerNorm", "backbone.embedding_norm", True),
            *with_bias("cls.predictions.transform.dense", "head.dense", True),
            *with_bias("cls.predictions.transform.LayerNorm", "head.norm", True),
            rename("cls.predictions.bias", "head.w_out.bias"),
        ]
        for theirs, ours in LINEARS.items():
            found += with_bias(f"{LAYERS}.{theirs}", f"{BLOCK}.{ours}", True)
        same = {"bert.embeddings": "backbone.embedding_norm", f"{LAYERS}.attention": f"{BLOCK}.attention_norm", LAYERS: BLOCK}
        return [*found, *modules(same | {"cls.predictions.transform": "head.norm"})]

    def copies(self, model: NativeModel) -> dict[str, str]:
        embedding = "bert.embeddings.word_embeddings.weight"
        return {"cls.predictions.decoder.weight": embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}
