"""T5's attention: what a stack's layers share (`Sight`), relative positions, and attention with a learned bias.

Choices:
- The bias depends on the distance of query and key alone. It is looked up once per distance and laid out once for all layers.
- Inside a segment, distance is difference of index: packing and left padding need nothing of their own.
- A learned bias keeps PyTorch's fused kernels on the CPU from training (they have no gradient for it), and its fallback makes ten passes
  over the scores. `AttentionWithBias` makes four, and sums the bias's gradient over the batch where it arises.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heads_lightning.backbones.layers import rotate
from heads_lightning.backbones.masks import AttentionMask


class Sight(NamedTuple):
    """What one kind of attention sees, the same in all layers."""

    bias: Tensor | None
    """Added to the scores, [B or 1, H or 1, S, T] in the type of matrix products: mask and relative positions. It carries no gradient."""
    relative_1HST: Tensor | None
    """The part of it that is learned, with its gradient."""
    mask_B1ST: Tensor | None
    """The other part, or None."""
    sees_BS1: Tensor | None
    """False where a query sees nothing: its result is 0. None: every query sees something."""
    causal: bool = False
    """There is no bias; queries and keys are the same positions, and none sees past itself."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Factors of `layers.rotate` for queries and keys."""


def make_sight(
    mask: AttentionMask | None, *, relative_1HST: Tensor | None, dtype: torch.dtype, rotary: tuple[Tensor, Tensor] | None = None
) -> Sight:
    """The sight through a mask, with relative positions where there are any. Both in `dtype`."""
    mask_B1ST = None if mask is None else mask.additive(dtype)
    parts = [part.detach() for part in (relative_1HST, mask_B1ST) if part is not None]
    bias = parts[0] + parts[1] if len(parts) == 2 else parts[0] if parts else None
    return Sight(bias, relative_1HST, mask_B1ST, None if mask is None else mask.sees_something(), rotary=rotary)


