"""Backbones: what turns tokens into hidden states (`backbone=…`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass
class BackboneConfig(Option):
    """Base of every backbone."""

    group: ClassVar[str] = "backbone"
    supports: ClassVar[frozenset[Attention]] = frozenset()
    """Attention kinds that it can give; an objective that needs another is refused while composing."""
    shares_positions: ClassVar[bool] = False
    """Under tensor parallelism, a device works on some of the positions wherever it does not on some of the heads or columns."""
    builds_another: ClassVar[bool] = False
    """True: the option takes its config from a checkpoint, and is no architecture of its own."""
    boundless_position: ClassVar[str] = "rotary"
    """Value of a field `position` that has no longest sequence, to be suggested where one is exceeded."""

    name: str = ""
    d_model: int = 256
    """Width of the hidden states."""

    def attention_supported(self) -> frozenset[Attention]:
        """Attention kinds of this very config (a field may narrow what the class supports)."""
        return self.supports

    def described(self) -> BackboneConfig:
        """The config of what is built: this one, unless it takes another's from elsewhere."""
        return self

    def fitted(self, *, tied: bool) -> BackboneConfig:
        """This backbone as it begins beside a head that is tied to its embedding or is not; itself where that makes no difference."""
        return self

    @classmethod
    def fields_for(cls, attention: Attention) -> dict[str, Any]:
        """Fields, and their values, that make this option give `attention`; empty where none matters."""
        return {}

    def tensor_sizes(self) -> dict[str, int]:
        """What tensor parallelism (trainer.parallel=tensor) shares out evenly: sizes by field. Empty: it does not know this backbone."""
        return {}

    def tensor_problem(self) -> str | None:
        """A choice of this config that tensor parallelism cannot compute, and what to set instead."""
        return None

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        """The module (heads_lightning.backbones.base.Backbone)."""
        raise NotImplementedError  # abstract

    def load_pretrained(
        self, backbone: Any, head: Any = None, *, new_tokens: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> list[str]:
        """Fill modules that were just initialised with weights from elsewhere; returns lines that say what was done. Most have none.

        Args:
            backbone, head: what is filled.
            new_tokens: ids that the weights' model has not met; their rows begin near the mean of the others. None: the tokenizer is
                another one, and ids past the last row are new.
            generator: of what tells those rows apart.
        """
        return []

    def num_params(self, vocab_size: int) -> int:
        """Learned numbers, the embedding included."""
        raise NotImplementedError  # abstract

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of the matrix products, forward and backward, per token; the head's are not included.

        Attention is counted as if every position saw all `sequence_length` of them, the usual convention (PaLM, appendix B).
        """
        raise NotImplementedError  # abstract


backbones: Registry[BackboneConfig] = Registry("backbone", BackboneConfig)
