"""The families that can be converted, by model_type. `register` adds one of yours; `OWN` takes every native model, for our own classes."""

from __future__ import annotations

from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, effective
from heads_lightning.conversion.families.bert import Bert
from heads_lightning.conversion.families.gpt2 import GPT2
from heads_lightning.conversion.families.llama import Llama
from heads_lightning.conversion.families.mistral import Mistral
from heads_lightning.conversion.families.modernbert import ModernBert
from heads_lightning.conversion.families.olmo2 import Olmo2
from heads_lightning.conversion.families.own import Own
from heads_lightning.conversion.families.qwen2 import Qwen2
from heads_lightning.conversion.families.qwen3 import Qwen3
from heads_lightning.conversion.families.t5 import T5
from heads_lightning.registry import ConfigError, nearest

__all__ = ["FAMILIES", "OWN", "Family", "NativeModel", "effective", "family_of_config", "family_of_model", "register"]

FAMILIES: dict[str, Family] = {}
OWN = Own()


def register(family: Family) -> Family:
    """Make a family known under its model_type; a taken one is an error."""
    if family.name in FAMILIES:
        raise ConfigError(f"model_type={family.name} is registered twice: by {type(FAMILIES[family.name])} and by {type(family)}")
    FAMILIES[family.name] = family
    return family


for _family in (Llama(), Mistral(), Qwen2(), Qwen3(), Olmo2(), GPT2(), Bert(), ModernBert(), T5(), OWN):
    register(_family)


def family_of_config(config: HFConfig) -> Family:
    """The family that a config.json names."""
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise ConfigError(f"model_type={name} cannot be converted.{nearest(name, FAMILIES)} Known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_model(model: NativeModel, name: str | None = None) -> Family:
    """The family that a native model is written as: the one asked for, else the first that expresses it exactly, else our own.

    Raises:
        ConfigError: the family asked for cannot express the model; the message says why.
    """
    if name is None:
        return next((family for family in FAMILIES.values() if family.refusal(model) is None), OWN)
    family = family_of_config({"model_type": name})
    reason = family.refusal(model)
    if reason is not None:
        raise ConfigError(f"family={name} cannot express this model: {reason}; leave family out to use {family_of_model(model).name}")
    return family
