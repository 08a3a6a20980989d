"""T5 (`backbone=t5`, `head=t5`): what the published models are, and what can be chosen instead.

Backbone and head share a file because they share the presets. A field that is null has its preset's value; a value of its own wins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.base import DType, LayerNormConfig, NormType
from heads_lightning.configs.head import LMHeadConfig, heads
from heads_lightning.configs.layers import Activation, FeedForward
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch


class T5Preset(StrEnum):
    """A published T5."""

    t5_v1_0 = "t5_v1_0"
    """The paper's (arXiv 1910.10683): ReLU, tied embeddings, hidden states scaled by 1/√d_model before the projection."""
    t5_v1_1 = "t5_v1_1"
    """T5.1.1: gated GELU, untied, no scale."""
    flan = "flan"
    """Flan-T5 (arXiv 2210.11416): the architecture of t5_v1_1."""
    megatron = "megatron"
    """Megatron-core's defaults: layer norm, biases, GELU, learned positions, scaled scores, tied with an output bias."""


class T5Position(StrEnum):
    """How T5 tells positions apart."""

    learned_absolute = "learned_absolute"
    """A learned vector per position, one table for encoder and decoder, added to the embedding."""
    rope = "rope"
    """Rotary embedding of queries and keys (arXiv 2104.09864); self-attention only."""
    relative = "relative"
    """A learned number per head and bucket of distances, one table per stack, added to the scores of self-attention (T5, section 2.1)."""


class T5Style(NamedTuple):
    """What a preset decides about the backbone. Fields as in T5Config."""

    position_embedding_type: T5Position
    norm: NormType
    norm_eps: float
    bias: bool
    feed_forward: FeedForward
    activation: Activation
    scale_attention: bool


class T5Output(NamedTuple):
    """What a preset decides about the head. Fields as in T5LMHeadConfig."""

    tie_embeddings: bool
    scale_output: bool
    bias_when_tied: bool


_V1_1 = T5Style(T5Position.relative, NormType.rms, 1e-6, False, FeedForward.gated, Activation.gelu_tanh, False)
STYLES = {
    T5Preset.t5_v1_0: _V1_1._replace(feed_forward=FeedForward.plain, activation=Activation.relu),
    T5Preset.t5_v1_1: _V1_1,
    T5Preset.flan: _V1_1,
    T5Preset.megatron: T5Style(
        T5Position.learned_absolute, NormType.layer_norm, 1e-5, True, FeedForward.plain, Activation.gelu, scale_attention=True
    ),
}
OUTPUTS = {
    T5Preset.t5_v1_0: T5Output(tie_embeddings=True, scale_output=True, bias_when_tied=False),
    T5Preset.t5_v1_1: T5Output(tie_embeddings=False, scale_output=False, bias_when_tied=False),
    T5Preset.flan: T5Output(tie_embeddings=False, scale_output=False, bias_when_tied=False),
    T5Preset.megatron: T5Output(tie_embeddings=True, scale_output=False, bias_when_tied=True),
}
TIED_EMBEDDING_STD = 0.02
"""With which a projection that is the embedding begins near ln V."""


