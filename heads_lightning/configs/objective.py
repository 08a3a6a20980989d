"""Objectives: what is hidden and what is the target (`objective=…`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.fim_format import FIMCut, FIMLayouts, FIMLevel, FIMLoss, SPMLayout, fim_format
from heads_lightning.configs.objective_base import ObjectiveConfig as ObjectiveConfig
from heads_lightning.configs.objective_base import objectives as objectives
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    from heads_lightning.objectives.base import Vocabulary


class CausalLevel(StrEnum):
    """What a row is made of."""

    context = "context"
    """A window of the packed stream: no padding; a document is cut wherever the window ends."""
    document = "document"
    """Whole documents, packed best-fit (arXiv 2404.10830) and padded: one is cut only if it is longer than a row. Each token is read once
    an epoch. Padding is logged as data/padding_share."""


@objectives.register("causal")
@dataclass
class CausalConfig(ObjectiveConfig):
    """Predict the next token."""

    name: str = "causal"
    level: CausalLevel = CausalLevel.context
    """What a row is made of: a window of the packed stream, or whole documents."""

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.causal import Causal

        return Causal(self, vocabulary)


@objectives.register("fim")
@dataclass
class FIMConfig(ObjectiveConfig):
    """Fill in the middle (arXiv 2207.14255): cut a document in three, move the middle to the end, predict the next token."""

    special_tokens: ClassVar[tuple[str, ...]] = ("fim_prefix", "fim_suffix", "fim_middle", "fim_end")

    name: str = "fim"
    rate: float = 0.5
    """Share of pieces that are transformed; the others stay left to right."""
    rate_start: float | None = None
    """Share at the beginning of training. None: `rate` throughout."""
    rate_tokens: int = 0
    """Positions of training over which the share goes linearly from rate_start to rate. 0: no schedule."""
    spm_rate: float | None = None
    """Share of transformed pieces laid out suffix–prefix–middle; the others prefix–suffix–middle. None: half, or the one layout that the
    format knows."""
    cut: FIMCut = FIMCut.char
    """Where cuts may fall."""
    level: FIMLevel = FIMLevel.context
    """What is cut: pieces of a window, or whole documents."""
    spm: SPMLayout | None = None
    """Layout of suffix–prefix–middle. None: the format's (variant 2 for our own sentinels)."""
    format: str | None = None
    """Family whose sentinels and order are used (own, starcoder, santacoder, code_llama, deepseek_coder, qwen_coder, codegemma, codestral,
    olmo). None: the one that the tokenizer belongs to."""
    loss_on: FIMLoss = FIMLoss.all
    """Which positions of a transformed piece have a target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.rate <= 1, "rate", "0 to 1")
        self.require(self.spm_rate is None or 0 <= self.spm_rate <= 1, "spm_rate", "0 to 1, or null")
        self._require_ramp()
        if self.rate_tokens and self.level == FIMLevel.document:
            raise ConfigError("objective.rate_start needs objective.level=context: whole documents are rewritten once an epoch")
        if self.format is not None:
            fim_format(self.format)
        if self.spm == SPMLayout.suffix_first and self.spm_rate == 1:
            self.special_tokens = tuple(role for role in type(self).special_tokens if role != "fim_middle")  # pyright: ignore[reportAttributeAccessIssue]

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.fim import FIM

        return FIM(self, vocabulary)

    def layouts(self, tokenizer_format: str) -> FIMLayouts:
        """What is laid out how, for a tokenizer whose sentinels are those of a family."""
        known, theirs = fim_format(self.format or tokenizer_format), fim_format(tokenizer_format)
        if known.spellings != theirs.spellings:
            raise ConfigError(
                f"objective.format={self.format} does not fit the tokenizer, whose infilling tokens are those of {tokenizer_format}; "
                f"use objective.format={tokenizer_format} or another tokenizer"
            )
        spm = self.spm or known.spm or SPMLayout.variant2
        share = self.spm_rate
        if share is None:
            share = 0.5 if known.psm and known.spm else 1.0 if known.spm else 0.0
        if known.middle is None and (share < 1 or spm != SPMLayout.suffix_first):
            raise ConfigError(
                f"objective.format={known.name} has no middle sentinel: it knows objective.spm=suffix_first, spm_rate=1 alone"
            )
        return FIMLayouts(known.name, spm, share)


class MLMUnit(StrEnum):
    """What is masked together."""

    token = "token"
    word = "word"
    """Whole words: every token of a chosen word."""
    span = "span"
    """Runs of tokens with lengths from a geometric distribution (SpanBERT, arXiv 1907.10529, section 3.1), replaced or kept as one."""


class MLMCount(StrEnum):
    """How the number of targets of a row comes about."""

    bernoulli = "bernoulli"
    """Each token (word, span) by its own draw: the number varies."""
    exact = "exact"
    """The same number in every row that has enough ordinary tokens: static shapes for the head (unit=token)."""


@objectives.register("mlm")
@dataclass
class MLMConfig(ObjectiveConfig):
    """Masked language modelling (BERT, arXiv 1810.04805): hide some tokens, predict them from both sides."""

    attention: ClassVar[Attention] = Attention.bidirectional
    special_tokens: ClassVar[tuple[str, ...]] = ("mask",)

    name: str = "mlm"
    rate: float = 0.15
    """Share of tokens (or words) chosen as targets."""
    rate_start: float | None = None
    """Share at the beginning of training. None: `rate` throughout. Compare losses of different rates only on masks of one rate."""
    rate_tokens: int = 0
    """Positions of training over which the share goes linearly from rate_start to rate. 0: no schedule."""
    mask_share: float = 0.8
    """Of the chosen: share replaced by the mask token."""
    random_share: float = 0.1
    """Of the chosen: share replaced by a random ordinary token; the rest is kept as it is."""
    unit: MLMUnit = MLMUnit.token
    """What is masked together: single tokens, whole words or spans."""
    count: MLMCount = MLMCount.bernoulli
    """How the number of targets of a row comes about."""
    span_end: float = 0.2
    """unit=span: probability that a span ends after each of its tokens; 0.2 cut at 10 tokens means 3.8 on average."""
    span_max: int = 10
    """unit=span: longest span, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.rate <= 1, "rate", "more than 0, up to 1")
        self.require(0 <= self.mask_share <= 1, "mask_share", "0 to 1")
        self.require(0 <= self.random_share <= 1, "random_share", "0 to 1")
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ConfigError(f"objective.mask_share={self.mask_share} and objective.random_share={self.random_share} sum to more than 1")
        self._require_ramp()
        self.require(self.rate_start is None or self.rate_start > 0, "rate_start", "more than 0, up to 1, or null")
        self.require(0 < self.span_end <= 1, "span_end", "more than 0, up to 1")
        self.require(self.span_max >= 1, "span_max", "1 or more")
        if self.count == MLMCount.exact and self.unit != MLMUnit.token:
            raise ConfigError(f"objective.count=exact counts tokens, objective.unit={self.unit} does not; use objective.unit=token")
        if self.count == MLMCount.exact and self.rate_tokens:
            raise ConfigError("objective.count=exact keeps shapes static and objective.rate_start changes them; leave one of them out")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.mlm import MLM

        return MLM(self, vocabulary)


