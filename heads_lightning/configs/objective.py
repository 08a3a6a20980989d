"""Objectives: what is hidden and what is the target (`objective=…`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from heads_lightning.batch import Attention
from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry, nearest

if TYPE_CHECKING:
    from heads_lightning.objectives.base import Vocabulary


@dataclass
class ObjectiveConfig(Option):
    """Base of every objective."""

    group: ClassVar[str] = "objective"
    predicts: ClassVar[str] = "token"
    """What a target is: must equal the head's `predicts`."""
    attention: ClassVar[Attention] = Attention.causal
    """Which positions a position may see."""
    other_attention: ClassVar[frozenset[Attention]] = frozenset()
    """Attention kinds that it takes on other backbones (see `fitted`)."""
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Roles of the special tokens that it needs: names of fields of objectives.base.Vocabulary."""

    def fitted(self, supported: frozenset[Attention]) -> ObjectiveConfig:
        """This objective in the form that a backbone with these attention kinds trains with; itself where there is one form alone."""
        return self

    def build(self, vocabulary: Vocabulary) -> Any:
        """The objective (heads_lightning.objectives.base.Objective) for a vocabulary."""
        raise NotImplementedError  # abstract


objectives: Registry[ObjectiveConfig] = Registry("objective", ObjectiveConfig)


@objectives.register("causal")
@dataclass
class CausalConfig(ObjectiveConfig):
    """Predict the next token."""

    name: str = "causal"

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.causal import Causal

        return Causal(self, vocabulary)


class FIMCut(StrEnum):
    """Where a document may be cut into prefix, middle and suffix."""

    char = "char"
    """Between any two characters; the parts are tokenised as if each stood alone."""
    token = "token"
    """Between two tokens."""
    line = "line"
    """Between two lines; the parts are tokenised as if each stood alone."""


class FIMLevel(StrEnum):
    """What is cut (arXiv 2207.14255, section 3)."""

    context = "context"
    """The pieces of documents in a window, after the window is chosen: no piece is ever broken."""
    document = "document"
    """Whole documents, before windows are chosen: windows break most of them (kept for comparison)."""


class SPMLayout(StrEnum):
    """The two layouts that are both called suffix–prefix–middle (arXiv 2207.14255, section 3)."""

    variant1 = "variant1"
    """SUF suffix PRE prefix MID middle END."""
    variant2 = "variant2"
    """PRE SUF suffix MID prefix middle END: prefix and middle stay one stream of text (StarCoder, Megatron)."""


class FIMLoss(StrEnum):
    """Which positions of a transformed piece have a target."""

    all = "all"
    """All: what keeps left-to-right quality (arXiv 2207.14255)."""
    middle = "middle"
    """The middle and its end marker alone."""


@objectives.register("fim")
@dataclass
class FIMConfig(ObjectiveConfig):
    """Fill in the middle (arXiv 2207.14255): cut a document in three, move the middle to the end, predict the next token."""

    special_tokens: ClassVar[tuple[str, ...]] = ("fim_prefix", "fim_suffix", "fim_middle", "fim_end")

    name: str = "fim"
    rate: float = 0.5
    """Share of pieces that are transformed; the others stay left to right."""
    spm_rate: float = 0.5
    """Share of transformed pieces laid out suffix–prefix–middle; the others prefix–suffix–middle."""
    cut: FIMCut = FIMCut.char
    """Where cuts may fall."""
    level: FIMLevel = FIMLevel.context
    """What is cut: pieces of a window, or whole documents."""
    spm: SPMLayout = SPMLayout.variant2
    """Layout of suffix–prefix–middle."""
    loss_on: FIMLoss = FIMLoss.all
    """Which positions of a transformed piece have a target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.rate <= 1, "rate", "0 to 1")
        self.require(0 <= self.spm_rate <= 1, "spm_rate", "0 to 1")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.fim import FIM

        return FIM(self, vocabulary)


class MLMUnit(StrEnum):
    """What is masked together."""

    token = "token"
    word = "word"
    """Whole words: every token of a chosen word."""


