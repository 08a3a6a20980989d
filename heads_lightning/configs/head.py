"""Heads: what turns hidden states into a score, and how that score is computed (`head=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.configs.base import DType, LayerNormConfig, Option
from heads_lightning.registry import ConfigError, Registry

if TYPE_CHECKING:
    import torch
    from torch import nn


class LMHeadType(StrEnum):
    """The built-in heads over a vocabulary."""

    default = "default"
    normalized = "normalized"
    mlm = "mlm"
    t5 = "t5"


class LMLossImplementation(StrEnum):
    """How the cross-entropy of a projection is computed. Always the same number, within rounding."""

    default = "default"
    """Plain PyTorch: all logits in memory."""
    chunked = "chunked"
    """Ours: gradients formed in the forward pass, chunk by chunk; any device, any dtype."""
    fused_linear = "fused_linear"
    """Liger's Triton kernel; needs a GPU."""
    cce = "cce"
    """Apple's cut cross-entropy, which recomputes instead of storing; needs a GPU and the package."""
    torch = "torch"
    """PyTorch's own linear_cross_entropy, chunked, where the installed version has it. Its loss in bf16 is coarse."""
    auto = "auto"
    """The best available for the device, dtype and features at hand; the log says which and why."""


@dataclass
class HeadConfig(Option):
    """Base of every head."""

    group: ClassVar[str] = "head"
    predicts: ClassVar[str] = "token"
    """What the head scores: must equal the objective's `predicts`."""

    @property
    def is_tied(self) -> bool:
        """True when the projection is the backbone's embedding."""
        return bool(getattr(self, "tie_embeddings", False))


heads: Registry[HeadConfig] = Registry("head", HeadConfig)


@dataclass
class LMHeadConfig(HeadConfig):
    """A head over a vocabulary. `LMHeadConfig(name=…)` builds the config of the head with that name."""

    name: str = ""
    layer_norm: LayerNormConfig | None = None
    """Norm applied to the hidden states first. None: none here (the backbones end in their own)."""
    bias: bool | None = None
    """Learned bias [V]. None: the head's own default."""
    dtype: DType = DType.float32
    """Type of the head's parameters."""
    loss_implementation: LMLossImplementation = LMLossImplementation.default
    """How the loss is computed."""
    tie_embeddings: bool | None = None
    """Use the backbone's embedding matrix as the projection. None: the head's own default (only T5 has presets that tie)."""
    z_loss_multiplier: float = 0.0
    """Weight of the squared log-normaliser (PaLM, arXiv 2204.02311, section 5); 0 is off. Typical: 1e-4."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over the vocabulary, 0 to 1."""
    logit_softcap: float | None = None
    """Bound c of the logits: c·tanh(logits / c) (Gemma 2, arXiv 2408.00118). None: no bound."""

    def __new__(cls, *args: Any, **kwargs: Any) -> LMHeadConfig:
        if cls is LMHeadConfig:
            name = args[0] if args else kwargs.get("name", LMHeadType.default)
            return object.__new__(heads[str(getattr(name, "value", name))])  # pyright: ignore[reportReturnType]
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if type(self) is not LMHeadConfig and self.name == "":
            self.name = type(self).name
        super().__post_init__()
        self.loss_implementation = _member(LMLossImplementation, self.loss_implementation, "head.loss_implementation")
        self.dtype = _member(DType, self.dtype, "head.dtype")
        self.require(self.z_loss_multiplier >= 0, "z_loss_multiplier", "0 or more")
        self.require(0 <= self.label_smoothing < 1, "label_smoothing", "0 <= label_smoothing < 1")
        self.require(self.logit_softcap is None or self.logit_softcap > 0, "logit_softcap", "more than 0, or null")

    @property
    def head_class(self) -> Any:
        """The class of the head, imported when it is asked for."""
        raise NotImplementedError  # abstract: every registered head has its own

    def build(
        self,
        *,
        d_model: int,
        vocab_size: int,
        init_device: torch.device | str = "cpu",
        embedding: nn.Embedding | None = None,
    ) -> Any:
        """The module. `embedding` is needed with tie_embeddings."""
        tied = {} if embedding is None else {"embedding": embedding}
        return self.head_class(self, d_model=d_model, vocab_size=vocab_size, init_device=init_device, **tied)

    @property
    def has_bias(self) -> bool:
        """Whether the projection will have a bias."""
        return bool(self.bias)

    def num_params(self, d_model: int, vocab_size: int) -> int:
        """Learned numbers of the head; a tied projection counts as the embedding's."""
        raise NotImplementedError  # abstract

    def _size(self, d_model: int, vocab_size: int, *, bias: bool) -> int:
        norm = self.layer_norm.num_params(d_model) if self.layer_norm else 0
        return norm + (0 if self.is_tied else d_model * vocab_size) + (vocab_size if bias else 0)