def buckets(distances: Tensor, *, count: int, max_distance: int, both_sides: bool) -> Tensor:
    """int64: bucket of each distance (key's position minus query's), as in T5 (arXiv 1910.10683, section 2.1).

    Half of a side's buckets hold one distance each, the others grow by a constant factor up to max_distance, where the last one begins.
    A decoder has one side, the past; an encoder halves its buckets between past and future.
    """
    side = count // 2 if both_sides else count
    offset = torch.where(distances > 0, side, 0) if both_sides else torch.zeros_like(distances)
    away = distances.abs() if both_sides else (-distances).clamp(min=0)
    exact = side // 2
    # fp32, in this order: at the edges of buckets another order of rounding gives another bucket than the published weights were made for
    growth = torch.log(away.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (side - exact)
    far = (exact + growth.long()).clamp(max=side - 1)
    return offset + torch.where(away < exact, away, far)


class RelativeBias(nn.Embedding):
    """A learned number per bucket of distances and head; shared by the layers of a stack.

    Args:
        count: buckets.
        num_heads: heads.
        max_distance: distances from here on share a bucket.
        both_sides: keys after the query are told apart from those before it.
    """

    def __init__(self, count: int, num_heads: int, *, max_distance: int, both_sides: bool) -> None:
        super().__init__(count, num_heads)
        self.max_distance = max_distance
        self.both_sides = both_sides

    def of(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        """[1, H, queries, keys], contiguous: the bias of the last `queries` of `keys` positions."""
        distances = torch.arange(1 - keys, queries, device=self.weight.device)
        which = buckets(distances, count=self.num_embeddings, max_distance=self.max_distance, both_sides=self.both_sides)
        values_HR = self(which).to(dtype).T
        # row s of the result is a window of the distances that begins at that of key 0
        return values_HR.unfold(1, keys, 1).flip(1).unsqueeze(0).contiguous()


class Attention(nn.Module):
    """Multi-head attention of queries to keys that may come from another sequence.

    Args:
        d_model: width of the hidden states.
        num_heads, head_dim: of queries, keys and values.
        bias: of the four linear layers.
        scale: of the scores.
        dropout: share of attention weights that are dropped in training.
    """

    def __init__(self, *, d_model: int, num_heads: int, head_dim: int, bias: bool, scale: float, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.scale, self.dropout = head_dim, scale, dropout
        self.query = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.value = nn.Linear(d_model, num_heads * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, d_model, bias=bias)

    def keys_values(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """[B, H, T, E] each, of the sequence that is looked at."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        k_BTHE, v_BTHE = self.key(x_BTD).view(heads), self.value(x_BTD).view(heads)
        return _rotated(k_BTHE, rotary).transpose(1, 2), v_BTHE.transpose(1, 2)

    def forward(self, x_BSD: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, sight: Sight) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        q_BSHE = self.query(x_BSD).view(*x_BSD.shape[:2], -1, self.head_dim)
        q_BHSE = _rotated(q_BSHE, sight.rotary).transpose(1, 2)
        y_BHSE = attend(q_BHSE, k_BHTE, v_BHTE, sight, self.scale, self.dropout if self.training else 0.0)
        y_BSD = y_BHSE.transpose(1, 2).flatten(2)
        return self.output(y_BSD if sight.sees_BS1 is None else y_BSD * sight.sees_BS1)


def _rotated(x_BSHE: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """The first channels of each head rotated, as many as there are factors."""
    if rotary is None:
        return x_BSHE
    width = rotary[0].shape[-1]
    if width == x_BSHE.shape[-1]:
        return rotate(x_BSHE, rotary)
    return torch.cat((rotate(x_BSHE[..., :width], rotary), x_BSHE[..., width:]), dim=-1)


def attend(q_BHSE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, sight: Sight, scale: float, dropout: float) -> Tensor:
    """Attention output, [B, H, S, E]."""
    relative = sight.relative_1HST
    learns = relative is not None and relative.requires_grad and torch.is_grad_enabled()
    if relative is not None and learns and dropout == 0 and q_BHSE.device.type == "cpu":
        return AttentionWithBias.apply(q_BHSE, k_BHTE, v_BHTE, relative, sight.bias, scale)  # pyright: ignore[reportReturnType]
    bias = sight.bias
    if relative is not None and learns:
        bias = relative if sight.mask_B1ST is None else relative + sight.mask_B1ST
    return F.scaled_dot_product_attention(
        q_BHSE, k_BHTE, v_BHTE, attn_mask=bias, dropout_p=dropout, is_causal=sight.causal and bias is None, scale=scale
    )


class AttentionWithBias(torch.autograd.Function):
    """softmax(scale · q kᵀ + bias) v with a gradient for the part of the bias that all rows share.

    Attention weights are kept for the backward pass, in the type of q. Rows are worked on one at a time: their scores stay in cache.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, relative_1HST: Tensor, bias: Tensor, scale: float) -> Tensor:
        """q [B, H, S, E]; k, v [B, H, T, E]; relative_1HST [1, H, S, T], to which a gradient goes; bias [B or 1, H, S, T], added."""
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        weights_BHST = q.new_empty(*q.shape[:3], k.shape[2])
        y_BHSE = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):
            for b in range(len(q)):
                scores_HST = torch.baddbmm(bias[b if len(bias) > 1 else 0], q[b], k[b].transpose(1, 2))
                torch.softmax(scores_HST, -1, out=weights_BHST[b])
                torch.bmm(weights_BHST[b], v[b], out=y_BHSE[b])
        ctx.save_for_backward(q, k, v, weights_BHST)
        ctx.scale = scale
        return y_BHSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, weights_BHST = ctx.saved_tensors
        dy = grads[0].to(q.dtype).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        relative_HST = torch.zeros_like(weights_BHST[0])
        with torch.autocast(q.device.type, enabled=False):
            for b in range(len(q)):
                weights_HST = weights_BHST[b]
                torch.bmm(weights_HST.transpose(1, 2), dy[b], out=dv[b])
                upstream_HST = torch.bmm(dy[b], v[b].transpose(1, 2))
                scores_HST = torch._softmax_backward_data(upstream_HST, weights_HST, -1, q.dtype)
                relative_HST += scores_HST
                torch.bmm(scores_HST, k[b], out=dq[b])
                torch.bmm(scores_HST.transpose(1, 2), q[b], out=dk[b])
        return dq.mul_(ctx.scale), dk, dv, relative_HST.unsqueeze(0), None, None
