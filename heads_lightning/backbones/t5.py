"""`backbone=t5`: an encoder that reads the whole input, and a decoder that reads what it has written and the encoder's states.

Choices: encoder and decoder share one embedding; positions, masks and relative biases are made once per stack and forward pass; blocks
are numbered as in the whole model, so that a part of it (`T5Part`: what a pipeline stage holds) has the whole's parameter names; the
published variants are values in configs/t5.py, not classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache, TensorRole
from heads_lightning.backbones.layers import ACTIVATIONS, KeyValueCache, compute_dtype, make_norm, rotary_tables
from heads_lightning.backbones.masks import AttentionMask, t5_position_ids
from heads_lightning.backbones.t5_attention import Attention, RelativeBias, Sight, make_sight
from heads_lightning.batch import Attention as AttentionKind
from heads_lightning.batch import Batch
from heads_lightning.configs.layers import FeedForward
from heads_lightning.configs.t5 import OUTPUTS, T5Config, T5Position, T5Preset
from heads_lightning.registry import ConfigError


class T5Part(NamedTuple):
    """The part of a T5 that is built; as a whole when nothing is said."""

    embeds: bool = True
    """Whether it has the word embedding (and the learned positions)."""
    encoder: range | None = None
    """Blocks of the encoder. None: all; an empty range: no encoder."""
    decoder: range | None = None
    """Blocks of the decoder."""


class T5Cache(Cache):
    """Keys and values of the decoder's positions, and, from the first pass on, of the encoder's states."""

    def __init__(self, own: KeyValueCache) -> None:
        self.own = own
        self.cross: list[tuple[Tensor, Tensor]] = []
        """Of each decoder block: keys and values of the encoder's states, [B, H, T, E]."""
        self.encoder_mask: AttentionMask | None = None
        """Which encoder positions the decoder may see, where a caller gave a mask of its own."""
        self.encoder_segments_BT: Tensor | None = None

    @property
    def length(self) -> int:
        return self.own.length


