"""`backbone=transformer`: a pre-norm transformer, causal, bidirectional or prefix as the batch asks.

Choices: the module is always assembled on meta and then materialised, so that the path of sharded runs is the only path; queries, keys
and values are matrices of their own, which optimizers, sharding and conversion can treat by name; hidden states stay in the parameters'
type, and each branch converts its input to the type of matrix products once.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache
from heads_lightning.backbones.layers import (
    GatedFeedForward,
    KeyValueCache,
    PlainFeedForward,
    Reading,
    SelfAttention,
    make_norm,
    prepare_reading,
)
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.backbone import FeedForward, Position, TransformerConfig
from heads_lightning.registry import ConfigError


class Block(nn.Module):
    """h + attention(norm(h)), then h + feed_forward(norm(h))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, bias=config.bias)
        self.attention = SelfAttention(
            d_model=config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            head_dim=config.width_of_head,
            bias=config.bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.feed_forward_norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, bias=config.bias)
        kind = GatedFeedForward if config.feed_forward == FeedForward.gated else PlainFeedForward
        self.feed_forward = kind(d_model=config.d_model, inner=config.ff_dim, activation=config.activation, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BSD: Tensor, reading: Reading, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x_BSD = self.attention_norm(h_BSD).to(reading.compute_dtype)
        h_BSD = h_BSD + self.dropout(self.attention(x_BSD, reading, cache, layer))
        x_BSD = self.feed_forward_norm(h_BSD).to(reading.compute_dtype)
        return h_BSD + self.dropout(self.feed_forward(x_BSD))


class Transformer(Backbone):
    """See TransformerConfig for what can be chosen.

    Raises:
        ConfigError: forward was given more positions than a table of learned positions has.
    """

    supports: ClassVar[frozenset[Attention]] = TransformerConfig.supports

    def __init__(self, config: TransformerConfig, *, vocab_size: int, init_device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        with torch.device("meta"):
            self.embedding = nn.Embedding(vocab_size, config.d_model)
            self.positions = nn.Embedding(config.max_positions, config.d_model) if config.position == Position.learned else None
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = make_norm(config.norm, config.d_model, eps=config.norm_eps, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        rotary_dim = self.config.width_of_head if self.config.position == Position.rotary else None
        self._check_length(batch.tokens_BS.shape[1] + (cache.length if cache is not None else 0))
        reading = prepare_reading(batch, cache, self.embedding.weight, rotary_dim, self.config.rotary_base)
        assert cache is None or isinstance(cache, KeyValueCache)
        h_BSD = self.embedding(batch.tokens_BS)
        if self.positions is not None:
            h_BSD = h_BSD + self.positions(reading.positions)
        h_BSD = self.dropout(h_BSD)
        for layer, block in enumerate(self.blocks):
            h_BSD = block(h_BSD, reading, cache, layer)
        if cache is not None:
            cache.advance(batch.tokens_BS.shape[1])
        return self.norm(h_BSD)

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
