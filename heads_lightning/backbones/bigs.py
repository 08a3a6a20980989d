"""`backbone=bigs`: the bidirectional gated state-space model (Wang et al. 2022, arXiv 2212.10544), and causal forms of it.

A block is pre-norm, h ← h + Wo(gelu(We(f · b)) · v), with three branches of x = norm(h):

    v = gelu(Wv x)        f = Wf' S(gelu(Wf x))        b = Wb' S̄(gelu(Wb x))

S is a state-space model that runs forward, S̄ one that runs backward, each shared by all channels. There is no attention, and the usual
feed-forward part is inside the block. With direction=causal, b has a causal system (`dual`), none (`gate`), or is left out (`single`).

Choices: linear layers act on positions one by one, so the flips of the published code cancel and S̄ is a convolution in the other
direction; positions of another segment are invisible, padding included, since the convolution stops at a segment's border.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache
from heads_lightning.backbones.gelu import gelu_tanh, gelu_tanh_product
from heads_lightning.backbones.layers import compute_dtype, positions_in_segments
from heads_lightning.backbones.ssm import S4D, State
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import GateActivation, Position
from heads_lightning.registry import ConfigError

Gate = Callable[[Tensor], Tensor]
GATES: dict[GateActivation, tuple[Gate, Callable[[Tensor, Tensor], Tensor]]] = {
    GateActivation.gelu: (F.gelu, lambda a, b: F.gelu(a) * F.gelu(b)),
    GateActivation.gelu_tanh: (gelu_tanh, gelu_tanh_product),
}
"""A non-linearity, and the product of two of its values."""


class Course(NamedTuple):
    """What all blocks share in one forward pass."""

    positions: Tensor
    """int64 [S] or [B, S]: position inside the segment."""
    segments_BS: Tensor | None
    """Segments of the positions read. None: one segment a row."""
    same_BS: Tensor | None
    """bool: positions in the segment of the states that were handed over. None: all."""
    compute_dtype: torch.dtype
    """Type of matrix products."""


class StateCache(Cache):
    """The states of every block: as large after a million positions as after one."""

    def __init__(self, config: BiGSBackboneConfig, rows: int, *, like: Tensor) -> None:
        def states() -> list[State]:
            return [State(rows, config.state_size, config.d_model, like=like) for _ in range(config.num_systems)]

        self.states = [states() for _ in range(config.num_layers)]
        self._length = 0
        self._segment_B: Tensor | None = None
        self._run_B: Tensor | None = None  # positions of that segment so far; only with segments

    @property
    def length(self) -> int:
        return self._length

    def course(self, batch: Batch, dtype: torch.dtype) -> Course:
        """What the blocks need to read on; new positions without a segment are of segment 0."""
        tokens_BS, segments_BS = batch.tokens_BS, batch.segments_BS
        index = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        if segments_BS is None and self._segment_B is None:
            return Course(index + self._length, None, None, dtype)
        segments_BS = torch.zeros_like(tokens_BS) if segments_BS is None else segments_BS
        zeros_B = torch.zeros_like(tokens_BS[:, 0])
        segment_B = zeros_B if self._segment_B is None else self._segment_B
        run_B = (zeros_B + self._length) if self._run_B is None else self._run_B
        same_BS = (segments_BS == segment_B[:, None]).cumprod(dim=1).bool()
        positions_BS = positions_in_segments(segments_BS) + same_BS * run_B[:, None]
        self._segment_B, self._run_B = segments_BS[:, -1], positions_BS[:, -1] + 1
        return Course(positions_BS, segments_BS, same_BS, dtype)

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on with what row rows[b] has read."""
        for state in (state for block in self.states for state in block):
            state.values_BXD = state.values_BXD[rows]
        self._segment_B = None if self._segment_B is None else self._segment_B[rows]
        self._run_B = None if self._run_B is None else self._run_B[rows]

    def advance(self, count: int) -> None:
        """Count positions that every block has read."""
        self._length += count


