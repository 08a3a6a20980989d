"""Parts that several backbones are made of: positions, masks, rotary embedding, attention, key/value cache, feed-forward.

Choices:
- What attention may see, and the rotary angles, are computed once per forward pass (`Reading`) and shared by all layers.
- Positions are counted inside each segment, so a packed document is computed exactly as if it were alone.
- Nothing here is a buffer: a module built on meta needs its parameters initialised and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones.base import Cache
from heads_lightning.backbones.gelu import gelu_tanh
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.base import NormType
from heads_lightning.configs.layers import Activation, RotaryScaling, RotaryScalingType

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.silu: F.silu,
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: gelu_tanh,
    Activation.relu: F.relu,
    Activation.relu_squared: lambda x: F.relu(x).square(),
}

NOT_SCALED = RotaryScaling()
QUERY_BLOCK = 128
"""Queries per block of `attend_in_blocks`: small enough that causal attention skips most of what it may not see."""
LONGEST_IN_BLOCKS = 1024
"""`attend_in_blocks` keeps the attention weights for the backward pass; beyond this many positions that is too much memory."""


class Reading(NamedTuple):
    """What all layers share in one forward pass."""

    positions: Tensor
    """int64 [S] or [B, S]: position inside the segment."""
    bias_B1ST: Tensor | None
    """Added to the attention scores, 0 or -inf, in compute_dtype. None: `causal` says it all."""
    causal: bool
    """No query sees a key after its own index (queries and keys are the same positions)."""
    compute_dtype: torch.dtype
    """Type in which matrices are multiplied: autocast's, or the parameters'."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Factors of `rotate`, [S, 1, E] or [B, S, 1, E], in compute_dtype."""