@objectives.register("mlm")
@dataclass
class MLMConfig(ObjectiveConfig):
    """Masked language modelling (BERT, arXiv 1810.04805): hide some tokens, predict them from both sides."""

    attention: ClassVar[Attention] = Attention.bidirectional
    special_tokens: ClassVar[tuple[str, ...]] = ("mask",)

    name: str = "mlm"
    rate: float = 0.15
    """Share of tokens (or words) chosen as targets."""
    mask_share: float = 0.8
    """Of the chosen: share replaced by the mask token."""
    random_share: float = 0.1
    """Of the chosen: share replaced by a random ordinary token; the rest is kept as it is."""
    unit: MLMUnit = MLMUnit.token
    """What is masked together: single tokens or whole words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.rate <= 1, "rate", "more than 0, up to 1")
        self.require(0 <= self.mask_share <= 1, "mask_share", "0 to 1")
        self.require(0 <= self.random_share <= 1, "random_share", "0 to 1")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ConfigError(f"objective.mask_share={self.mask_share} and objective.random_share={self.random_share} sum to more than 1")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.mlm import MLM

        return MLM(self, vocabulary)


class Form(StrEnum):
    """How an objective that has an input and a target shows them to the model."""

    auto = "auto"
    """As the backbone is. A composed or saved experiment says which of the others that is."""
    decoder_only = "decoder_only"
    """One sequence: the input is a prefix that is read from both sides, the target follows."""
    encoder_decoder = "encoder_decoder"
    """Two sequences: the encoder reads the input, the decoder writes the target."""


@dataclass
class InputTargetConfig(ObjectiveConfig):
    """Base of objectives that have an input and a target, for decoder-only and encoder-decoder backbones alike."""

    attention: ClassVar[Attention] = Attention.prefix
    other_attention: ClassVar[frozenset[Attention]] = frozenset({Attention.encoder_decoder})

    form: Form = Form.auto
    """How input and target are shown: `auto` follows the backbone, the others insist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.form = Form(self.form)
        if self.form == Form.encoder_decoder:  # of this config, not of the class: what validation compares with the backbone
            self.attention = Attention.encoder_decoder  # pyright: ignore[reportAttributeAccessIssue]

    def fitted(self, supported: frozenset[Attention]) -> ObjectiveConfig:
        if self.form != Form.auto:
            return self
        if Attention.prefix in supported:
            return replace(self, form=Form.decoder_only)
        return replace(self, form=Form.encoder_decoder) if Attention.encoder_decoder in supported else self


@objectives.register("prefix_lm")
@dataclass
class PrefixLMConfig(InputTargetConfig):
    """Prefix language modelling (arXiv 1910.10683, 3.2.3): read the beginning of each document from both sides, predict the rest."""

    name: str = "prefix_lm"
    prefix_min: float = 0.0
    """Least share of a document's piece that is prefix."""
    prefix_max: float = 1.0
    """Largest share; at least one token is always predicted. The share is uniform between the two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.prefix_min <= 1, "prefix_min", "0 to 1")
        self.require(self.prefix_min <= self.prefix_max <= 1, "prefix_max", f"prefix_min ({self.prefix_min}) to 1")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.prefix_lm import PrefixLM

        return PrefixLM(self, vocabulary)


class SpanEdges(StrEnum):
    """How often the tokens at a window's edges are hidden."""

    seqio = "seqio"
    """As in T5: the first token never, the last always."""
    uniform = "uniform"
    """As often as any other."""


