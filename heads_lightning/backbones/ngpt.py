"""`backbone=ngpt`: the normalized transformer (nGPT, arXiv 2410.01131), whose hidden states move on the unit sphere.

Every matrix has unit norm along d_model: rows of those that read hidden states, columns of those that write them, rows of the embedding.
That is restored after each optimizer step (`after_optimizer_step`), not computed in the forward pass, as in the authors' code. There are
no norm layers, biases or dropout; no weight decay and no warm-up are wanted. Section and equation numbers below are the paper's.

Choices where paper and code leave room: queries and keys are normalised and scaled after the rotary embedding, step sizes act by their
absolute value (both as in the authors' code); with grouped queries, s_qk belongs to the key/value head.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache
from heads_lightning.backbones.layers import KeyValueCache, Reading, attend, prepare_reading, rotate
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.transformer import NGPTConfig


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x divided by its Euclidean norm along `dim`."""
    return F.normalize(x, dim=dim)


class LearnedScale(nn.Module):
    """A vector that starts at `init` and is stored as `scale`: an Adam step of size lr changes it by lr·init/scale (section 2.5)."""

    def __init__(self, size: int, *, init: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.ratio = init / scale
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self) -> Tensor:
        """The effective vector."""
        return self.weight * self.ratio

    def reset_parameters(self) -> None:
        """Set the effective vector to `init`."""
        nn.init.constant_(self.weight, self.scale)


class NormalizedAttention(nn.Module):
    """Attention whose queries and keys have unit norm, times a learned scale (section 2.3.2, eqs. 15 and 16)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        d_model, self.head_dim = config.d_model, config.d_model // config.num_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, config.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(d_model, config.kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.s_qk = LearnedScale(config.kv_heads * self.head_dim, init=1.0, scale=d_model**-0.5)

    def forward(self, x_BSD: Tensor, reading: Reading, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        heads = (*x_BSD.shape[:2], -1, self.head_dim)
        q, k, v = self.query(x_BSD).view(heads), self.key(x_BSD).view(heads), self.value(x_BSD).view(heads)
        assert reading.rotary is not None
        s_KE = self.s_qk().view(-1, self.head_dim)
        s_HE = s_KE.repeat_interleave(q.shape[2] // k.shape[2], dim=0)
        q = (unit(rotate(q, reading.rotary)) * s_HE).to(v.dtype).transpose(1, 2)
        k = (unit(rotate(k, reading.rotary)) * s_KE).to(v.dtype).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        # the product of unit vectors has variance 1/E: the softmax is scaled by sqrt(E), not 1/sqrt(E)
        return self.output(attend(q, k, v, reading, self.head_dim**0.5))


class NormalizedFeedForward(nn.Module):
    """u · SiLU(v), with u and v scaled by s_u and s_v·sqrt(d_model) (section 2.4, eqs. 20 and 21)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.ff_dim, bias=False)
        self.gate = nn.Linear(config.d_model, config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, config.d_model, bias=False)
        self.s_u = LearnedScale(config.ff_dim, init=1.0, scale=1.0)
        self.s_v = LearnedScale(config.ff_dim, init=1.0, scale=1.0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        u, v = self.up(x_BSD), self.gate(x_BSD)
        s_u, s_v = self.s_u(), self.s_v() * x_BSD.shape[-1] ** 0.5
        return self.down(u * s_u.to(u.dtype) * F.silu(v * s_v.to(v.dtype)))


class NormalizedBlock(nn.Module):
    """h ← Norm(h + alpha · (Norm(branch(h)) − h)), for attention and then the feed-forward part (eqs. 10 and 11)."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self.attention = NormalizedAttention(config)
        self.feed_forward = NormalizedFeedForward(config)
        init = 1 / config.num_layers if config.alpha_init is None else config.alpha_init
        self.alpha_attention = LearnedScale(config.d_model, init=init, scale=config.d_model**-0.5)
        self.alpha_feed_forward = LearnedScale(config.d_model, init=init, scale=config.d_model**-0.5)

    def forward(self, h_BSD: Tensor, reading: Reading, cache: KeyValueCache | None, layer: int) -> Tensor:
        """[B, S, D] to [B, S, D], both of unit norm."""
        h_BSD = step(h_BSD, self.attention(h_BSD.to(reading.compute_dtype), reading, cache, layer), self.alpha_attention())
        return step(h_BSD, self.feed_forward(h_BSD.to(reading.compute_dtype)), self.alpha_feed_forward())


def step(h_BSD: Tensor, branch_BSD: Tensor, alpha_D: Tensor) -> Tensor:
    """One step on the sphere from h towards the branch's suggestion."""
    return unit(torch.lerp(h_BSD, unit(branch_BSD.to(h_BSD.dtype)), alpha_D.abs()))


class NGPT(Backbone):
    """See NGPTConfig for what can be chosen. Its hidden states have unit norm: use head=normalized, which learns the logits' scale."""

    supports: ClassVar[frozenset[Attention]] = NGPTConfig.supports

    def __init__(self, config: NGPTConfig, *, vocab_size: int, init_device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        with torch.device("meta"):
            self.embedding = nn.Embedding(vocab_size, config.d_model)
            self.blocks = nn.ModuleList(NormalizedBlock(config) for _ in range(config.num_layers))
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, KeyValueCache)
        head_dim = self.d_model // self.config.num_heads
        reading = prepare_reading(batch, cache, self.embedding.weight, head_dim, self.config.rotary_base)
        h_BSD = self.embedding(batch.tokens_BS)
        for layer, block in enumerate(self.blocks):
            h_BSD = block(h_BSD, reading, cache, layer)
        if cache is not None:
            cache.advance(batch.tokens_BS.shape[1])
        return h_BSD

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random directions of unit norm; scales at their initial values."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, generator=generator)
            elif isinstance(module, LearnedScale):
                module.reset_parameters()
        self.after_optimizer_step()

    def new_cache(self, batch_size: int, max_length: int) -> KeyValueCache:
        return KeyValueCache(
            layers=self.config.num_layers,
            batch=batch_size,
            heads=self.config.kv_heads,
            max_length=max_length,
            head_dim=self.d_model // self.config.num_heads,
            like=self.embedding.weight,
        )

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Bring every matrix back to unit norm along d_model (section 2.6, step 2)."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith((".attention.output", ".feed_forward.down"))
                weight = module.weight
                weight.copy_(unit(weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=0 if writes else 1))
