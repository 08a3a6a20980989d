"""`backbone=transformer` and `backbone=ngpt`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.base import LayerNormConfig, NormType
from heads_lightning.configs.layers import (
    Activation,
    AttentionBias,
    FeedForward,
    LocalAttention,
    NormPlacement,
    Position,
    QKNormWidth,
    RotaryScaling,
)
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch


_ANY = frozenset({Attention.causal, Attention.bidirectional, Attention.prefix})


@backbones.register("transformer")
@dataclass
class TransformerConfig(BackboneConfig):
    """A transformer, causal, bidirectional or prefix as the objective asks.

    As it stands, it is Llama's; its options make it GPT-2, BERT, ModernBERT, Mistral, Qwen2, Qwen3 or OLMo 2 to the bit.
    """

    supports: ClassVar[frozenset[Attention]] = _ANY
    shares_positions: ClassVar[bool] = True

    name: str = "transformer"
    d_model: int = 256
    """Width of the hidden states."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped queries, arXiv 2305.13245). None: as many as num_heads."""
    head_dim: int | None = None
    """Width of one head. None: d_model / num_heads."""
    feed_forward: FeedForward = FeedForward.gated
    """Shape of the feed-forward part."""
    feed_forward_dim: int | None = None
    """Its inner width. None: 8/3·d_model (gated) or 4·d_model (plain), rounded up to a multiple of 64."""
    activation: Activation = Activation.silu
    """Its non-linearity."""
    norm: NormType = NormType.rms
    """Kind of norm before attention, before the feed-forward part, and at the end."""
    norm_eps: float = 1e-5
    """Added to the variance before the root."""
    norm_placement: NormPlacement = NormPlacement.pre
    """Where a block has its norms."""
    embedding_norm: bool = False
    """A norm of the embedding. The first block, if pre-norm, then has none before its attention (ModernBERT)."""
    qk_norm: bool = False
    """RMS norm of queries and keys (arXiv 2302.05442)."""
    qk_norm_width: QKNormWidth = QKNormWidth.head
    """Over what qk_norm is taken."""
    bias: bool = False
    """Biases in the linear layers (and in layer_norm), where the next three do not say otherwise."""
    attention_bias: AttentionBias | None = None
    """Biases of attention. None: all or none, as `bias`."""
    feed_forward_bias: bool | None = None
    """Biases of the feed-forward part. None: as `bias`."""
    norm_bias: bool | None = None
    """Shifts of layer_norm. None: as `bias`."""
    attention_scale: float | None = None
    """Multiplies the products of queries and keys. None: 1/sqrt(width of a head)."""
    local_attention: LocalAttention = field(default_factory=LocalAttention)
    """Layers with a sliding window."""
    embedding_scale: float = 1.0
    """Multiplies the embedding; sqrt(d_model) in the original transformer."""
    token_types: int = 0
    """Rows of a second embedding (BERT's segment ids; 2 there). Every position here is of type 0. 0: no such embedding."""
    position: Position = Position.rotary
    """How positions are told apart."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScaling = field(default_factory=RotaryScaling)
    """Stretch of the rotary frequencies for longer sequences."""
    max_positions: int = 2048
    """Longest sequence with position=learned; size of the table. Others have no limit."""
    dropout: float = 0.0
    """Dropout on the embedding and on each residual branch."""
    init_std: float = 0.02
    """Standard deviation of initial weights; the output projections of blocks are scaled by 1/sqrt(2·num_layers)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_model", "num_layers", "num_heads", "max_positions"):
            self.require(getattr(self, name) >= 1, name, "1 or more")
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        self.require(self.token_types >= 0, "token_types", "0 or more")
        self._check_local_attention()
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ConfigError(
                f"backbone.d_model={self.d_model} is not divisible by backbone.num_heads={self.num_heads}; "
                f"change one of them or set backbone.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"backbone.num_heads={self.num_heads} is not a multiple of backbone.num_kv_heads={self.num_kv_heads}")
        if self.position == Position.rotary and self.width_of_head % 2:
            raise ConfigError(f"rotary positions need an even head width, not {self.width_of_head}; set backbone.head_dim")

    def _check_local_attention(self) -> None:
        if self.local_attention.window is not None and self.local_attention.window < 1:
            raise ConfigError(f"backbone.local_attention.window={self.local_attention.window} is out of range; it takes 1 or more, or null")
        beyond = [layer for layer in self.local_attention.global_layers if not 0 <= layer < self.num_layers]
        if beyond:
            raise ConfigError(
                f"backbone.local_attention.global_layers names {beyond}, but backbone.num_layers={self.num_layers}; layers count from 0"
            )

    def tensor_sizes(self) -> dict[str, int]:
        return {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads, "feed_forward_dim": self.ff_dim}

    def tensor_problem(self) -> str | None:
        if self.qk_norm and self.qk_norm_width == QKNormWidth.full:
            return "backbone.qk_norm_width=full norms the heads of all devices together; use backbone.qk_norm_width=head"
        return None

    @property
    def kv_heads(self) -> int:
        """Key/value heads in effect."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def biases_of_attention(self) -> AttentionBias:
        """attention_bias in effect."""
        if self.attention_bias is not None:
            return self.attention_bias
        return AttentionBias.all if self.bias else AttentionBias.none

    @property
    def has_feed_forward_bias(self) -> bool:
        """feed_forward_bias in effect."""
        return self.bias if self.feed_forward_bias is None else self.feed_forward_bias

    @property
    def width_of_head(self) -> int:
        """Width of one head in effect."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ff_dim(self) -> int:
        """Inner width of the feed-forward part in effect."""
        if self.feed_forward_dim is not None:
            return self.feed_forward_dim
        wanted = self.d_model * 8 / 3 if self.feed_forward == FeedForward.gated else self.d_model * 4
        return -(-int(wanted) // 64) * 64

    def norm_config(self) -> LayerNormConfig:
        """The norm that the blocks use."""
        return LayerNormConfig(name=self.norm, eps=self.norm_eps, bias=self.bias if self.norm_bias is None else self.norm_bias)

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees its window alone."""
        return self.local_attention.window is not None and layer not in self.local_attention.global_layers

    @property
    def num_norms(self) -> int:
        """Norms of width d_model."""
        if self.norm_placement == NormPlacement.post:
            return 2 * self.num_layers + self.embedding_norm
        first_is_left_out = self.embedding_norm and self.norm_placement == NormPlacement.pre
        return 2 * self.num_layers + 1 + self.embedding_norm - first_is_left_out

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        from heads_lightning.backbones.transformer import Transformer

        return Transformer(self, vocab_size=vocab_size, init_device=init_device)

    def _matrix_params(self) -> int:
        """Weights of the linear layers, without biases."""
        attention = 2 * self.d_model * self.width_of_head * (self.num_heads + self.kv_heads)
        feed_forward = (3 if self.feed_forward == FeedForward.gated else 2) * self.d_model * self.ff_dim
        return self.num_layers * (attention + feed_forward)

    def num_params(self, vocab_size: int) -> int:
        d, h, k, e, f = self.d_model, self.num_heads, self.kv_heads, self.width_of_head, self.ff_dim
        attention = {AttentionBias.none: 0, AttentionBias.qkv: e * (h + 2 * k), AttentionBias.all: e * (h + 2 * k) + d}
        biases = attention[self.biases_of_attention]
        if self.has_feed_forward_bias:
            biases += (2 if self.feed_forward == FeedForward.gated else 1) * f + d
        if self.qk_norm:
            biases += 2 * e if self.qk_norm_width == QKNormWidth.head else (h + k) * e
        tables = vocab_size + self.token_types + (self.max_positions if self.position == Position.learned else 0)
        return tables * d + self._matrix_params() + self.num_layers * biases + self.num_norms * self.norm_config().num_params(d)

    def num_flops_per_token(self, sequence_length: int) -> int:
        return 6 * self._matrix_params() + 12 * self.num_layers * self.num_heads * self.width_of_head * sequence_length


@backbones.register("ngpt")
@dataclass
class NGPTConfig(BackboneConfig):
    """nGPT (arXiv 2410.01131): every matrix has rows (or columns) of unit norm, hidden states move on the unit sphere."""

    supports: ClassVar[frozenset[Attention]] = _ANY

    name: str = "ngpt"
    d_model: int = 256
    """Width of the hidden states."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads. None: as many as num_heads."""
    feed_forward_dim: int | None = None
    """Inner width of the gated feed-forward part. None: 8/3·d_model, rounded up to a multiple of 64."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    alpha_init: float | None = None
    """Initial step along the sphere (eigen learning rate). None: 1/num_layers, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_model", "num_layers", "num_heads"):
            self.require(getattr(self, name) >= 1, name, "1 or more")
        self.require(self.alpha_init is None or self.alpha_init > 0, "alpha_init", "more than 0, or null")
        if self.d_model % self.num_heads or (self.d_model // self.num_heads) % 2:
            raise ConfigError(
                f"backbone.d_model={self.d_model} divided by backbone.num_heads={self.num_heads} must be an even whole number"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(f"backbone.num_heads={self.num_heads} is not a multiple of backbone.num_kv_heads={self.num_kv_heads}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads in effect."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ff_dim(self) -> int:
        """Inner width of the feed-forward part in effect."""
        return -(-int(self.d_model * 8 / 3) // 64) * 64 if self.feed_forward_dim is None else self.feed_forward_dim

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        from heads_lightning.backbones.ngpt import NGPT

        return NGPT(self, vocab_size=vocab_size, init_device=init_device)

    def _matrix_params(self) -> int:
        """Weights of the linear layers."""
        head_dim = self.d_model // self.num_heads
        return self.num_layers * self.d_model * (2 * head_dim * (self.num_heads + self.kv_heads) + 3 * self.ff_dim)

    def num_params(self, vocab_size: int) -> int:
        s_qk = self.kv_heads * (self.d_model // self.num_heads)
        scales = s_qk + 2 * self.ff_dim + 2 * self.d_model  # s_qk; s_u and s_v; alpha of attention and of the feed-forward part
        return vocab_size * self.d_model + self._matrix_params() + self.num_layers * scales

    def num_flops_per_token(self, sequence_length: int) -> int:
        return 6 * self._matrix_params() + 12 * self.num_layers * self.d_model * sequence_length
