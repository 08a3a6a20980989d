"""BiGS under its published names (model_type=BiGS): what `BiGSForMaskedLM`, and `BiGSForCausalLM` of this package, read and write.

No class of `transformers` itself: `import heads_lightning` makes the Auto classes know them. Published folders are pickled files of the
PyTorch port; they are read as tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.head import MLMHeadConfig
from heads_lightning.configs.layers import CausalForm, Convolution, Direction, GateActivation, Position
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
    refuse,
    rename,
    with_bias,
)
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError

BLOCK, LAYERS = f"backbone.blocks.{LAYER}", f"bigs.encoder.layer.{LAYER}"
LINEARS = {"dv": "value", "du_forward": "forward_in", "duc_forward": "forward_out", "dol": "expand", "do": "output"}
SECOND = {"du_backward": "backward_in", "duc_backward": "backward_out"}
TABLES = {"word_embeddings": "embedding", "position_embeddings": "positions", "token_type_embeddings": "token_types"}


class BiGS(Family):
    """`BiGSForMaskedLM`."""

    name = "BiGS"
    architecture = "BiGSForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    objective = "mlm"
    attention = Attention.bidirectional
    prefix = "bigs."
    head_prefixes = ("cls.",)
    defaults: ClassVar[HFConfig] = {
        **{"hidden_size": 768, "num_hidden_layers": 24, "intermediate_size": 3072, "num_ssm": 64, "vocab_size": 30522},
        **{"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        **{"position_embedding_type": "absolute", "direction": "bidirectional", "causal_form": "dual", "final_norm": False},
        **{"gate_activation": "gelu_tanh", "convolution": "auto", "tie_word_embeddings": True, "mask_padding": True},
    }
    harmless = frozenset({"pooler_type", "pre_norm", "decode", "scaling"})
    left_out: ClassVar[Mapping[str, str]] = {
        r"^bigs\.pooler\.": "the pooler, which was never trained",
        r"\.position_ids$": "a table that is computed",
    }

    def read(self, config: HFConfig) -> NativeModel:
        refuse(config, tie_word_embeddings=True, mask_padding=True)
        try:
            backbone = self._backbone(config)
        except ValueError as error:  # a member that an enumeration does not have
            raise ConfigError(f"config.json of model_type=BiGS: {error}") from None
        norm = LayerNormConfig(name=NormType.layer_norm, eps=backbone.norm_eps, bias=True)
        head = MLMHeadConfig(activation=activation(config, "hidden_act").value, layer_norm=norm, bias=True, tie_embeddings=True)
        return NativeModel(backbone, head, needed(config, "vocab_size"), Attention(backbone.direction.value))

    def _backbone(self, config: HFConfig) -> BiGSBackboneConfig:
        kind = config["position_embedding_type"]
        return BiGSBackboneConfig(
            d_model=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            inner_dim=config["intermediate_size"],
            state_size=config["num_ssm"],
            direction=Direction(config["direction"]),
            causal_form=CausalForm(config["causal_form"]),
            gate_activation=GateActivation(config["gate_activation"]),
            convolution=Convolution(config["convolution"]),
            position=Position.learned if kind == "absolute" else Position(kind),
            max_positions=config["max_position_embeddings"],
            num_token_types=config["type_vocab_size"],
            norm_eps=float(config["layer_norm_eps"]),
            final_norm=bool(config["final_norm"]),
            init_std=float(config.get("initializer_range", 0.02)),
        )

    def of_model(self, model: NativeModel) -> BiGS:
        backbone = model.backbone
        return CausalBiGS() if isinstance(backbone, BiGSBackboneConfig) and backbone.is_causal else BiGS()

    def describe(self, model: NativeModel) -> dict[str, Any]:
        backbone, head = model.backbone, model.head
        if not isinstance(backbone, BiGSBackboneConfig) or not isinstance(head, MLMHeadConfig):
            raise ConfigError(f"backbone={backbone.name} with head={head.name} is not backbone=bigs with head=mlm")
        return {
            "vocab_size": model.vocab_size,
            "hidden_size": backbone.d_model,
            "num_hidden_layers": backbone.num_layers,
            "intermediate_size": backbone.inner,
            "num_ssm": backbone.state_size,
            "hidden_act": SPELLED[ACTIVATIONS["gelu_new" if head.activation == "gelu_tanh" else head.activation]],
            "direction": backbone.direction.value,
            "causal_form": backbone.causal_form.value,
            "gate_activation": backbone.gate_activation.value,
            "convolution": backbone.convolution.value,
            "position_embedding_type": "absolute" if backbone.position == Position.learned else "none",
            "max_position_embeddings": backbone.max_positions,
            "type_vocab_size": backbone.num_token_types,
            "layer_norm_eps": backbone.norm_eps,
            "final_norm": backbone.final_norm,
            "initializer_range": backbone.init_std,
            "hidden_dropout_prob": 0.0,
            "tie_word_embeddings": True,
        }

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        backbone = model.backbone
        assert isinstance(backbone, BiGSBackboneConfig)
        tables = dict(TABLES)
        if backbone.position != Position.learned:
            del tables["position_embeddings"]
        if not backbone.num_token_types:
            del tables["token_type_embeddings"]
        found = [rename(f"bigs.embeddings.{theirs}.weight", f"backbone.{ours}.weight") for theirs, ours in tables.items()]
        found += with_bias("bigs.embeddings.LayerNorm", "backbone.embedding_norm", True)
        found += with_bias(f"{LAYERS}.LayerNorm", f"{BLOCK}.norm", True)
        for theirs, ours in (LINEARS | (SECOND if backbone.has_second_branch else {})).items():
            found += with_bias(f"{LAYERS}.{theirs}", f"{BLOCK}.{ours}", True)
        for theirs, ours in (("fs4", "forward_system"), ("bs4", "backward_system"))[: backbone.num_systems]:
            found.append(rename(f"{LAYERS}.{theirs}.D", f"{BLOCK}.{ours}.D", keeps_type=True))
            for part in ("log_step", "A_re", "A_im", "C"):
                found.append(rename(f"{LAYERS}.{theirs}.kernel.{part}", f"{BLOCK}.{ours}.{part}", keeps_type=True))
        if backbone.final_norm:
            found += with_bias("bigs.backbone.LayerNorm", "backbone.norm", True)
        found += with_bias("cls.predictions.transform.dense", "head.dense", True)
        found += with_bias("cls.predictions.transform.LayerNorm", "head.norm", True)
        found.append(rename("cls.predictions.bias", "head.w_out.bias"))
        ran = {f"bigs.{name}": name for name in ("backbone.embedding_norm", BLOCK)}
        return [*found, *modules(ran | {"cls.norm": "head.norm"})]

    def copies(self, model: NativeModel) -> dict[str, str]:
        embedding = "bigs.embeddings.word_embeddings.weight"
        return {"cls.predictions.decoder.weight": embedding, "cls.predictions.decoder.bias": "cls.predictions.bias"}


class CausalBiGS(BiGS):
    """`BiGSForCausalLM`: the same files with direction=causal."""

    architecture = "BiGSForCausalLM"
    auto_class = "AutoModelForCausalLM"
    objective = "causal"
    attention = Attention.causal