class T5FeedForward(nn.Module):
    """act(gate x) * (up x), or act(up x); dropout; then down."""

    def __init__(self, config: T5Config, inner: int) -> None:
        super().__init__()
        style = config.style
        self.activation = ACTIVATIONS[style.activation]
        self.gate = nn.Linear(config.d_model, inner, bias=style.bias) if style.feed_forward == FeedForward.gated else None
        self.up = nn.Linear(config.d_model, inner, bias=style.bias)
        self.down = nn.Linear(inner, config.d_model, bias=style.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        up = self.up(x_BSD)
        return self.down(self.dropout(self.activation(up) if self.gate is None else self.activation(self.gate(x_BSD)) * up))


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward part, each after a norm and added to the residual stream."""

    def __init__(self, config: T5Config, inner: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = _attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = T5FeedForward(config, inner)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BTD: Tensor, sight: Sight, dtype: torch.dtype) -> Tensor:
        """[B, T, D] to [B, T, D]; branches are computed in `dtype`."""
        x_BTD = self.attention_norm(h_BTD).to(dtype)
        h_BTD = h_BTD + self.dropout(self.attention(x_BTD, *self.attention.keys_values(x_BTD, sight.rotary), sight))
        return h_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(h_BTD).to(dtype)))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's states, then the feed-forward part."""

    def __init__(self, config: T5Config, inner: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = _attention(config)
        self.cross_attention_norm = _norm(config)
        self.cross_attention = _attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = T5FeedForward(config, inner)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        h_BSD: Tensor,
        sight: Sight,
        cross: Sight,
        memory_BTD: Tensor | None,
        dtype: torch.dtype,
        cache: T5Cache | None,
        place: int,
    ) -> Tensor:
        """[B, S, D] to [B, S, D]. `memory_BTD`: the encoder's states, None once the cache has read them; `place`: of this block in it."""
        x_BSD = self.attention_norm(h_BSD).to(dtype)
        k_BHSE, v_BHSE = self.attention.keys_values(x_BSD, sight.rotary)
        if cache is not None:
            k_BHSE, v_BHSE = cache.own.extend(place, k_BHSE, v_BHSE)
        h_BSD = h_BSD + self.dropout(self.attention(x_BSD, k_BHSE, v_BHSE, sight))
        memory = self._memory(memory_BTD, dtype, cache, place)
        h_BSD = h_BSD + self.dropout(self.cross_attention(self.cross_attention_norm(h_BSD).to(dtype), *memory, cross))
        return h_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(h_BSD).to(dtype)))

    def _memory(self, memory_BTD: Tensor | None, dtype: torch.dtype, cache: T5Cache | None, place: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states: made once, then the cache's."""
        if memory_BTD is None:
            assert cache is not None
            return cache.cross[place]
        made = self.cross_attention.keys_values(memory_BTD.to(dtype))
        if cache is not None:
            cache.cross.append(made)
        return made


def _norm(config: T5Config) -> nn.Module:
    return make_norm(config.style.norm, config.d_model, eps=config.style.norm_eps, bias=config.style.bias)


def _attention(config: T5Config) -> Attention:
    return Attention(
        d_model=config.d_model,
        num_heads=config.num_heads,
        head_dim=config.width_of_head,
        bias=config.style.bias,
        scale=config.width_of_head**-0.5 if config.style.scale_attention else 1.0,
        dropout=config.dropout,
    )


class Stack(nn.Module):
    """Blocks, the relative bias that they share, and the norm after the last one.

    Args:
        config: of the model.
        blocks: numbers of the blocks that are built.
        encoder: which of the two stacks.
    """

    def __init__(self, config: T5Config, blocks: range, *, encoder: bool) -> None:
        super().__init__()
        self.config = config
        kind, inner = (EncoderBlock, config.ff_dim) if encoder else (DecoderBlock, config.decoder_ff_dim)
        self.relative_bias = (
            RelativeBias(config.relative_buckets, config.num_heads, max_distance=config.relative_max_distance, both_sides=encoder)
            if config.style.position_embedding_type == T5Position.relative
            else None
        )
        self.blocks = nn.ModuleDict({str(i): kind(config, inner) for i in blocks})
        is_last = blocks.stop == (config.num_layers if encoder else config.decoder_layers)
        self.norm = _norm(config) if is_last else None
        self.dropout = nn.Dropout(config.dropout)

    def sight(self, mask: AttentionMask | None, positions: Tensor, *, queries: int, keys: int, like: Tensor, causal: bool) -> Sight:
        """What the last `queries` of `keys` positions see of them. `positions` are the queries'; `like` gives device and type."""
        dtype, rotary = compute_dtype(like), None
        if self.config.style.position_embedding_type == T5Position.rope:
            factor = self.config.seq_len_interpolation_factor or 1.0
            rotary = rotary_tables(positions / factor, self.config.rotary_dim, self.config.rotary_base, like, dtype)
        relative = None if self.relative_bias is None else self.relative_bias.of(queries, keys, dtype)
        if causal and queries > 1:
            if mask is None and relative is None and queries == keys:
                return Sight(None, None, None, None, causal=True, rotary=rotary)
            past = AttentionMask.causal(queries, old=keys - queries, device=like.device)
            mask = past if mask is None else mask & past
        return make_sight(mask, relative_1HST=relative, dtype=dtype, rotary=rotary)

    def finish(self, h_BSD: Tensor) -> Tensor:
        """After the last block: norm and dropout; what is not the last part hands on what it has."""
        return h_BSD if self.norm is None else self.dropout(self.norm(h_BSD))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks.values())


