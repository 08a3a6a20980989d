"""The families that can be converted, by model_type. `register` adds one of yours; `OWN` takes every native model, for our own classes."""

from __future__ import annotations

from collections.abc import Iterable

from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, effective
from heads_lightning.conversion.families.bert import Bert
from heads_lightning.conversion.families.bigs import BiGS
from heads_lightning.conversion.families.gpt2 import GPT2
from heads_lightning.conversion.families.llama import Llama
from heads_lightning.conversion.families.mistral import Mistral
from heads_lightning.conversion.families.modernbert import ModernBert
from heads_lightning.conversion.families.olmo2 import Olmo2
from heads_lightning.conversion.families.own import Own
from heads_lightning.conversion.families.qwen2 import Qwen2
from heads_lightning.conversion.families.qwen3 import Qwen3
from heads_lightning.conversion.families.t5 import T5
from heads_lightning.conversion.families.value import CLASSIFIERS, V_HEADS, TokenClassification, ValueFamily, VHead, value_family
from heads_lightning.registry import ConfigError, nearest

__all__ = [
    "FAMILIES",
    "OWN",
    "Family",
    "NativeModel",
    "ValueFamily",
    "effective",
    "family_of_config",
    "family_of_model",
    "register",
    "with_values",
]

FAMILIES: dict[str, Family] = {}
OWN = Own()


def register(family: Family) -> Family:
    """Make a family known under its model_type; a taken one is an error."""
    if family.name in FAMILIES:
        raise ConfigError(f"model_type={family.name} is registered twice: by {type(FAMILIES[family.name])} and by {type(family)}")
    FAMILIES[family.name] = family
    return family


for _family in (Llama(), Mistral(), Qwen2(), Qwen3(), Olmo2(), GPT2(), Bert(), ModernBert(), T5(), BiGS(), OWN):
    register(_family)


def with_values() -> list[ValueFamily]:
    """The families with a value head: those of tokens, then those beside a projection."""
    tokens = [TokenClassification(FAMILIES[name]) for name in CLASSIFIERS if name in FAMILIES]
    return [*tokens, *(VHead(FAMILIES[name]) for name in V_HEADS if name in FAMILIES)]


def family_of_config(config: HFConfig, names: Iterable[str] = ()) -> Family:
    """The family that a config.json names; `names` of its weights tell a value head."""
    family = _named(str(config.get("model_type")))
    return value_family(family, config, names) or family


def _named(name: str) -> Family:
    found = FAMILIES.get(name) or next((family for known, family in FAMILIES.items() if known.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"model_type={name} cannot be converted.{nearest(name, FAMILIES)} Known: {', '.join(FAMILIES)}")
    return found


def family_of_model(model: NativeModel, name: str | None = None) -> Family:
    """The family that a native model is written as: the one asked for, else the first that expresses it exactly, else our own.

    Raises:
        ConfigError: the family asked for cannot express the model; the message says why.
    """
    values = model.head.predicts == "value"
    candidates = [f.of_model(model) for f in ([*with_values(), OWN] if values else FAMILIES.values())]
    if name is None:
        return next((family for family in candidates if family.refusal(model) is None), OWN.of_model(model))
    asked = [family for family in candidates if family.name == _named(name).name]
    fits = next((family for family in asked if family.refusal(model) is None), None)
    if fits is not None:
        return fits
    reasons = "; ".join(
        f"{family.architecture}: {family.refusal(model)}" if len(asked) > 1 else str(family.refusal(model)) for family in asked
    )
    reasons = reasons or f"head={model.head.name} has no place there"
    raise ConfigError(f"family={name} cannot express this model: {reasons}; leave family out to use {family_of_model(model).name}")