@objectives.register("masked_diffusion")
@dataclass
class MaskedDiffusionConfig(ObjectiveConfig):
    """Continuous-time masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992): hide a share t of the tokens, t uniform, predict
    them from both sides with weight 1/t. The loss bounds the nats per token of the text from above."""

    attention: ClassVar[Attention] = Attention.bidirectional
    special_tokens: ClassVar[tuple[str, ...]] = ("mask",)

    name: str = "masked_diffusion"
    min_time: float = 0.001
    """Least share of hidden tokens: bounds the weights by its inverse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.min_time < 1, "min_time", "more than 0, less than 1")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.masked_diffusion import MaskedDiffusion

        return MaskedDiffusion(self, vocabulary)


@objectives.register("multi_token")
@dataclass
class MultiTokenConfig(ObjectiveConfig):
    """Multi-token prediction (arXiv 2404.19737): the next token and those after it, each from a transform of its own before the shared
    projection. Needs a head with as many steps: head.steps_ahead."""

    name: str = "multi_token"
    steps_ahead: int = 3
    """Tokens predicted beyond the next one."""
    weight: float = 0.3
    """Weight of each step beyond the next token in the loss; that of the next token is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps_ahead >= 1, "steps_ahead", "1 or more (none is objective=causal)")
        self.require(self.weight > 0, "weight", "more than 0")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.multi_token import MultiToken

        return MultiToken(self, vocabulary)


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
    mode_tokens: bool = False
    """Open each piece with a token that tells its kind of denoising, as published: the last three of the tokenizer's sentinels."""

    @property
    def num_modes(self) -> int:
        """Mode tokens that it takes from the sentinels."""
        return 3 * self.mode_tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in ("r_weight", "s_weight", "x_weight"):
            self.require(getattr(self, weight) >= 0, weight, "0 or more")
        if self.r_weight + self.s_weight + self.x_weight <= 0:
            raise ConfigError("objective=ul2 has no part: objective.r_weight, s_weight and x_weight are all 0; give one of them a weight")

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.ul2 import ul2

        return ul2(self, vocabulary)


# last, because the registry lists options in this order
from heads_lightning.configs.objective_mixture import MixtureConfig as MixtureConfig  # noqa: E402