class Block(nn.Module):
    """One gated state-space block, [B, S, D] to [B, S, D]."""

    def __init__(self, config: BiGSBackboneConfig) -> None:
        super().__init__()
        d_model, inner = config.d_model, config.inner
        self.convolution, self.is_causal = config.convolution, config.is_causal
        self.gate, self.gate_product = GATES[config.gate_activation]
        self.norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.value = nn.Linear(d_model, inner)
        self.forward_in = nn.Linear(d_model, d_model)
        self.forward_system = S4D(config.state_size)
        self.forward_out = nn.Linear(d_model, d_model)
        self.backward_in = nn.Linear(d_model, d_model) if config.has_second_branch else None
        self.backward_system = S4D(config.state_size) if config.num_systems == 2 else None
        self.backward_out = nn.Linear(d_model, d_model) if config.has_second_branch else None
        self.expand = nn.Linear(d_model, inner)
        self.output = nn.Linear(inner, d_model)

    def forward(self, h_BSD: Tensor, course: Course, states: list[State] | None) -> Tensor:
        """One block; `states` are those of its systems, brought forward."""
        x_BSD = self.norm(h_BSD).to(course.compute_dtype)
        mixed_BSD = self.forward_out(self._run(self.forward_system, self.gate(self.forward_in(x_BSD)), course, states, 0))
        if self.backward_in is not None and self.backward_out is not None:
            other_BSD = self.gate(self.backward_in(x_BSD))
            if self.backward_system is not None:
                other_BSD = self._run(self.backward_system, other_BSD, course, states, 1)
            mixed_BSD = mixed_BSD * self.backward_out(other_BSD)
        return h_BSD + self.output(self.gate_product(self.expand(mixed_BSD), self.value(x_BSD)))

    def _run(self, system: S4D, u_BSD: Tensor, course: Course, states: list[State] | None, place: int) -> Tensor:
        if states is None:
            reverse = place == 1 and not self.is_causal
            return system(u_BSD, form=self.convolution, segments_BS=course.segments_BS, reverse=reverse)
        return system(u_BSD, form=self.convolution, segments_BS=course.segments_BS, state=states[place], same_BS=course.same_BS)


class BiGS(Backbone):
    """See BiGSBackboneConfig for what can be chosen.

    Args:
        config: sizes and options.
        vocab_size: rows of the embedding.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
    """

    supports: ClassVar[frozenset[Attention]] = BiGSBackboneConfig.supports
    dynamics: ClassVar[tuple[str, ...]] = ("log_step", "A_re", "A_im", "C", "D")

    def __init__(self, config: BiGSBackboneConfig, *, vocab_size: int, init_device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        with torch.device("meta"):
            self.embedding = nn.Embedding(vocab_size, config.d_model)
            self.positions = nn.Embedding(config.max_positions, config.d_model) if config.position == Position.learned else None
            self.token_types = nn.Embedding(config.num_token_types, config.d_model) if config.num_token_types else None
            self.embedding_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.final_norm else None
        self.dropout = nn.Dropout(config.dropout)
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        course = self.course(batch, cache)
        return self.run(self.embed(batch.tokens_BS, course), course, cache)

    def course(self, batch: Batch, cache: Cache | None = None) -> Course:
        """What all blocks share when they read `batch`."""
        if batch.attention not in self.config.attention_supported():
            raise ConfigError(f"backbone.direction={self.config.direction} cannot read a batch whose attention is {batch.attention}")
        self._check_length(batch.tokens_BS.shape[1] + (cache.length if cache is not None else 0))
        dtype = compute_dtype(self.embedding.weight)
        if cache is not None:
            assert isinstance(cache, StateCache)
            if not self.config.is_causal:
                raise ValueError("bidirectional attention cannot read on from a cache: what was read would have to see what follows")
            return cache.course(batch, dtype)
        index = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
        positions = index if batch.segments_BS is None else positions_in_segments(batch.segments_BS)
        return Course(positions, batch.segments_BS, None, dtype)

    def embed(self, tokens_BS: Tensor, course: Course, token_types_BS: Tensor | None = None) -> Tensor:
        """The sum of the embeddings, normed; token type 0 where none is given. [B, S, D]."""
        h_BSD = self.embedding(tokens_BS)
        if self.token_types is not None:
            h_BSD = h_BSD + (self.token_types.weight[0] if token_types_BS is None else self.token_types(token_types_BS))
        if self.positions is not None:
            h_BSD = h_BSD + self.positions(course.positions)
        return self.dropout(self.embedding_norm(h_BSD))

    def run(self, h_BSD: Tensor, course: Course, cache: Cache | None = None, seen: Callable[[Tensor], None] | None = None) -> Tensor:
        """The blocks and the final norm; `seen` is shown the input of each block."""
        assert cache is None or isinstance(cache, StateCache)
        for layer, block in enumerate(self.blocks):
            if seen is not None:
                seen(h_BSD)
            h_BSD = block(h_BSD, course, None if cache is None else cache.states[layer])
        if cache is not None:
            cache.advance(h_BSD.shape[1])
        return h_BSD if self.norm is None else self.norm(h_BSD)

    @property
    def exact_modules(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, S4D)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Matrices and embeddings normal with init_std, biases 0, norms 1; state-space models by their own rule."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.init_std, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, S4D):
                module.reset_parameters(generator)

    def new_cache(self, batch_size: int, max_length: int) -> StateCache:
        if not self.config.is_causal:
            raise ConfigError(
                f"backbone.direction={self.config.direction} cannot generate: what was read would have to see what follows; "
                f"train with backbone.direction=causal"
            )
        return StateCache(self.config, batch_size, like=self.blocks[0].get_parameter("forward_system.D"))

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.config.max_positions:
            raise ConfigError(
                f"a sequence of {length} positions is longer than the {self.config.max_positions} learned ones; "
                f"set backbone.max_positions={length} or backbone.position=none"
            )
