"""What a family is: how a Hugging Face architecture reads as a native model, and back.

A family translates descriptions (config.json ↔ our configs) and declares how weights are named, from Hugging Face to native; the other
direction is the inverse. Whether a native model fits a family is not a list of conditions: it is described as that family, read back, and
compared with what it was. Every field of a config.json is read, known to make no difference to what a model computes, or refused. Nothing
here imports torch: a config of a downloaded folder composes on a login node.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.head import HeadConfig
from heads_lightning.configs.layers import Activation, Position, RotaryScaling, RotaryScalingType
from heads_lightning.configs.t5 import T5Config
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.configs.value import ValueConfig, ValueHeadConfig
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
    head: HeadConfig
    """Hidden states to logits, or to values."""
    vocab_size: int
    """Rows of the embedding and of the projection."""
    attention: Attention | None = None
    """How it was trained to see. None: as the family that it is written as."""
    objective: ValueConfig | None = None
    """What its values are judged by (head=value): it says how many outputs the head has."""


class Fields(Mapping[str, Any]):
    """A config.json over the values that transformers assumes, which knows what it was asked for."""

    def __init__(self, config: HFConfig, defaults: HFConfig) -> None:
        self._values = {**defaults, **config}
        self._given = set(config)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> dict[str, Any]:
        """Fields of the file that nobody asked for and that are not off (null, false or empty)."""
        return {key: value for key in self._given - self._read if (value := self._values[key]) not in (None, False, "", [], {})}


class Family(ABC):
    """One architecture of Hugging Face's `transformers`."""

    name: str
    """Its `model_type`."""
    architecture: str
    """The class that config.json names."""
    auto_class: str = "AutoModelForCausalLM"
    """What opens it in `transformers`."""
    objective: str = "causal"
    """The objective it was made for."""
    attention: Attention = Attention.causal
    """How its positions see each other."""
    prefix: str = "model."
    """What stands before the trunk's weights."""
    head_prefixes: tuple[str, ...] = ("lm_head.",)
    """What the head's weights begin with."""
    defaults: ClassVar[HFConfig] = MappingProxyType({})
    """What transformers assumes where config.json is silent."""
    harmless: frozenset[str] = frozenset()
    """Fields of its config.json, beside those of HARMLESS, that make no difference to logits or values."""
    left_out: ClassVar[Mapping[str, str]] = {r"rotary_emb\.inv_freq$": "a table that is computed"}
    """Pattern of names that are not converted → why; the report says which there were."""

    def native(self, config: HFConfig) -> NativeModel:
        """The native model that config.json describes.

        Raises:
            ConfigError: it has no native counterpart, or a field is set that this family does not know.
        """
        fields = Fields(config, self.defaults)
        model = self.read(fields)
        unknown = {key: value for key, value in fields.unread().items() if key not in HARMLESS | self.harmless}
        if unknown:
            said = ", ".join(f"{key}={str(value)[:60]}" for key, value in sorted(unknown.items()))
            raise ConfigError(
                f"config.json of model_type={config.get('model_type')} sets {said}, which is not known here; "
                f"take it out if the model computes the same without it"
            )
        return model if model.attention is not None else replace(model, attention=self.attention)

    @abstractmethod
    def read(self, config: HFConfig) -> NativeModel:
        """The native model, from the fields that matter; `native` sees to the others."""

    def of_model(self, model: NativeModel) -> Family:
        """The family itself, or the one of the same model_type that a model belongs to."""
        return self

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
        if model.attention not in (None, back.attention, Attention.prefix):
            return f"it reads {model.attention}, {self.architecture} {back.attention}"
        wanted, got = effective(model), effective(back)
        different = [f"{key}={wanted.get(key)} (there it is {got.get(key)})" for key in wanted | got if wanted.get(key) != got.get(key)]
        return ", ".join(different[:3]) or None


HARMLESS = frozenset(
    {
        # how the file was made, and how transformers runs and returns
        *("model_type", "architectures", "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "torchscript"),
        *(
            "use_cache",
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "output_past",
            "use_return_dict",
            "chunk_size_feed_forward",
        ),
        *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "gradient_checkpointing", "use_bfloat16"),
        *("pretraining_tp", "auto_map", "tokenizer_class", "processor_class", "unsloth_version", "unsloth_fixed"),  # auto_map: never run
        # names of classes and tasks
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "classifier_dropout"),
        # token ids: written from the tokenizer; embeddings of padding are as good as others
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
        *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens"),
        # how to generate
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "diversity_penalty"),
        *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores", "return_dict_in_generate", "prefix"),
        *("exponential_decay_length_penalty", "remove_invalid_values", "bad_words_ids"),
        # training alone
        *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
        "summary_dropout_prob",
    }
)
"""Fields of any config.json that make no difference to what a model computes."""


