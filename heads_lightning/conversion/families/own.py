"""model_type=heads_lightning: any native model under its own names, opened by classes that this package registers.

For what no architecture of `transformers` expresses (nGPT, a normalized head, a projection with a bias). config.json holds our configs as
plain values and names no code; `import heads_lightning.conversion.auto` makes `AutoModelForCausalLM` and `AutoModelForMaskedLM` know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.composition.saved import plain, section_from
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.head import LMHeadConfig
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, needed, rename
from heads_lightning.conversion.mapping import StateMappingTemplate
from heads_lightning.registry import ConfigError


class Own(Family):
    """`HeadsLightningForCausalLM`."""

    name = "heads_lightning"
    architecture = "HeadsLightningForCausalLM"
    masked_architecture: ClassVar[str] = "HeadsLightningForMaskedLM"
    """The class for models that see both sides."""
    prefix = "backbone."
    head_prefixes = ("head.",)
    left_out: ClassVar[Mapping[str, str]] = {}

    def native(self, config: HFConfig) -> NativeModel:
        backbone = section_from(BackboneConfig, needed(config, "backbone"), "config.json")
        head = section_from(LMHeadConfig, needed(config, "head"), "config.json")
        return NativeModel(backbone, head, needed(config, "vocab_size"))

    def describe(self, model: NativeModel) -> dict[str, Any]:
        if Attention.encoder_decoder in model.backbone.attention_supported():
            raise ConfigError(f"backbone={model.backbone.name}: our own classes have no encoder beside a decoder, and no other family fits")
        parts = {"backbone": plain(model.backbone), "head": plain(model.head)}
        return {"vocab_size": model.vocab_size, "hidden_size": model.backbone.d_model, **parts}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        from heads_lightning.conversion.native import NativeLM

        return [rename(name, name) for name in NativeLM(model, device="meta").state_dict()]