@objectives.register("span_corruption")
@dataclass
class SpanCorruptionConfig(InputTargetConfig):
    """Span corruption (T5, arXiv 1910.10683): sentinels replace spans of the text; predict what each hides."""

    special_tokens: ClassVar[tuple[str, ...]] = ("sentinels",)

    name: str = "span_corruption"
    rate: float = 0.15
    """Share of the tokens that are hidden."""
    mean_length: float = 3.0
    """Mean tokens of a span."""
    edges: SpanEdges = SpanEdges.uniform
    """How often the tokens at a window's edges are hidden; `seqio` repeats T5's numbers."""
    encoder_end: bool = True
    """Close the encoder's input with the end-of-document token, as T5 does and Megatron does not. Encoder-decoder form only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder_end and self.form == Form.decoder_only:
            raise ConfigError("objective.encoder_end=false needs an encoder; leave it out or use backbone=t5")
        self.require(0 < self.rate < 1, "rate", "more than 0, less than 1")
        self.require(self.mean_length >= 1, "mean_length", "1 or more")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.span_corruption import SpanCorruption

        return SpanCorruption(self, vocabulary)


@objectives.register("ul2")
@dataclass
class UL2Config(InputTargetConfig):
    """UL2's mixture of denoisers (arXiv 2205.05131): short spans, prefixes, and long or many spans."""

    special_tokens: ClassVar[tuple[str, ...]] = ("sentinels",)

    name: str = "ul2"
    r_weight: float = 0.4
    """Weight of regular denoising: 15 % in short spans."""
    s_weight: float = 0.2
    """Weight of sequential denoising: the end of each document."""
    x_weight: float = 0.4
    """Weight of extreme denoising: half of the tokens, or long spans."""
    edges: SpanEdges = SpanEdges.uniform
    """How often the tokens at a window's edges are hidden. With `seqio` a long span at 15 % is nearly always the end of the window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in ("r_weight", "s_weight", "x_weight"):
            self.require(getattr(self, weight) >= 0, weight, "0 or more")
        if self.r_weight + self.s_weight + self.x_weight <= 0:
            raise ConfigError("objective=ul2 has no part: objective.r_weight, s_weight and x_weight are all 0; give one of them a weight")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.ul2 import ul2

        return ul2(self, vocabulary)


@objectives.register("mixture")
@dataclass
class MixtureConfig(ObjectiveConfig):
    """Several objectives: each sample is given to one of them, by weight. The loss of each is reported on its own."""

    name: str = "mixture"
    parts: dict[str, Any] = field(
        default_factory=lambda: {"left_to_right": {"name": "causal", "weight": 0.5}, "fim": {"name": "fim", "weight": 0.5, "rate": 1.0}}
    )
    """Parts by a name of your choice: the objective's `name`, its `weight` (1 if not given; 0 leaves the part out), and any of that
    objective's own fields."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError("objective.parts={} has no part; give one, e.g. 'objective.parts={a:{name:causal},b:{name:fim,weight:2}}'")
        configs = self.part_configs()
        if not configs:
            raise ConfigError("objective.parts gives every part the weight 0; give one of them a weight")
        kinds: set[Attention] = {config.attention for config in configs.values()}
        if kinds == {Attention.causal, Attention.prefix}:
            kinds = {Attention.prefix}  # a causal part has an empty prefix
        if len(kinds) > 1:
            each = ", ".join(f"{part} {config.attention}" for part, config in configs.items())
            raise ConfigError(f"objective.parts cannot be mixed in one batch, their attention differs: {each}; leave one kind out")
        # of this mixture, not of the class: what validation compares with the backbone
        self.attention = kinds.pop()  # pyright: ignore[reportAttributeAccessIssue]
        self.special_tokens = tuple(  # pyright: ignore[reportAttributeAccessIssue]
            dict.fromkeys(role for config in configs.values() for role in config.special_tokens)
        )

    def fitted(self, supported: frozenset[Attention]) -> ObjectiveConfig:
        chosen = {part: config.fitted(supported) for part, config in self.part_configs().items()}
        forms = {part: {"form": config.form.value} for part, config in chosen.items() if isinstance(config, InputTargetConfig)}
        parts = {part: {**given, **forms.get(part, {})} for part, given in self.parts.items()}
        return self if parts == self.parts else replace(self, parts=parts)

    def part_configs(self) -> dict[str, ObjectiveConfig]:
        """The parts' own configs, validated."""
        configs = {}
        for part, given in self.parts.items():
            place = f"objective.parts.{part}"
            if not isinstance(given, Mapping) or "name" not in given:
                raise ConfigError(f"{place}={given} names no objective; write {{name: causal, weight: 1}}")
            settings = {key: value for key, value in given.items() if key not in ("name", "weight")}
            if given["name"] == "mixture":
                raise ConfigError(f"{place}.name=mixture is a mixture in a mixture; list its parts here instead")
            if not isinstance(given.get("weight", 1), (int, float)) or given.get("weight", 1) < 0:
                raise ConfigError(f"{place}.weight={given['weight']} is out of range; a weight is 0 (left out) or more")
            if given.get("weight", 1) == 0:
                continue
            configs[part] = _from_mapping(objectives[given["name"]], settings, place)
            if getattr(configs[part], "level", None) == FIMLevel.document:
                raise ConfigError(f"{place}.level=document rewrites the stream of all parts; use {place}.level=context")
        return configs

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.mixture import Mixture, Part

        parts = [
            Part(part, float(self.parts[part].get("weight", 1)), config.build(vocabulary)) for part, config in self.part_configs().items()
        ]
        return Mixture(parts, self.attention, vocabulary)


def _from_mapping(cls: type[ObjectiveConfig], settings: Mapping[str, Any], place: str) -> ObjectiveConfig:
    """An option from plain values, each checked against the type of its field."""
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.name != "name"}
    values = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{place}.{key} does not exist.{nearest(key, known)} Available: {', '.join(known)}")
        values[key] = _parse(known[key], value, f"{place}.{key}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(str(error).replace("objective.", f"{place}.", 1)) from None


def _parse(kind: Any, value: Any, place: str) -> Any:
    """`value` as a member of the enum, or a number, that the field is; other types as they are."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if value not in list(kind):
            raise ConfigError(f"{place}={value} is not possible; it is {', '.join(kind)}")
        return kind(value)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{place}={value} is not possible; it is a {kind.__name__}")
        return kind(value)
    return value
