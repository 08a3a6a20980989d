"""`backbone=transformer`: a transformer, causal, bidirectional or prefix as the batch asks.

Choices: the module is always assembled on meta and then materialised, so that the path of sharded runs is the only path; queries, keys
and values are matrices of their own, which optimizers, sharding and conversion can treat by name; hidden states stay in the parameters'
type, and each branch converts its input to the type of matrix products once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache, TensorRole
from heads_lightning.backbones.layers import (
    GatedFeedForward,
    KeyValueCache,
    PlainFeedForward,
    Reading,
    SelfAttention,
    local_reading,
    make_norm,
    prepare_reading,
    rotary_tables,
)
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.layers import AttentionBias, FeedForward, NormPlacement, Position, QKNormWidth
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.registry import ConfigError


class Block(nn.Module):
    """Attention, then the feed-forward part, each added to the hidden states with its norm where the config places it."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__()
        self.placement = config.norm_placement
        biases = config.biases_of_attention
        # what the embedding's norm has just normed is not normed again
        normed_already = first and config.embedding_norm and self.placement == NormPlacement.pre
        self.attention_norm = nn.Identity() if normed_already else norm_of(config)
        self.attention = SelfAttention(
            d_model=config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.width_of_head,
            qkv_bias=biases != AttentionBias.none,
            output_bias=biases == AttentionBias.all,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            qk_norm_heads=config.qk_norm_width == QKNormWidth.head,
            scale=config.attention_scale,
        )
        self.feed_forward_norm = norm_of(config)
        kind = GatedFeedForward if config.feed_forward == FeedForward.gated else PlainFeedForward
        self.feed_forward = kind(
            d_model=config.d_model, inner=config.ff_dim, activation=config.activation, bias=config.has_feed_forward_bias
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BSD: Tensor, reading: Reading, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x_BSD = self._before(h_BSD, self.attention_norm, reading)
        h_BSD = self._after(h_BSD, self.attention(x_BSD, reading, cache, layer), self.attention_norm)
        x_BSD = self._before(h_BSD, self.feed_forward_norm, reading)
        return self._after(h_BSD, self.feed_forward(x_BSD), self.feed_forward_norm)

    def _before(self, h_BSD: Tensor, norm: nn.Module, reading: Reading) -> Tensor:
        """What a branch reads."""
        return (norm(h_BSD) if self.placement == NormPlacement.pre else h_BSD).to(reading.compute_dtype)

    def _after(self, h_BSD: Tensor, branch_BSD: Tensor, norm: nn.Module) -> Tensor:
        """The hidden states with what a branch adds."""
        if self.placement == NormPlacement.reordered:
            return h_BSD + self.dropout(norm(branch_BSD.to(h_BSD.dtype)))
        h_BSD = h_BSD + self.dropout(branch_BSD)
        return norm(h_BSD) if self.placement == NormPlacement.post else h_BSD


def norm_of(config: TransformerConfig) -> nn.Module:
    """One of the config's norms, of width d_model."""
    norm = config.norm_config()
    return make_norm(norm.name, config.d_model, eps=norm.eps, bias=norm.bias)


class Transformer(Backbone):
    """See TransformerConfig for what can be chosen.

    Raises:
        ConfigError: forward was given more positions than a table of learned positions has.
    """

    supports: ClassVar[frozenset[Attention]] = TransformerConfig.supports
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "embedding": TensorRole.vocabulary,
        "*.query_norm": TensorRole.heads,
        "*.key_norm": TensorRole.heads,
        "*norm": TensorRole.positions,
        "positions": TensorRole.positions,
        "token_types": TensorRole.positions,
        "*.attention": TensorRole.reads_all,
        "*.feed_forward": TensorRole.reads_all,
        **dict.fromkeys(("*.query", "*.key", "*.value", "*.gate", "*.up"), TensorRole.columns),
        **dict.fromkeys(("*.output", "*.down"), TensorRole.rows),
    }

    def __init__(self, config: TransformerConfig, *, vocab_size: int, init_device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        with torch.device("meta"):
            self.embedding = nn.Embedding(vocab_size, config.d_model)
            self.positions = nn.Embedding(config.max_positions, config.d_model) if config.position == Position.learned else None
            self.token_types = nn.Embedding(config.token_types, config.d_model) if config.token_types else None
            self.embedding_norm = norm_of(config) if config.embedding_norm else nn.Identity()
            self.blocks = nn.ModuleList(Block(config, first=layer == 0) for layer in range(config.num_layers))
            self.norm = nn.Identity() if config.norm_placement == NormPlacement.post else norm_of(config)
        self.dropout = nn.Dropout(config.dropout)
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        self._check_length(batch.tokens_BS.shape[1] + (cache.length if cache is not None else 0))
        everywhere, near = self._readings(batch, cache)
        assert cache is None or isinstance(cache, KeyValueCache)
        h_BSD = self._embedded(batch.tokens_BS, everywhere)
        for layer, block in enumerate(self.blocks):
            h_BSD = block(h_BSD, near if self.config.is_local(layer) else everywhere, cache, layer)
        if cache is not None:
            cache.advance(batch.tokens_BS.shape[1])
        return self.norm(h_BSD)

    def _readings(self, batch: Batch, cache: Cache | None) -> tuple[Reading, Reading]:
        """What the layers that see everything share, and what those with a window do."""
        config, like = self.config, self.embedding.weight
        rotary_dim = config.width_of_head if config.position == Position.rotary else None
        reading = prepare_reading(batch, cache, like, rotary_dim, config.rotary_base, config.rotary_scaling)
        window, base = config.local_attention.window, config.local_attention.rotary_base
        if window is None:
            return reading, reading
        near = local_reading(reading, batch, cache, window)
        if rotary_dim is not None and base is not None:
            near = near._replace(rotary=rotary_tables(reading.positions, rotary_dim, base, like, reading.compute_dtype))
        return reading, near

    def _embedded(self, tokens_BS: Tensor, reading: Reading) -> Tensor:
        """Tokens, their type and their positions as hidden states [B, S, D]."""
        h_BSD = self.embedding(tokens_BS)
        if self.config.embedding_scale != 1:
            h_BSD = h_BSD * self.config.embedding_scale
        if self.token_types is not None:
            h_BSD = h_BSD + self.token_types(torch.zeros_like(reading.positions))
        if self.positions is not None:
            h_BSD = h_BSD + self.positions(reading.positions)
        return self.dropout(self.embedding_norm(h_BSD))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices and embeddings normal with init_std, those that write into the residual stream 1/sqrt(2·num_layers) of it (GPT-2)."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".attention.output", ".feed_forward.down"))
                nn.init.normal_(module.weight, std=residual_std if writes else std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def new_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        return KeyValueCache(
            layers=self.config.num_layers,
            batch=batch_size,
            heads=self.config.kv_heads,
            max_length=max_length,
            head_dim=self.config.width_of_head,
            like=self.embedding.weight,
        )

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {length} positions is longer than the {self.config.max_positions} learned ones; "
                f"set backbone.max_positions={length} or backbone.position=rotary"
            )