class KeyValueCache(Cache):
    """Keys and values of every layer, and the segments when there are any. Rows of unequal length are padded on the left (segment -1)."""

    def __init__(self, *, layers: int, batch: int, heads: int, max_length: int, head_dim: int, like: Tensor) -> None:
        shape = (layers, batch, heads, max_length, head_dim)
        self.keys_LBKTE = like.new_empty(shape)
        self.values_LBKTE = like.new_empty(shape)
        self.segments_BT: Tensor | None = None
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    def extend(self, layer: int, k_BKSE: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; returns all of them, [B, K, T, E]."""
        end = self._length + k_BKSE.shape[2]
        self.keys_LBKTE[layer, :, :, self._length : end] = k_BKSE
        self.values_LBKTE[layer, :, :, self._length : end] = v_BKSE
        return self.keys_LBKTE[layer, :, :, :end], self.values_LBKTE[layer, :, :, :end]

    def extend_segments(self, segments_BS: Tensor | None, tokens_BS: Tensor) -> Tensor | None:
        """Segments of all positions, old and new, or None when none were ever given. New positions without one are of segment 0."""
        end = self._length + tokens_BS.shape[1]
        if end > self.keys_LBKTE.shape[3]:
            raise ValueError(f"the cache holds {self.keys_LBKTE.shape[3]} positions, {end} are needed; ask new_cache for more")
        if segments_BS is not None or self.segments_BT is not None:
            old = tokens_BS.new_zeros(tokens_BS.shape[0], self._length) if self.segments_BT is None else self.segments_BT
            new = torch.zeros_like(tokens_BS) if segments_BS is None else segments_BS
            self.segments_BT = torch.cat((old, new.to(old.dtype)), dim=1)
        return self.segments_BT

    def reserve(self, positions: int) -> None:
        """Make room for so many positions, for callers that do not know how many there will be; what is held stays."""
        held = self.keys_LBKTE.shape[3]
        if positions <= held:
            return
        more = (0, 0, 0, max(positions, 2 * held) - held)
        self.keys_LBKTE, self.values_LBKTE = F.pad(self.keys_LBKTE, more), F.pad(self.values_LBKTE, more)

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on with what row rows[b] has read."""
        self.keys_LBKTE, self.values_LBKTE = self.keys_LBKTE[:, rows], self.values_LBKTE[:, rows]
        self.segments_BT = None if self.segments_BT is None else self.segments_BT[rows]

    def advance(self, count: int) -> None:
        """Count the positions that every layer has stored."""
        self._length += count


def prepare_reading(
    batch: Batch,
    cache: Cache | None,
    like: Tensor,
    rotary_dim: int | None,
    rotary_base: float,
    rotary_scaling: RotaryScaling = NOT_SCALED,
) -> Reading:
    """Positions, mask and rotary angles of one forward pass. `like` gives the parameters' device and type; rotary_dim None: no angles."""
    size, old = batch.tokens_BS.shape[1], 0
    segments_BT = batch.segments_BS
    if cache is not None:
        assert isinstance(cache, KeyValueCache)
        if batch.attention == Attention.bidirectional:
            raise ValueError("bidirectional attention cannot read on from a cache: what was read would have to see what follows")
        old = cache.length
        segments_BT = cache.extend_segments(segments_BS=batch.segments_BS, tokens_BS=batch.tokens_BS)
    dtype = compute_dtype(like)
    index = torch.arange(old + size, device=like.device)
    positions = index[old:] if segments_BT is None else positions_in_segments(segments_BT)[:, old:]
    plain = segments_BT is None and batch.attention != Attention.prefix and (old == 0 or size == 1)
    bias = None if plain else attention_bias(batch, segments_BT, index, size, dtype)
    causal = batch.attention == Attention.causal and old == 0
    rotary = None if rotary_dim is None else rotary_tables(positions, rotary_dim, rotary_base, like, dtype, rotary_scaling)
    return Reading(positions, bias, causal, dtype, rotary)


def local_reading(reading: Reading, batch: Batch, cache: Cache | None, window: int) -> Reading:
    """The same pass for layers in which a position sees those at a distance below `window` alone."""
    size, old = batch.tokens_BS.shape[1], 0 if cache is None else cache.length
    if old + size <= window:
        return reading
    index = torch.arange(old + size, device=batch.tokens_BS.device)
    bias = reading.bias_B1ST
    if bias is None:
        bias = attention_bias(batch, None, index, size, reading.compute_dtype)
    far_ST = (index[old:, None] - index[None, :]).abs() >= window
    return reading._replace(bias_B1ST=bias.masked_fill(far_ST, float("-inf")))


def compute_dtype(like: Tensor) -> torch.dtype:
    """Type of matrix products now: autocast's where it is on, else that of `like`."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def positions_in_segments(segments_BT: Tensor) -> Tensor:
    """int64 [B, T]: index counted from the first position of each run of equal segments."""
    index = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_bias(batch: Batch, segments_BT: Tensor | None, index_T: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """0 where a query may look and -inf elsewhere, [B or 1, 1, S, T]; the queries are the last `size` of the T positions.

    Measured on CPU: the same bias for all layers beats a boolean mask, which is turned into this in each of them.
    """
    old = index_T.shape[0] - size
    visible_BST = (index_T[None, :] <= index_T[old:, None])[None]
    if batch.attention == Attention.bidirectional:
        visible_BST = torch.ones_like(visible_BST)
    if batch.attention == Attention.prefix:
        if batch.prefix_BS is None:
            raise ValueError("attention=prefix needs Batch.prefix_BS")
        prefix_BT = F.pad(batch.prefix_BS, (old, 0))
        visible_BST = visible_BST | (batch.prefix_BS[:, :, None] & prefix_BT[:, None, :])
    if segments_BT is not None:
        visible_BST = visible_BST & (segments_BT[:, old:, None] == segments_BT[:, None, :])
    bias_BST = torch.zeros(visible_BST.shape, dtype=dtype, device=index_T.device).masked_fill(~visible_BST, float("-inf"))
    return bias_BST[:, None]


def rotary_tables(
    positions: Tensor, rotary_dim: int, base: float, like: Tensor, dtype: torch.dtype, scaling: RotaryScaling = NOT_SCALED
) -> tuple[Tensor, Tensor]:
    """Factors of `rotate` for angles position · base^(-2i/E), i < E/2 (arXiv 2104.09864, eq. 15), computed in fp32 or better."""
    exact = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device).to(exact) / rotary_dim
    frequencies = stretch(base**-exponent, scaling, base)
    angles = positions[..., None, None].to(exact) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling.temperature != 1:
        cos, sin = cos * scaling.temperature, sin * scaling.temperature
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def stretch(frequencies: Tensor, scaling: RotaryScaling, base: float) -> Tensor:
    """Rotary frequencies [E/2] for sequences `factor` times as long; see RotaryScalingType."""
    if scaling.type == RotaryScalingType.none:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.type == RotaryScalingType.linear:
        return slow
    if scaling.type == RotaryScalingType.llama3:
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        return torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))
    first, last = (_dimension_of(turns, scaling, base, 2 * len(frequencies)) for turns in (scaling.fast_turns, scaling.slow_turns))
    if scaling.whole_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(frequencies) - 1)
    ramp = (torch.arange(len(frequencies), device=frequencies.device) - first) / (last - first or 1e-3)
    return torch.lerp(frequencies, slow, ramp.clamp(0, 1).to(frequencies))


def _dimension_of(turns: float, scaling: RotaryScaling, base: float, width: int) -> float:
    """The (fractional) pair of dimensions that makes so many turns within the original positions (arXiv 2309.00071, section 3.2)."""
    return width * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))


def rotate(x_BSHE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head by the angles of its position: the layout of Llama and GPT-NeoX.

    In the type of matrix products, as transformers does; written with roll, it takes a third of the time of the textbook form in bf16.
    """
    cos, sin = rotary
    return x_BSHE * cos + x_BSHE.roll(x_BSHE.shape[-1] // 2, dims=-1) * sin


def attend(q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, reading: Reading, scale: float) -> Tensor:
    """Attention output, [B, S, H·E]. Groups of H/K query heads share a key/value head."""
    size = q_BHSE.shape[2]
    if q_BHSE.device.type == "cpu" and reading.compute_dtype == torch.bfloat16 and 1 < size == k_BKTE.shape[2] <= LONGEST_IN_BLOCKS:
        y_BHSE = attend_in_blocks(q_BHSE, k_BKTE, v_BKTE, reading, scale)
    else:
        y_BHSE = F.scaled_dot_product_attention(
            q_BHSE,
            k_BKTE,
            v_BKTE,
            attn_mask=reading.bias_B1ST,
            is_causal=reading.causal and reading.bias_B1ST is None,
            scale=scale,
            enable_gqa=q_BHSE.shape[1] != k_BKTE.shape[1],
        )
    return y_BHSE.transpose(1, 2).flatten(2)


def attend_in_blocks(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, reading: Reading, scale: float) -> Tensor:
    """The same attention from plain matrix products, a block of queries at a time; [B, H, S, E].

    For bf16 on CPUs, whose fused kernel takes twice as long (forward and backward, B 16, H 4, E 64, two cores: 31 against 15 ms at
    S 256, 102 against 54 ms at S 512), because the plain products use the processor's bf16 instructions.
    """
    groups, size = q_BHSE.shape[1] // k_BKSE.shape[1], q_BHSE.shape[2]
    q_BHSE = (q_BHSE * scale).contiguous()
    k_BHES = k_BKSE.repeat_interleave(groups, dim=1).contiguous().transpose(2, 3)
    v_BHSE = v_BKSE.repeat_interleave(groups, dim=1).contiguous()
    outputs = []
    for start in range(0, size, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, size)
        keys = end if reading.causal else size
        scores = q_BHSE[:, :, start:end] @ k_BHES[..., :keys]
        if reading.bias_B1ST is not None:
            scores = scores + reading.bias_B1ST[:, :, start:end, :keys]
        elif reading.causal:
            scores = scores + scores.new_full((end - start, keys), float("-inf")).triu(start + 1)
        outputs.append(scores.softmax(dim=-1) @ v_BHSE[:, :, :keys])
    return torch.cat(outputs, dim=2)


def make_norm(kind: NormType, width: int, *, eps: float, bias: bool) -> nn.Module:
    """The norm layer of that kind over the last dimension."""
    return nn.RMSNorm(width, eps=eps) if kind == NormType.rms else nn.LayerNorm(width, eps=eps, bias=bias)


class SelfAttention(nn.Module):
    """Grouped-query attention of a sequence to itself.

    Args:
        qkv_bias: biases of queries, keys and values.
        output_bias: bias of the output projection.
        qk_norm_eps: of the RMS norm of queries and keys (arXiv 2302.05442). None: no such norm.
        qk_norm_heads: that norm is of each head by itself; otherwise of all heads together.
        scale: multiplies the products of queries and keys. None: 1/sqrt(head_dim).
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        qk_norm_heads: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(d_model, num_heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(d_model, num_kv_heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(d_model, num_kv_heads * head_dim, bias=qkv_bias)
        self.output = nn.Linear(num_heads * head_dim, d_model, bias=output_bias)
        widths = (head_dim, head_dim) if qk_norm_heads else (num_heads * head_dim, num_kv_heads * head_dim)
        self.query_norm = nn.RMSNorm(widths[0], eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.key_norm = nn.RMSNorm(widths[1], eps=qk_norm_eps) if qk_norm_eps is not None else None

    def forward(self, x_BSD: Tensor, reading: Reading, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[B, S, D] to [B, S, D]; `layer` is this layer's place in the cache."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q, k, v = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD).view(heads)
        q, k = self._normed(q, self.query_norm).view(heads), self._normed(k, self.key_norm).view(heads)
        if reading.rotary is not None:
            q, k = rotate(q, reading.rotary), rotate(k, reading.rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.output(attend(q, k, v, reading, self.scale))

    def _normed(self, x_BSF: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Queries or keys of all heads, normed by head or as a whole."""
        if norm is None:
            return x_BSF
        exact = norm.weight.dtype  # under autocast x is coarser; torch warns where a norm meets two types
        return norm(x_BSF.to(exact).unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2).to(x_BSF.dtype)


class GatedFeedForward(nn.Module):
    """act(gate x) * (up x), then down (arXiv 2002.05202)."""

    def __init__(self, *, d_model: int, inner: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(d_model, inner, bias=bias)
        self.up = nn.Linear(d_model, inner, bias=bias)
        self.down = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.down(self.activation(self.gate(x_BSD)) * self.up(x_BSD))


class PlainFeedForward(nn.Module):
    """act(up x), then down."""

    def __init__(self, *, d_model: int, inner: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(d_model, inner, bias=bias)
        self.down = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.down(self.activation(self.up(x_BSD)))
