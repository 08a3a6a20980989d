"""What every objective's config has, and the registry that they are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry

if TYPE_CHECKING:
    from heads_lightning.objectives.base import Vocabulary


@dataclass
class ObjectiveConfig(Option):
    """Base of every objective."""

    group: ClassVar[str] = "objective"
    predicts: ClassVar[str] = "token"
    """What a target is: must equal the head's `predicts`."""
    attention: ClassVar[Attention] = Attention.causal
    """Which positions a position may see."""
    other_attention: ClassVar[frozenset[Attention]] = frozenset()
    """Attention kinds that it takes on other backbones (see `fitted`)."""
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Roles of the special tokens that it needs: names of fields of objectives.base.Vocabulary."""

    def fitted(self, supported: frozenset[Attention]) -> ObjectiveConfig:
        """This objective in the form that a backbone with these attention kinds trains with; itself where there is one form alone."""
        return self

    def _require_ramp(self) -> None:
        """`rate_start` and `rate_tokens` describe one schedule: both or neither."""
        start, tokens = getattr(self, "rate_start", None), getattr(self, "rate_tokens", 0)
        self.require(tokens >= 0, "rate_tokens", "0 or more")
        self.require(start is None or 0 <= start <= 1, "rate_start", "0 to 1, or null")
        if (start is None) != (tokens == 0):
            missing = "rate_tokens=10000000" if tokens == 0 else "rate_start=0"
            raise ConfigError(
                f"objective.rate_start={start} with objective.rate_tokens={tokens} is half a schedule; add e.g. objective.{missing}, "
                f"or leave both out for a fixed rate"
            )

    def build(self, vocabulary: Vocabulary) -> Any:
        """The objective (heads_lightning.objectives.base.Objective) for a vocabulary."""
        raise NotImplementedError  # abstract


objectives: Registry[ObjectiveConfig] = Registry("objective", ObjectiveConfig)
