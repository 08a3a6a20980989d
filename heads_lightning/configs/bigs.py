"""`backbone=bigs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.layers import (
    CausalForm,
    Convolution,
    Direction,
    GateActivation,
    Position,
)

if TYPE_CHECKING:
    import torch


@backbones.register("bigs")
@dataclass
class BiGSBackboneConfig(BackboneConfig):
    """BiGS (arXiv 2212.10544): state-space models in two directions and multiplicative gates, no attention; causal on request."""

    supports: ClassVar[frozenset[Attention]] = frozenset({Attention.causal, Attention.bidirectional})
    boundless_position: ClassVar[str] = "none"

    name: str = "bigs"
    d_model: int = 256
    """Width of the hidden states."""
    num_layers: int = 4
    """Blocks."""
    inner_dim: int | None = None
    """Width of the outer gate. None: 3·d_model, as published."""
    state_size: int = 64
    """Complex modes of each state-space model (published as num_ssm, though it counts no models)."""
    direction: Direction = Direction.bidirectional
    """What is read. objective=mlm needs bidirectional; causal and fim need causal."""
    causal_form: CausalForm = CausalForm.dual
    """What becomes of the backward branch; matters with direction=causal only."""
    gate_activation: GateActivation = GateActivation.gelu_tanh
    """Non-linearity of every gate."""
    convolution: Convolution = Convolution.auto
    """How sequences are convolved: a matter of speed alone."""
    position: Position = Position.learned
    """learned: a vector per position, as published. none: the recurrence alone tells positions apart, and no length is too long."""
    max_positions: int = 512
    """Longest sequence with position=learned; size of the table."""
    num_token_types: int = 2
    """Rows of the token-type embedding, of which the toolkit's objectives use the first. 0: no such table."""
    norm_eps: float = 1e-12
    """Added to the variance before the root, in every norm."""
    final_norm: bool = True
    """A norm after the last block, which a linear head needs. The published model has none: its head has a norm of its own."""
    dropout: float = 0.0
    """Dropout on the embedding; 0.1 in the published models."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("d_model", "num_layers", "state_size", "max_positions"):
            self.require(getattr(self, field) >= 1, field, "1 or more")
        self.require(self.inner_dim is None or self.inner_dim >= 1, "inner_dim", "1 or more, or null")
        self.require(self.num_token_types >= 0, "num_token_types", "0 or more")
        self.require(0 <= self.dropout < 1, "dropout", "0 <= dropout < 1")
        self.require(self.position != Position.rotary, "position", "learned, none")

    @property
    def inner(self) -> int:
        """Width of the outer gate in effect."""
        return 3 * self.d_model if self.inner_dim is None else self.inner_dim

    @property
    def is_causal(self) -> bool:
        """Whether nothing looks ahead."""
        return self.direction == Direction.causal

    @property
    def num_systems(self) -> int:
        """State-space models of a block."""
        return 1 if self.is_causal and self.causal_form != CausalForm.dual else 2

    @property
    def has_second_branch(self) -> bool:
        """Whether a second branch multiplies the first."""
        return not (self.is_causal and self.causal_form == CausalForm.single)

    def attention_supported(self) -> frozenset[Attention]:
        return frozenset({Attention(self.direction.value)})

    @classmethod
    def fields_for(cls, attention: Attention) -> dict[str, Any]:
        return {"direction": Direction(attention.value)} if attention in cls.supports else {}

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        from heads_lightning.backbones.bigs import BiGS

        return BiGS(self, vocab_size=vocab_size, init_device=init_device)

    def _matrix_params(self) -> int:
        """Weights of the linear layers."""
        return self.num_layers * self.d_model * (3 * self.inner + (4 if self.has_second_branch else 2) * self.d_model)

    def num_params(self, vocab_size: int) -> int:
        d, biases = self.d_model, 2 * self.inner + (5 if self.has_second_branch else 3) * self.d_model
        system = 4 * self.state_size + 2  # A and C, both complex; dt and D
        tables = vocab_size + self.num_token_types + (self.max_positions if self.position == Position.learned else 0)
        blocks = self.num_layers * (biases + 2 * d + self.num_systems * system)
        return tables * d + 2 * d + self._matrix_params() + blocks + (2 * d if self.final_norm else 0)

    def num_flops_per_token(self, sequence_length: int) -> int:
        """As in the base; the convolutions, by Fourier transform, are no matrix products and are left out."""
        return 6 * self._matrix_params()