@backbones.register("t5")
@dataclass
class T5Config(BackboneConfig):
    """T5 (arXiv 1910.10683): an encoder that reads the whole input and a decoder that also sees the encoder."""

    supports: ClassVar[frozenset[Attention]] = frozenset({Attention.encoder_decoder})

    name: str = "t5"
    preset: T5Preset = T5Preset.t5_v1_1
    """The published model whose choices the fields below take while they are null. `head.preset` is set apart."""
    d_model: int = 256
    """Width of the hidden states of both stacks."""
    num_layers: int = 4
    """Blocks of the encoder."""
    num_decoder_layers: int | None = None
    """Blocks of the decoder. None: as many as num_layers."""
    num_heads: int = 4
    """Attention heads."""
    head_dim: int | None = None
    """Width of one head. None: d_model / num_heads."""
    feed_forward_dim: int | None = None
    """Inner width of the encoder's feed-forward part. None: 8/3·d_model (gated) or 4·d_model (plain), rounded up to a multiple of 64."""
    decoder_feed_forward_dim: int | None = None
    """The same of the decoder. None: the encoder's."""
    position_embedding_type: T5Position | None = None
    """How positions are told apart. None: the preset's."""
    norm: NormType | None = None
    """Kind of norm before each part of a block and at the end of each stack. None: the preset's."""
    norm_eps: float | None = None
    """Added to the variance before the root. None: the preset's."""
    bias: bool | None = None
    """Biases in the linear layers (and in layer_norm). None: the preset's."""
    feed_forward: FeedForward | None = None
    """Shape of the feed-forward part. None: the preset's."""
    activation: Activation | None = None
    """Its non-linearity. None: the preset's."""
    scale_attention: bool | None = None
    """Multiply attention scores by 1/√head_dim; T5 does not, and begins with smaller queries. None: the preset's."""
    relative_buckets: int = 32
    """Buckets of distances with position_embedding_type=relative; the encoder's halves are for before and after."""
    relative_max_distance: int = 128
    """Distances from here on share one bucket."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies, with position_embedding_type=rope."""
    rotary_percent: float = 1.0
    """Share of each head that is rotated: its first channels."""
    seq_len_interpolation_factor: float | None = None
    """Positions are divided by it before they are rotated, to read longer sequences than were trained on. None: not."""
    max_positions: int = 512
    """Longest sequence of either stack with position_embedding_type=learned_absolute; size of the table. Others have no limit."""
    dropout: float = 0.0
    """Dropout in T5's places: embeddings, attention weights, inside the feed-forward part, each residual branch, the last hidden states."""
    embedding_init_std: float | None = None
    """Standard deviation of new embeddings. None: 1.0, as the published T5s have it, where the head has a matrix of its own (as in t5_v1_1
    and flan): it begins near ln V and learns faster than smaller ones. Where the embedding is also the projection, 1.0 begins at up to 16
    times ln V (with t5_v1_0's scale 1.05 to 2 times), since a token's state is most like its own row: 0.02 there, less for a width above
    625. Megatron's models take that, tied or not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("d_model", "num_layers", "num_heads", "max_positions", "relative_max_distance"):
            self.require(getattr(self, field) >= 1, field, "1 or more")
        for field in ("num_decoder_layers", "head_dim", "feed_forward_dim", "decoder_feed_forward_dim"):
            self.require(getattr(self, field) is None or getattr(self, field) >= 1, field, "1 or more, or null")
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        self.require(self.relative_buckets >= 4 and self.relative_buckets % 4 == 0, "relative_buckets", "a multiple of 4")
        self.require(self.relative_max_distance > self.relative_buckets // 2, "relative_max_distance", "more than relative_buckets / 2")
        self.require(0 < self.rotary_percent <= 1, "rotary_percent", "more than 0, up to 1")
        factor = self.seq_len_interpolation_factor
        self.require(factor is None or factor > 1, "seq_len_interpolation_factor", "more than 1, or null")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"backbone.d_model={self.d_model} is not divisible by backbone.num_heads={self.num_heads}; "
                f"change one of them or set backbone.head_dim"
            )
        if self.style.position_embedding_type == T5Position.rope and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"rope rotates pairs of channels, but backbone.rotary_percent={self.rotary_percent} of a head of {self.width_of_head} "
                f"is {self.rotary_dim}; set backbone.head_dim or backbone.rotary_percent=1.0"
            )

    def fitted(self, *, tied: bool) -> T5Config:
        return replace(self, embedding_init_std=self.embedding_std(tied=tied))

    def embedding_std(self, *, tied: bool) -> float:
        """embedding_init_std in effect, beside a head that is tied to the embedding or is not."""
        if self.embedding_init_std is not None:
            return self.embedding_init_std
        small = tied or self.preset == T5Preset.megatron
        return min(TIED_EMBEDDING_STD, 0.5 * self.d_model**-0.5) if small else 1.0

    def tensor_sizes(self) -> dict[str, int]:
        return {"num_heads": self.num_heads, "feed_forward_dim": self.ff_dim, "decoder_feed_forward_dim": self.decoder_ff_dim}

    @property
    def style(self) -> T5Style:
        """The preset's choices with the fields that are set."""
        chosen = {field: getattr(self, field) for field in T5Style._fields if getattr(self, field) is not None}
        return STYLES[T5Preset(self.preset)]._replace(**chosen)

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder in effect."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def width_of_head(self) -> int:
        """Width of one head in effect."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.width_of_head * self.rotary_percent)

    @property
    def ff_dim(self) -> int:
        """Inner width of the encoder's feed-forward part in effect."""
        if self.feed_forward_dim is not None:
            return self.feed_forward_dim
        wanted = self.d_model * 8 / 3 if self.style.feed_forward == FeedForward.gated else self.d_model * 4
        return -(-int(wanted) // 64) * 64

    @property
    def decoder_ff_dim(self) -> int:
        """Inner width of the decoder's feed-forward part in effect."""
        return self.ff_dim if self.decoder_feed_forward_dim is None else self.decoder_feed_forward_dim

    def norm_config(self) -> LayerNormConfig:
        """The norm that the blocks use."""
        return LayerNormConfig(name=self.style.norm, eps=self.style.norm_eps, bias=self.style.bias)

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        from heads_lightning.backbones.t5 import T5

        return T5(self, vocab_size=vocab_size, init_device=init_device)

    def _attention_params(self) -> int:
        inner = self.num_heads * self.width_of_head
        return 4 * self.d_model * inner

    def _feed_forward_matrices(self) -> int:
        return 3 if self.style.feed_forward == FeedForward.gated else 2

    def num_params(self, vocab_size: int) -> int:
        d, inner, ff_matrices = self.d_model, self.num_heads * self.width_of_head, self._feed_forward_matrices()
        norm, position = self.norm_config().num_params(d), self.style.position_embedding_type
        attention = norm + self._attention_params() + (3 * inner + d if self.style.bias else 0)

        def feed_forward(width: int) -> int:
            return norm + ff_matrices * d * width + ((ff_matrices - 1) * width + d if self.style.bias else 0)

        encoder = self.num_layers * (attention + feed_forward(self.ff_dim)) + norm
        decoder = self.decoder_layers * (2 * attention + feed_forward(self.decoder_ff_dim)) + norm
        tables = {
            T5Position.learned_absolute: self.max_positions * d,
            T5Position.relative: 2 * self.relative_buckets * self.num_heads,
            T5Position.rope: 0,
        }
        return vocab_size * d + tables[position] + encoder + decoder

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Per position of the decoder, the encoder's work included, when both read `sequence_length` positions."""
        widths = self.num_layers * self.ff_dim + self.decoder_layers * self.decoder_ff_dim
        attentions = self.num_layers + 2 * self.decoder_layers
        matrices = attentions * self._attention_params() + self._feed_forward_matrices() * self.d_model * widths
        return 6 * matrices + 12 * attentions * self.num_heads * self.width_of_head * sequence_length


@heads.register("t5")
@dataclass
class T5LMHeadConfig(LMHeadConfig):
    """T5's head: one projection, tied or not, after T5 v1.0's scale or without it."""

    name: str = "t5"
    preset: T5Preset = T5Preset.t5_v1_1
    """The published model whose choices tie_embeddings, scale_output and bias have while they are null."""
    bias: bool | None = None
    """Learned bias [V]. None: the preset's (megatron has one when tied, the others none)."""
    tie_embeddings: bool | None = None
    """Use the backbone's embedding matrix as the projection. None: the preset's."""
    scale_output: bool | None = None
    """Multiply the hidden states by 1/√d_model before the projection. None: the preset's."""
    loss_dtype: DType = DType.float32
    """Type of the hidden states and weights that logits and loss are made from: float32 and float64 are a least type, the others are cast
    to. Sums are fp32 or better whatever it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_dtype = DType(self.loss_dtype)

    @property
    def is_tied(self) -> bool:
        return OUTPUTS[T5Preset(self.preset)].tie_embeddings if self.tie_embeddings is None else self.tie_embeddings

    @property
    def has_bias(self) -> bool:
        """The bias that the head will have."""
        return self.is_tied and OUTPUTS[T5Preset(self.preset)].bias_when_tied if self.bias is None else self.bias

    @property
    def scales(self) -> bool:
        """Whether the hidden states are scaled."""
        return OUTPUTS[T5Preset(self.preset)].scale_output if self.scale_output is None else self.scale_output

    @property
    def head_class(self) -> Any:
        from heads_lightning.heads.t5 import T5Head

        return T5Head

    def num_params(self, d_model: int, vocab_size: int) -> int:
        return self._size(d_model, vocab_size, bias=self.has_bias)