def rename(source: str, dest: str, *, keeps_type: bool = False) -> StateMappingTemplate:
    """One weight under another name."""
    return StateMappingTemplate(source, dest, keeps_type=keeps_type)


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


ROTARY_EVERYWHERE = ("original_max_position_embeddings",)
"""Written whatever the kind is, and read by none but its own."""
ROTARY_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_slow", "beta_fast", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
}
"""Kinds of rotary frequencies → the fields that they read, beside rope_type and rope_theta."""


def rotary(config: HFConfig, *, default_base: float = 10000.0, layers: str = "full_attention") -> tuple[float, RotaryScaling]:
    """Base and stretch of the rotary frequencies, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes them."""
    scaling, parameters, theta = config.get("rope_scaling"), config.get("rope_parameters"), config.get("rope_theta")
    original = config.get("original_max_position_embeddings")
    given = dict(scaling or parameters or {})
    given = dict(given.get(layers) or {}) if layers in given else given
    base = float(given.pop("rope_theta", None) or theta or default_base)
    kinds = {key: given.pop(key) for key in ("type", "rope_type") if key in given}
    kind = kinds.get("rope_type", kinds.get("type", "default"))
    partial = config.get("partial_rotary_factor")
    if (given.pop("partial_rotary_factor", None) or partial or 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor has no native counterpart: all dimensions of a head are rotated")
    if kind not in ROTARY_FIELDS:
        raise ConfigError(f"rope_type={kind} has no native counterpart; known: {', '.join(ROTARY_FIELDS)}")
    if unknown := [key for key, value in given.items() if value is not None and key not in (*ROTARY_EVERYWHERE, *ROTARY_FIELDS[kind])]:
        raise ConfigError(f"rope_type={kind} with {', '.join(sorted(unknown))} has no native counterpart")
    if kind == "default":
        return base, RotaryScaling()
    if given.get("factor") is None:
        raise ConfigError(f"config.json of model_type={config.get('model_type')} has rope_type={kind} without factor")
    return base, RotaryScaling(
        type=RotaryScalingType(kind),
        factor=float(given["factor"]),
        original_positions=int(given.get("original_max_position_embeddings") or original or config.get("max_position_embeddings") or 0),
        low_frequency_factor=float(given.get("low_freq_factor") or 1.0),
        high_frequency_factor=float(given.get("high_freq_factor") or 4.0),
        slow_turns=float(given.get("beta_slow") or 1.0),
        fast_turns=float(given.get("beta_fast") or 32.0),
        whole_dimensions=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(given) if kind == "yarn" else None,
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
    for kind, names in FIELDS.items():
        if isinstance(model.backbone, kind):
            described |= {f"backbone.{name}": getattr(model.backbone, name) for name in names}
    if isinstance(model.backbone, BiGSBackboneConfig):
        described["backbone.form"] = model.backbone.causal_form if model.backbone.is_causal else None
        described["backbone.max_positions"] = model.backbone.max_positions if model.backbone.position == Position.learned else None
    if model.head.predicts == "value":
        described["head.outputs"] = (model.objective or ValueConfig()).num_outputs
    return described


FIELDS: dict[type[BackboneConfig], tuple[str, ...]] = {
    T5Config: (
        *("style", "d_model", "num_layers", "decoder_layers", "num_heads", "width_of_head", "ff_dim", "decoder_ff_dim"),
        *("relative_buckets", "relative_max_distance"),
    ),
    BiGSBackboneConfig: (
        *("d_model", "num_layers", "inner", "state_size", "direction", "gate_activation", "position", "num_token_types", "norm_eps"),
        "final_norm",
    ),
}
"""What makes a difference to what a backbone computes."""


def _effective_head(head: HeadConfig) -> dict[str, Any]:
    described = {"head": head.name, "head.layer_norm": _effective_norm(getattr(head, "layer_norm", None))}
    for field in ("is_tied", "logit_softcap", "has_bias", "activation", "dense_bias", "scales", "steps_ahead", "hidden_dim"):
        described[f"head.{field}"] = getattr(head, field, None)
    if isinstance(head, ValueHeadConfig):
        described |= {"head.bias": head.bias, "head.projection": head.lm_weight > 0}
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
