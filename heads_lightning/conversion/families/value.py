"""Models with a value head: a family's trunk, and a score at each position where its projection is.

Two layouts, either way round:

    token_classification   `…ForTokenClassification` with one label: `score` (or `classifier`) over the last hidden state
    v_head                 `…ForCausalLM` with `v_head.summary` among the weights, as TRL had it until 1.12 and
                           `heads_lightning.models.value` has it: head=value with a projection (head.lm_weight > 0)

What of the head and of its objective transformers has no field for travels as plain values in config.json, and has defaults without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from heads_lightning.batch import Attention
from heads_lightning.composition.saved import plain, section_from
from heads_lightning.configs.head import DefaultLMHeadConfig, HeadConfig, MLMHeadConfig
from heads_lightning.configs.objective_base import ObjectiveConfig
from heads_lightning.configs.value import ValueAlignment, ValueConfig, ValueHeadConfig, ValueInit
from heads_lightning.conversion.families.base import Family, HFConfig, NativeModel, rename, with_bias
from heads_lightning.conversion.mapping import StateMappingTemplate, TemplatePlaceholder
from heads_lightning.registry import ConfigError

HEAD, OBJECTIVE = "value_head", "value_objective"
"""Fields of config.json that hold our configs."""
CLASSIFIERS = {"llama": "score", "mistral": "score", "qwen2": "score", "qwen3": "score", "gpt2": "classifier", "bert": "classifier"}
"""model_type of families with a class for tokens → name of its last layer. (modernbert's has more layers than one; olmo2 has none.)"""
V_HEADS = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
"""model_type of the families whose projection may stand beside a value head."""


class ValueFamily(Family):
    """What both layouts share.

    Args:
        trunk: the family that the trunk belongs to.
    """

    objective = "value"

    def __init__(self, trunk: Family) -> None:
        self.trunk = trunk
        self.name, self.prefix, self.attention = trunk.name, trunk.prefix, trunk.attention
        self.defaults = trunk.defaults  # pyright: ignore[reportAttributeAccessIssue]
        self.harmless, self.left_out = trunk.harmless | {"tie_word_embeddings"}, trunk.left_out  # pyright: ignore[reportAttributeAccessIssue]

    def _trunk_of(self, model: NativeModel) -> NativeModel:
        """A model of the trunk's own family with the same trunk."""
        tied = model.head.is_tied
        bert = self.trunk.attention == Attention.bidirectional
        head = MLMHeadConfig(tie_embeddings=True) if bert else DefaultLMHeadConfig(bias=False, tie_embeddings=tied)
        return replace(model, head=head, objective=None, attention=None)

    def _told(self, config: HFConfig, otherwise: ValueHeadConfig, alignment: ValueAlignment) -> tuple[ValueHeadConfig, ValueConfig]:
        """Head and objective, as config.json says or by default."""
        head, objective = config.get(HEAD), config.get(OBJECTIVE)
        found = otherwise if head is None else section_from(HeadConfig, head, "config.json")
        sees_both = self.attention == Attention.bidirectional
        judged = ValueConfig(alignment=alignment, bidirectional=sees_both)
        judged = judged if objective is None else section_from(ObjectiveConfig, objective, "config.json")
        if not isinstance(found, ValueHeadConfig) or not isinstance(judged, ValueConfig):
            raise ConfigError(f"config.json: {HEAD} and {OBJECTIVE} are not head=value and objective=value")
        return found, judged

    def _head(self, model: NativeModel) -> tuple[ValueHeadConfig, ValueConfig]:
        """Head and objective of a native model that is to be written."""
        if not isinstance(model.head, ValueHeadConfig):
            raise ConfigError(f"head={model.head.name} scores no values")
        if model.head.hidden_dim is not None or model.head.layer_norm is not None:
            raise ConfigError(f"{self.architecture} scores with one linear layer: no head.hidden_dim, no head.layer_norm")
        return model.head, model.objective or ValueConfig()

    def _described(self, model: NativeModel) -> dict[str, Any]:
        head, objective = self._head(model)
        return self.trunk.describe(self._trunk_of(model)) | {HEAD: plain(head), OBJECTIVE: plain(objective)}

    def _trunk_templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        found = self.trunk.templates(self._trunk_of(model))
        return [t for t in found if str(t.dest_template_keys).lstrip("('").startswith("backbone.")]

    def bounds(self, model: NativeModel) -> dict[TemplatePlaceholder, int]:
        return self.trunk.bounds(model)


class TokenClassification(ValueFamily):
    """`…ForTokenClassification`, opened by AutoModelForTokenClassification."""

    auto_class = "AutoModelForTokenClassification"

    def __init__(self, trunk: Family) -> None:
        super().__init__(trunk)
        self.architecture = _class_name(trunk)
        self.layer = CLASSIFIERS[trunk.name]
        self.head_prefixes = (f"{self.layer}.",)

    def read(self, config: HFConfig) -> NativeModel:
        labels, model = _labels(config), self.trunk.read(config)
        bias = bool(config.get("token_classification_bias", True))
        plainly = ValueHeadConfig(bias=bias, dropout=config.get("classifier_dropout") or 0.0, init=ValueInit.default)
        head, objective = self._told(config, plainly, ValueAlignment.after_token)
        if labels != objective.num_outputs:
            raise ConfigError(
                f"{self.architecture} has {labels} labels, which are classes and no value; head=value reads one "
                f"(or what {OBJECTIVE} in config.json says)"
            )
        return replace(model, head=replace(head, bias=bias), objective=objective)

    def describe(self, model: NativeModel) -> dict[str, Any]:
        head, objective = self._head(model)
        if head.lm_weight:
            raise ConfigError(f"{self.architecture} has no projection onto the vocabulary; head.lm_weight={head.lm_weight} needs one")
        if not head.bias and self.layer == "classifier":
            raise ConfigError(f"{self.architecture} has a bias in its last layer; head.bias=false needs another")
        names = {i: f"VALUE_{i}" for i in range(objective.num_outputs)}
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        return self._described(model) | labels | {"classifier_dropout": head.dropout, "token_classification_bias": head.bias}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        head, _ = self._head(model)
        score = with_bias(self.layer, "head.summary", head.bias)
        return [*self._trunk_templates(model), *(replace(template, keeps_type=True) for template in score)]


class VHead(ValueFamily):
    """`…ForCausalLM` and a value head, opened by heads_lightning.models.value.AutoModelForCausalLMWithValueHead."""

    auto_class = "AutoModelForCausalLMWithValueHead"

    def __init__(self, trunk: Family) -> None:
        super().__init__(trunk)
        self.architecture = trunk.architecture
        self.head_prefixes = (*trunk.head_prefixes, V_HEAD)

    def read(self, config: HFConfig) -> NativeModel:
        model = self.trunk.read(config)
        dropout = config.get("summary_dropout_prob", 0.1) or 0.0
        tied = model.head.is_tied
        plainly = ValueHeadConfig(dropout=dropout, init=ValueInit.default, lm_weight=1.0, tie_embeddings=tied)
        head, objective = self._told(config, plainly, ValueAlignment.state_before_action)
        return replace(model, head=head, objective=objective)

    def describe(self, model: NativeModel) -> dict[str, Any]:
        head, objective = self._head(model)
        if not head.lm_weight:
            raise ConfigError(f"{self.architecture} has a projection onto the vocabulary beside the value head; head.lm_weight=0 has none")
        if objective.num_outputs != 1 or not head.bias:
            raise ConfigError("v_head.summary has one output and a bias")
        return self._described(model) | {"summary_dropout_prob": head.dropout}

    def templates(self, model: NativeModel) -> list[StateMappingTemplate]:
        score = with_bias(f"{V_HEAD}summary", "head.summary", True)
        projection = [] if model.head.is_tied else [rename("lm_head.weight", "head.lm_head.w_out.weight")]
        return [*self._trunk_templates(model), *projection, *(replace(template, keeps_type=True) for template in score)]

    def copies(self, model: NativeModel) -> dict[str, str]:
        return self.trunk.copies(self._trunk_of(model))

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        return self.trunk.canonical([n for n in names if not n.startswith(V_HEAD)]) | {n: n for n in names if n.startswith(V_HEAD)}


V_HEAD = "v_head."


def value_family(trunk: Family, config: HFConfig, names: Iterable[str] = ()) -> ValueFamily | None:
    """The family of a folder with a value head, by its config.json and the names of its weights; None where there is none."""
    classifies = any(str(name).endswith("ForTokenClassification") for name in config.get("architectures") or ())
    if any(name.startswith(V_HEAD) for name in names) or (HEAD in config and not classifies):
        if trunk.name not in V_HEADS:
            raise ConfigError(f"a v_head beside model_type={trunk.name} cannot be converted; known: {', '.join(V_HEADS)}")
        return VHead(trunk)
    return TokenClassification(trunk) if classifies and trunk.name in CLASSIFIERS else None


def _class_name(trunk: Family) -> str:
    for ending in ("LMHeadModel", "ForCausalLM", "ForMaskedLM"):
        if trunk.architecture.endswith(ending):
            return trunk.architecture.removesuffix(ending) + "ForTokenClassification"
    raise AssertionError(trunk.architecture)


def _labels(config: HFConfig) -> int:
    """Labels that a config.json tells of; transformers assumes two."""
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels") or 2)