def _member(enum: type[StrEnum], value: Any, where: str) -> Any:
    """The member of `enum` named `value`; the error lists the members."""
    try:
        return enum(value)
    except ValueError:
        raise ConfigError(f"{where}={value} does not exist; available: {', '.join(str(m.value) for m in enum)}") from None


@heads.register("default")
@dataclass
class DefaultLMHeadConfig(LMHeadConfig):
    """One linear projection, with an optional norm before it."""

    name: str = "default"
    bias: bool | None = None
    """Learned bias [V]. None: True, as in OLMo-core, unless tied."""
    steps_ahead: int = 0
    """Steps predicted beyond the next token (objective=multi_token): d_model² numbers each, before the shared projection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps_ahead >= 0, "steps_ahead", "0 or more")

    @property
    def head_class(self) -> Any:
        from heads_lightning.heads.default import DefaultLMHead

        return DefaultLMHead

    @property
    def has_bias(self) -> bool:
        """The bias that the head will have."""
        return (not self.is_tied) if self.bias is None else self.bias

    def num_params(self, d_model: int, vocab_size: int) -> int:
        return self._size(d_model, vocab_size, bias=self.has_bias) + self.steps_ahead * d_model**2


@heads.register("normalized")
@dataclass
class NormalizedLMHeadConfig(LMHeadConfig):
    """nGPT's head (arXiv 2410.01131, section 2.3.1): rows of unit norm, a learned scale per vocabulary entry; no norm, no bias."""

    name: str = "normalized"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("layer_norm", "bias"):
            if getattr(self, field) is not None:
                raise ConfigError(
                    f"head.{field}={getattr(self, field)} does not exist on head=normalized, whose rows have unit norm; "
                    f"leave it out (head.{field}=null) or use head=default"
                )
        if self.tie_embeddings:
            raise ConfigError("head.tie_embeddings=true does not exist on head=normalized: nGPT learns both matrices; use head=default")

    @property
    def head_class(self) -> Any:
        from heads_lightning.heads.normalized import NormalizedLMHead

        return NormalizedLMHead

    def num_params(self, d_model: int, vocab_size: int) -> int:
        return self._size(d_model, vocab_size, bias=False) + vocab_size


@heads.register("mlm")
@dataclass
class MLMHeadConfig(LMHeadConfig):
    """BERT's head: dense, activation, norm, then the projection with a bias (arXiv 1810.04805)."""

    name: str = "mlm"
    activation: str = "gelu"
    """Between dense layer and norm: gelu, gelu_tanh, relu or silu."""
    dense_bias: bool = True
    """Learned bias of the dense layer."""
    bias: bool | None = None
    """Learned bias [V]. None: True."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = ("gelu", "gelu_tanh", "relu", "silu")
        self.require(self.activation in allowed, "activation", ", ".join(allowed))

    @property
    def head_class(self) -> Any:
        from heads_lightning.heads.mlm import MLMHead

        return MLMHead

    @property
    def has_bias(self) -> bool:
        """The bias that the head will have."""
        return True if self.bias is None else self.bias

    def num_params(self, d_model: int, vocab_size: int) -> int:
        norm = 0 if self.layer_norm else d_model  # BERT's norm is part of the head: RMS unless layer_norm says otherwise
        dense = d_model * d_model + (d_model if self.dense_bias else 0)
        return self._size(d_model, vocab_size, bias=self.has_bias) + dense + norm
