"""model_type=heads_lightning: any native model under its own names, opened by classes that this package registers.

For what no architecture of `transformers` expresses (nGPT, a normalized head, a projection with a bias). config.json holds our configs as
plain values and names no code; `import heads_lightning.conversion.auto` makes the Auto classes know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.composition.saved import plain, section_from
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.head import HeadConfig
from heads_lightning.configs.objective_base import ObjectiveConfig
from heads_lightning.configs.value import ValueConfig
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, needed, rename
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError


class Own(Family):
    """`HeadsLightningForCausalLM`, and the classes beside it."""

    name = "heads_lightning"
    architecture = "HeadsLightningForCausalLM"
    prefix = "backbone."
    head_prefixes = ("head.",)
    harmless = frozenset({"hidden_size", "tie_word_embeddings"})
    left_out: ClassVar[Mapping[str, str]] = {}

    def read(self, config: HFConfig) -> NativeModel:
        backbone = section_from(BackboneConfig, needed(config, "backbone"), "config.json")
        head = section_from(HeadConfig, needed(config, "head"), "config.json")
        attention = Attention(config.get("attention") or _attention_of(config))
        told = config.get("objective")
        objective = None if told is None else section_from(ObjectiveConfig, told, "config.json")
        assert objective is None or isinstance(objective, ValueConfig)
        return NativeModel(backbone, head, needed(config, "vocab_size"), attention, objective)

    def of_model(self, model: NativeModel) -> Own:
        if model.head.predicts == "value":
            return OwnValues()
        sees_both = Attention.bidirectional in (model.attention, *_only(model.backbone))
        return OwnMasked() if sees_both else Own()

    def describe(self, model: NativeModel) -> dict[str, Any]:
        if Attention.encoder_decoder in model.backbone.attention_supported():
            raise ConfigError(f"backbone={model.backbone.name}: our own classes have no encoder beside a decoder, and no other family fits")
        parts = {"backbone": plain(model.backbone), "head": plain(model.head)}
        if model.objective is not None:
            parts["objective"] = plain(model.objective)
        sees_both = Attention.bidirectional in (model.attention, *_only(model.backbone))
        attention = Attention.bidirectional if sees_both else Attention.causal
        told = {"vocab_size": model.vocab_size, "hidden_size": model.backbone.d_model, "attention": attention.value}
        return {"architectures": [self.architecture]} | told | parts

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        from heads_lightning.conversion.native import NativeLM

        built = NativeLM(model, device="meta")
        return [rename(name, name, keeps_type=built.keeps_type(name)) for name in built.state_dict()]


class OwnMasked(Own):
    """`HeadsLightningForMaskedLM`: what sees both sides."""

    architecture = "HeadsLightningForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    objective = "mlm"
    attention = Attention.bidirectional


class OwnValues(Own):
    """`HeadsLightningForTokenClassification`: a value at each position."""

    architecture = "HeadsLightningForTokenClassification"
    auto_class = "AutoModelForTokenClassification"
    objective = "value"


def _only(backbone: BackboneConfig) -> frozenset[Attention]:
    """The one attention that a backbone has, where it has but one."""
    supported = backbone.attention_supported()
    return supported if len(supported) == 1 else frozenset()


def _attention_of(config: HFConfig) -> Attention:
    """Of files written before `attention` was."""
    masked = any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())
    return Attention.bidirectional if masked else Attention.causal