class T5(Backbone):
    """See T5Config for what can be chosen.

    Args:
        config: what the model is.
        vocab_size: rows of the embedding.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
        part: what of it is built.
    """

    supports: ClassVar[frozenset[AttentionKind]] = T5Config.supports
    tensor_roles: ClassVar[Mapping[str, TensorRole]] = {
        "embedding": TensorRole.vocabulary,
        **dict.fromkeys(("*.query", "*.key", "*.value", "*.gate", "*.up", "*.relative_bias"), TensorRole.columns),
        **dict.fromkeys(("*.output", "*.down"), TensorRole.rows),
    }

    def __init__(self, config: T5Config, *, vocab_size: int, init_device: torch.device | str = "cpu", part: T5Part | None = None) -> None:
        super().__init__()
        part = T5Part() if part is None else part
        self.config = config
        self.d_model = config.d_model
        encoder = range(config.num_layers) if part.encoder is None else part.encoder
        decoder = range(config.decoder_layers) if part.decoder is None else part.decoder
        learned = config.style.position_embedding_type == T5Position.learned_absolute
        with torch.device("meta"):
            # a part without the embedding never reads it: Backbone promises one of the whole
            self.embedding = cast(nn.Embedding, nn.Embedding(vocab_size, config.d_model) if part.embeds else None)
            self.positions = nn.Embedding(config.max_positions, config.d_model) if learned and part.embeds else None
            self.encoder = Stack(config, encoder, encoder=True) if len(encoder) else None
            self.decoder = Stack(config, decoder, encoder=False) if len(decoder) else None
        self.dropout = nn.Dropout(config.dropout)
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    # -- the contract -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        if batch.attention != AttentionKind.encoder_decoder:
            raise ValueError(f"backbone=t5 reads attention=encoder_decoder, not {batch.attention}")
        assert cache is None or isinstance(cache, T5Cache)
        segments_BT = batch.encoder_segments_BT
        memory_BTD = None
        if cache is None or not cache.cross:
            if batch.encoder_tokens_BT is None:
                raise ValueError("attention=encoder_decoder needs Batch.encoder_tokens_BT (with a cache: in the first batch)")
            mask = None if segments_BT is None else AttentionMask.from_segments(segments_BT, segments_BT)
            positions = t5_position_ids(batch.encoder_tokens_BT, segments=segments_BT)
            memory_BTD = self.encode(self.embed(batch.encoder_tokens_BT, positions), positions, mask)
            if cache is not None:
                cache.encoder_segments_BT = segments_BT
        elif batch.encoder_tokens_BT is not None:
            raise ValueError("the cache has read its encoder's input already; begin a new one with new_cache")
        else:
            segments_BT = cache.encoder_segments_BT
        return self._decode_segments(batch, memory_BTD, segments_BT, cache)

    def _decode_segments(self, batch: Batch, memory_BTD: Tensor | None, encoder_BT: Tensor | None, cache: T5Cache | None) -> Tensor:
        """Masks and positions of the decoder from segments; see batch.py."""
        size = batch.tokens_BS.shape[1]
        seen_BS = batch.segments_BS if cache is None else cache.own.extend_segments(batch.segments_BS, batch.tokens_BS)
        old = 0 if cache is None else cache.length
        everything_BS = batch.tokens_BS.new_zeros(batch.tokens_BS.shape[0], old + size) if seen_BS is None else seen_BS
        positions_BS = t5_position_ids(everything_BS, segments=seen_BS)[:, old:]
        own_BS = everything_BS[:, old:]
        mask = None if seen_BS is None else AttentionMask.from_segments(own_BS, seen_BS)
        if encoder_BT is None and seen_BS is not None:  # an encoder without segments is one segment, 0
            length = memory_BTD.shape[1] if memory_BTD is not None else _length_of(cache)
            encoder_BT = own_BS.new_zeros(len(own_BS), length)
        cross_mask = None if encoder_BT is None else AttentionMask.from_segments(own_BS, encoder_BT)
        h_BSD = self.embed(batch.tokens_BS, positions_BS)
        return self.decode(h_BSD, positions_BS, memory_BTD, mask=mask, cross_mask=cross_mask, cache=cache)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal with the root of one over a matrix's inputs; queries smaller by √head_dim where scores are not scaled (T5's rule)."""
        embedding_std = self.config.embedding_std(tied=OUTPUTS[T5Preset(self.config.preset)].tie_embeddings)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                smaller = name.endswith(".query") and not self.config.style.scale_attention
                std = module.in_features**-0.5 * (self.config.width_of_head**-0.5 if smaller else 1.0)
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                std = self.d_model**-0.5 if isinstance(module, RelativeBias) else embedding_std
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()

    def new_cache(self, batch_size: int, max_length: int) -> T5Cache:
        assert self.decoder is not None
        like = _local(cast(DecoderBlock, next(iter(self.decoder))).attention.key.weight)
        heads = like.shape[0] // self.config.width_of_head
        layers, head_dim = len(self.decoder.blocks), self.config.width_of_head
        return T5Cache(KeyValueCache(layers=layers, batch=batch_size, heads=heads, max_length=max_length, head_dim=head_dim, like=like))

    # -- its pieces, which parts of the model are driven by -----------------------------------------------------------------

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """[B, S, D]: embeddings, with learned positions where the model has them.

        Raises:
            ConfigError: more positions than the table of learned ones has.
        """
        h_BSD = self.embedding(tokens_BS)
        if self.positions is not None:
            if positions_BS.shape[1] > self.config.max_positions and int(positions_BS.max()) >= self.config.max_positions:
                raise ConfigError(
                    f"a sequence of {int(positions_BS.max()) + 1} positions is longer than the {self.config.max_positions} learned ones; "
                    f"set backbone.max_positions={int(positions_BS.max()) + 1} or backbone.position_embedding_type=relative"
                )
            h_BSD = h_BSD + self.positions(positions_BS)
        return self.dropout(h_BSD)

    def encode(self, h_BTD: Tensor, positions_BT: Tensor, mask: AttentionMask | None) -> Tensor:
        """The encoder's states [B, T, D], or what the next part of the encoder goes on from."""
        assert self.encoder is not None
        size, like = h_BTD.shape[1], next(self.encoder.parameters())
        sight = self.encoder.sight(mask, positions_BT, queries=size, keys=size, like=like, causal=False)
        for block in self.encoder:
            h_BTD = block(h_BTD, sight, compute_dtype(like))
        return self.encoder.finish(h_BTD)

    def decode(
        self,
        h_BSD: Tensor,
        positions_BS: Tensor,
        memory_BTD: Tensor | None,
        *,
        mask: AttentionMask | None = None,
        cross_mask: AttentionMask | None = None,
        cache: T5Cache | None = None,
    ) -> Tensor:
        """The decoder's states [B, S, D], or what its next part goes on from.

        Args:
            h_BSD: embeddings of the new positions, or what the part before gives.
            positions_BS: of the new positions.
            memory_BTD: the encoder's states. None: the cache has read them.
            mask: which old and new positions the new ones may see, beside the rule that none sees past itself.
            cross_mask: which of the encoder's positions they may see.
            cache: of what was read before.
        """
        assert self.decoder is not None
        size, like = h_BSD.shape[1], next(self.decoder.parameters())
        old, dtype = (0 if cache is None else cache.length), compute_dtype(like)
        sight = self.decoder.sight(mask, positions_BS, queries=size, keys=old + size, like=like, causal=True)
        cross = make_sight(cross_mask, relative_1HST=None, dtype=dtype)
        for place, block in enumerate(self.decoder):
            h_BSD = block(h_BSD, sight, cross, memory_BTD, dtype, cache, place)
        if cache is not None:
            cache.own.advance(size)
        return self.decoder.finish(h_BSD)


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this rank holds: tensor parallelism gives each some of the heads."""
    return weight.to_local() if hasattr(weight, "to_local") else weight  # pyright: ignore[reportAttributeAccessIssue]


def _length_of(cache: T5Cache | None) -> int:
    assert cache is not None
    return cache.cross[0][0].shape[2]
