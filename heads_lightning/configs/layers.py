"""Parts that backbones are made of, as configuration: positions, feed-forward, norms, biases, windows, rotary frequencies."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum


class Position(StrEnum):
    """How positions are told apart."""

    rotary = "rotary"
    """Rotary embedding of queries and keys (arXiv 2104.09864)."""
    learned = "learned"
    """A learned vector per position, added to the embedding."""
    none = "none"


class FeedForward(StrEnum):
    """Shape of the feed-forward part."""

    gated = "gated"
    """act(W1 x) * (W3 x), then W2 (arXiv 2002.05202)."""
    plain = "plain"
    """act(W1 x), then W2."""


class Activation(StrEnum):
    """Non-linearity of the feed-forward part."""

    silu = "silu"
    gelu = "gelu"
    """Exact, by the error function."""
    gelu_tanh = "gelu_tanh"
    """Approximated by tanh, as GPT-2 has it."""
    relu = "relu"
    relu_squared = "relu_squared"


class NormPlacement(StrEnum):
    """Where a block has its two norms; f is attention, then the feed-forward part."""

    pre = "pre"
    """h + f(norm(h)), and a norm at the end (GPT-2, Llama)."""
    post = "post"
    """norm(h + f(h)), none at the end (BERT)."""
    reordered = "reordered"
    """h + norm(f(h)), and a norm at the end (OLMo 2, arXiv 2501.00656)."""


class AttentionBias(StrEnum):
    """Which projections of attention have biases."""

    none = "none"
    qkv = "qkv"
    """Queries, keys and values (Qwen2)."""
    all = "all"
    """The output projection too."""


class QKNormWidth(StrEnum):
    """Over what a norm of queries and keys is taken."""

    head = "head"
    """Each head by itself, all heads with the same scales (Qwen3)."""
    full = "full"
    """All heads together (OLMo 2)."""


class RotaryScalingType(StrEnum):
    """How rotary frequencies are stretched for sequences longer than those trained on."""

    none = "none"
    """Not at all."""
    linear = "linear"
    """All of them, by the factor (position interpolation, arXiv 2306.15595)."""
    llama3 = "llama3"
    """Low frequencies by the factor, high ones not at all, a ramp between (Llama 3.1)."""
    yarn = "yarn"
    """A ramp over dimensions instead, and a higher temperature (arXiv 2309.00071)."""


@dataclass
class RotaryScaling:
    """A stretch of the rotary frequencies."""

    type: RotaryScalingType = RotaryScalingType.none
    """The rule."""
    factor: float = 1.0
    """How many times longer sequences may become."""
    original_positions: int = 8192
    """Positions that the model was trained on before (llama3, yarn)."""
    low_frequency_factor: float = 1.0
    """Turns within original_positions up to which a frequency is fully stretched (llama3)."""
    high_frequency_factor: float = 4.0
    """Turns from which on it is not stretched (llama3)."""
    slow_turns: float = 1.0
    """As low_frequency_factor (yarn, its beta_slow)."""
    fast_turns: float = 32.0
    """As high_frequency_factor (yarn, its beta_fast)."""
    whole_dimensions: bool = True
    """Round the ends of the ramp outwards to whole dimensions (yarn)."""
    attention_factor: float | None = None
    """Multiplies the rotated queries and keys (yarn). None: 0.1·ln(factor) + 1."""

    @property
    def temperature(self) -> float:
        """attention_factor in effect."""
        if self.type != RotaryScalingType.yarn:
            return 1.0
        return 0.1 * math.log(max(self.factor, 1.0)) + 1.0 if self.attention_factor is None else self.attention_factor


@dataclass
class LocalAttention:
    """Layers that see near positions alone."""

    window: int | None = None
    """A position sees those at a distance below this: itself and window - 1 before it, and as many after it where it may look ahead.
    None: every layer sees everything."""
    global_layers: list[int] = dataclasses.field(default_factory=list)
    """Layers, counted from 0, that see everything all the same."""
    rotary_base: float | None = None
    """Base of the rotary frequencies of local layers, never scaled. None: rotary_base and rotary_scaling, as in the others."""


class Direction(StrEnum):
    """What a recurrent backbone reads."""

    bidirectional = "bidirectional"
    """The whole sequence: masked language modelling."""
    causal = "causal"
    """What came before: left-to-right and infilling objectives, generation with a state of constant size."""


class CausalForm(StrEnum):
    """What becomes of the backward branch of BiGS when it may not look ahead."""

    dual = "dual"
    """A second state-space model, causal as the first: the parameters of the bidirectional model, so that one can be started from it."""
    gate = "gate"
    """No state: the branch gates by the position itself."""
    single = "single"
    """No such branch."""


class Convolution(StrEnum):
    """How a sequence is convolved with a state-space model's kernel. Always the same numbers, within rounding."""

    auto = "auto"
    """fft where a row is one document, chunked where documents are packed: the faster one where there is a choice, as measured on CPU."""
    fft = "fft"
    """Fourier transform. Packed rows, at whose borders it cannot stop, are read in chunks all the same."""
    chunked = "chunked"
    """Matrix products inside chunks and a state between them; up to 256 positions one chunk."""


class GateActivation(StrEnum):
    """Form of the Gaussian error linear unit in BiGS's gates. They differ by up to 5e-4."""

    gelu_tanh = "gelu_tanh"
    """tanh approximation: what the published checkpoints were trained with."""
    gelu = "gelu"
    """Exact: what the published PyTorch port computes."""
