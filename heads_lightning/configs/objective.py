"""Objectives: what is hidden and what is the target (`objective=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry

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
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Roles of the special tokens that it needs: names of fields of objectives.base.Vocabulary."""

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


@objectives.register("prefix_lm")
@dataclass
class PrefixLMConfig(ObjectiveConfig):
    """Prefix language modelling (arXiv 1910.10683, 3.2.3): read the beginning of each document from both sides, predict the rest."""

    attention: ClassVar[Attention] = Attention.prefix

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
class SpanCorruptionConfig(ObjectiveConfig):
    """Span corruption (T5, arXiv 1910.10683): sentinels replace spans of the text; predict what each hides. For decoder-only backbones."""

    attention: ClassVar[Attention] = Attention.prefix
    special_tokens: ClassVar[tuple[str, ...]] = ("sentinels",)

    name: str = "span_corruption"
    rate: float = 0.15
    """Share of the tokens that are hidden."""
    mean_length: float = 3.0
    """Mean tokens of a span."""
    edges: SpanEdges = SpanEdges.uniform
    """How often the tokens at a window's edges are hidden; `seqio` repeats T5's numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.rate < 1, "rate", "more than 0, less than 1")
        self.require(self.mean_length >= 1, "mean_length", "1 or more")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.span_corruption import SpanCorruption

        return SpanCorruption(self, vocabulary)


@dataclass
class EncoderDecoderSpanCorruptionConfig(SpanCorruptionConfig):
    """Span corruption for encoder-decoder backbones. Not an option until such a backbone is."""

    attention: ClassVar[Attention] = Attention.encoder_decoder
