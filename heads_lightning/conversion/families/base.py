"""What a family is: how a Hugging Face architecture reads as a native model, and back.

A family translates descriptions (config.json ↔ our configs) and declares how weights are named, from Hugging Face to native; the other
direction is the inverse. Whether a native model fits a family is not a list of conditions: it is described as that family, read back, and
compared with what it was. Nothing here imports torch: a config of a downloaded folder composes on a login node.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, TransformerConfig
from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.configs.head import LMHeadConfig
from heads_lightning.configs.layers import Activation, Position, RotaryScaling, RotaryScalingType
from heads_lightning.configs.t5 import T5Config
from heads_lightning.conversion.mapping import StateMappingTemplate, StateType, TemplatePlaceholder
from heads_lightning.registry import ConfigError

LAYER = TemplatePlaceholder.LAYER
HFConfig = Mapping[str, Any]
"""Contents of a config.json."""


@dataclass(frozen=True)
class NativeModel:
    """A model of this package: what it is built from."""

    backbone: BackboneConfig
    """Tokens to hidden states."""
    head: LMHeadConfig
    """Hidden states to logits."""
    vocab_size: int
    """Rows of the embedding and of the projection."""


class Family(ABC):
    """One architecture of Hugging Face's `transformers`."""

    name: ClassVar[str]
    """Its `model_type`."""
    architecture: ClassVar[str]
    """The class with a language-model head that config.json names."""
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """What opens it in `transformers`."""
    objective: ClassVar[str] = "causal"
    """The objective it was made for."""
    attention: ClassVar[Attention] = Attention.causal
    """How its positions see each other."""
    prefix: ClassVar[str] = "model."
    """What stands before the trunk's weights."""
    head_prefixes: ClassVar[tuple[str, ...]] = ("lm_head.",)
    """What the head's weights begin with."""
    left_out: ClassVar[Mapping[str, str]] = {r"rotary_emb\.inv_freq$": "a table that is computed"}
    """Pattern of names that are not converted → why; the report says which there were."""

    @abstractmethod
    def native(self, config: HFConfig) -> NativeModel:
        """The native model that config.json describes. Raises ConfigError for what it cannot express."""

    @abstractmethod
    def describe(self, model: NativeModel) -> dict[str, Any]:
        """The config.json of a native model, as far as this family can tell it."""

    @abstractmethod
    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        """How weights correspond, from Hugging Face to native, and which modules do."""

    def copies(self, model: NativeModel) -> dict[str, str]:
        """Weights that some checkpoints hold twice: name of the copy → name of the one that counts."""
        return {}

    def bounds(self, model: NativeModel) -> dict[TemplatePlaceholder, int]:
        """How many values each placeholder has."""
        return {LAYER: getattr(model.backbone, "num_layers", 0)}

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Name that the templates use → name in a checkpoint: trunks saved alone lack their prefix, old ones spell norms differently."""
        names = list(names)
        bare = not any(name.startswith(self.prefix) for name in names)
        found = {}
        for name in names:
            own = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            found[self.prefix + own if bare and not own.startswith(self.head_prefixes) else own] = name
        return found

    def reason_left_out(self, name: str) -> str | None:
        """Why a weight is not converted, or None where it is."""
        return next((reason for pattern, reason in self.left_out.items() if re.search(pattern, name)), None)

    def refusal(self, model: NativeModel) -> str | None:
        """Why this family cannot express a native model exactly, or None where it can."""
        try:
            back = self.native(self.describe(model))
        except ConfigError as error:
            return str(error)
        wanted, got = effective(model), effective(back)
        different = [f"{key}={wanted.get(key)} (there it is {got.get(key)})" for key in wanted | got if wanted.get(key) != got.get(key)]
        return ", ".join(different[:3]) or None


def rename(source: str, dest: str) -> StateMappingTemplate:
    """One weight under another name."""
    return StateMappingTemplate(source, dest)


def with_bias(source: str, dest: str, bias: bool) -> list[StateMappingTemplate]:
    """A linear layer or norm: its weight, and its bias where it has one."""
    return [rename(f"{source}.{part}", f"{dest}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def modules(pairs: Mapping[str, str]) -> list[StateMappingTemplate]:
    """Modules whose outputs are the same hidden states."""
    return [StateMappingTemplate(source, dest, StateType.module) for source, dest in pairs.items()]


# -- reading config.json ------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "relu": Activation.relu,
    "relu2": Activation.relu_squared,
}
SPELLED = {
    Activation.silu: "silu",
    Activation.gelu: "gelu",
    Activation.gelu_tanh: "gelu_pytorch_tanh",
    Activation.relu: "relu",
    Activation.relu_squared: "relu2",
}
"""How transformers spells an activation."""


def needed(config: HFConfig, key: str) -> Any:
    """A value without which the model has no size."""
    if config.get(key) is None:
        raise ConfigError(f"config.json of model_type={config.get('model_type')} has no {key}")
    return config[key]


def activation(config: HFConfig, key: str) -> Activation:
    """The activation that `key` names."""
    try:
        return ACTIVATIONS[config[key]]
    except KeyError:
        raise ConfigError(f"{key}={config.get(key)} has no native counterpart; known: {', '.join(ACTIVATIONS)}") from None


def refuse(config: HFConfig, **only: Any) -> None:
    """Refuse values of config.json other than the one that the native model has (which is also what an absent key means)."""
    for key, value in only.items():
        if config.get(key, value) not in (value, None):
            raise ConfigError(f"{key}={config[key]} has no native counterpart; only {key}={value} can be converted")


def rotary(config: HFConfig, *, default_base: float = 10000.0, layers: str = "full_attention") -> tuple[float, RotaryScaling]:
    """Base and stretch of the rotary frequencies, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes them."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given = dict(given.get(layers) or {}) if layers in given else given
    base = float(given.get("rope_theta") or config.get("rope_theta") or default_base)
    kind = given.get("rope_type", given.get("type", "default"))
    if (given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor has no native counterpart: all dimensions of a head are rotated")
    if kind == "default":
        return base, RotaryScaling()
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"rope_type={kind} has no native counterpart; known: default, linear, llama3, yarn")
    trained = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return base, RotaryScaling(
        type=RotaryScalingType(kind),
        factor=float(given["factor"]),
        original_positions=int(trained or config.get("max_position_embeddings") or 0),
        low_frequency_factor=float(given.get("low_freq_factor") or 1.0),
        high_frequency_factor=float(given.get("high_freq_factor") or 4.0),
        slow_turns=float(given.get("beta_slow") or 1.0),
        fast_turns=float(given.get("beta_fast") or 32.0),
        whole_dimensions=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(given),
    )


def _attention_factor(given: HFConfig) -> float | None:
    """yarn's, where it is given or follows from mscale and mscale_all_dim (DeepSeek's spelling)."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return None
    plain = RotaryScaling(type=RotaryScalingType.yarn, factor=float(given["factor"])).temperature - 1.0
    return (given["mscale"] * plain + 1.0) / (given["mscale_all_dim"] * plain + 1.0)


def rotary_fields(backbone: TransformerConfig) -> dict[str, Any]:
    """Base and stretch of the rotary frequencies, as both transformers 4 and 5 read them."""
    scaling = backbone.rotary_scaling
    if scaling.type == RotaryScalingType.none:
        return {"rope_theta": backbone.rotary_base, "rope_parameters": {"rope_type": "default", "rope_theta": backbone.rotary_base}}
    told: dict[str, Any] = {"rope_type": scaling.type.value, "factor": scaling.factor}
    if scaling.type != RotaryScalingType.linear:
        told["original_max_position_embeddings"] = scaling.original_positions
    if scaling.type == RotaryScalingType.llama3:
        told |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.type == RotaryScalingType.yarn:
        told |= {"beta_slow": scaling.slow_turns, "beta_fast": scaling.fast_turns, "attention_factor": scaling.temperature}
        told |= {} if scaling.whole_dimensions else {"truncate": False}
    return {"rope_theta": backbone.rotary_base, "rope_scaling": told, "rope_parameters": told | {"rope_theta": backbone.rotary_base}}


# -- comparing native models --------------------------------------------------------------------------------------------


def effective(model: NativeModel) -> dict[str, Any]:
    """What a native model computes, with every default filled in and what makes no difference left out."""
    described = {"vocab_size": model.vocab_size, "backbone": model.backbone.name, **_effective_head(model.head)}
    if isinstance(model.backbone, TransformerConfig):
        described |= {f"backbone.{key}": value for key, value in _effective_backbone(model.backbone).items()}
    if isinstance(model.backbone, T5Config):
        described |= {f"backbone.{field}": getattr(model.backbone, field) for field in T5_FIELDS}
    return described


T5_FIELDS = (
    *("style", "d_model", "num_layers", "decoder_layers", "num_heads", "width_of_head", "ff_dim", "decoder_ff_dim"),
    *("relative_buckets", "relative_max_distance"),
)


def _effective_head(head: LMHeadConfig) -> dict[str, Any]:
    described = {"head": head.name, "head.layer_norm": _effective_norm(head.layer_norm)}
    for field in ("is_tied", "logit_softcap", "has_bias", "activation", "dense_bias", "scales"):
        described[f"head.{field}"] = getattr(head, field, None)
    return described


def _effective_norm(norm: LayerNormConfig | None) -> Any:
    return None if norm is None else (norm.name, norm.eps, norm.bias and norm.name == "layer_norm")


def _effective_backbone(config: TransformerConfig) -> dict[str, Any]:
    plain = ("d_model", "num_layers", "num_heads", "feed_forward", "activation", "norm_placement", "embedding_norm", "embedding_scale")
    described = {field: getattr(config, field) for field in (*plain, "token_types", "position")}
    described |= {"num_kv_heads": config.kv_heads, "head_dim": config.width_of_head, "feed_forward_dim": config.ff_dim}
    described |= {"attention_bias": config.biases_of_attention, "feed_forward_bias": config.has_feed_forward_bias}
    described["norm"] = _effective_norm(config.norm_config())
    described["qk_norm"] = config.qk_norm_width if config.qk_norm else None
    described["attention_scale"] = config.attention_scale or config.width_of_head**-0.5
    local = config.local_attention
    if any(config.is_local(layer) for layer in range(config.num_layers)):
        described["local_attention"] = (local.window, sorted(local.global_layers), local.rotary_base)
    if config.position == Position.learned:
        described["max_positions"] = config.max_positions
    if config.position == Position.rotary:
        described |= {"rotary_base": config.rotary_base, "rotary_scaling": _effective_scaling(config.rotary_scaling)}
    return described


def _effective_scaling(scaling: RotaryScaling) -> list[Any]:
    if scaling.type == RotaryScalingType.none:
        return []
    described: list[Any] = [scaling.type, scaling.factor, scaling.temperature]
    if scaling.type == RotaryScalingType.llama3:
        described += [scaling.original_positions, scaling.low_frequency_factor, scaling.high_frequency_factor]
    if scaling.type == RotaryScalingType.yarn:
        described += [scaling.original_positions, scaling.slow_turns, scaling.fast_turns, scaling.whole_dimensions]
    return described
