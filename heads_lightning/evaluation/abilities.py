"""What a trained model can be asked, and how: what follows from the objective that it was trained with."""

from __future__ import annotations

from typing import NamedTuple

from heads_lightning.batch import Attention
from heads_lightning.configs.fim_format import FIMLayouts
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    MixtureConfig,
    MultiTokenConfig,
    ObjectiveConfig,
    PrefixLMConfig,
    UL2Config,
)
from heads_lightning.configs.requests import SamplingRequest
from heads_lightning.experiment import TrainedModel
from heads_lightning.registry import ConfigError


def can_read_left_to_right(model: TrainedModel) -> bool:
    """True for models that predict the next token of plain text."""
    return reads_left_to_right(model.config.objective)


def reads_left_to_right(objective: ObjectiveConfig) -> bool:
    """True for what teaches to predict the next token of plain text (a prefix of length 0 is causal)."""
    plain = (CausalConfig, FIMConfig, MultiTokenConfig, PrefixLMConfig, UL2Config)
    if objective.predicts != "token" or objective.attention not in (Attention.causal, Attention.prefix):
        return False
    return objective.attention == Attention.causal or any(isinstance(part, plain) for part in parts_of(objective).values())


class Infilling(NamedTuple):
    """How a model was taught to infill."""

    layouts: FIMLayouts
    mode: int | None
    """Mode token that opens its pieces."""

    @property
    def layout(self) -> str:
        """The layout to ask with: psm unless it was never shown."""
        return self.layouts.trained[0]


def parts_of(objective: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The objectives of a mixture by part; one that is none, by its name."""
    return objective.part_configs() if isinstance(objective, MixtureConfig) else {objective.name: objective}


def infilling(model: TrainedModel) -> Infilling | None:
    """How to ask for an infill; None for models whose infilling tokens were not trained."""
    for name, part in infilling_parts(model.config.objective).items():
        return Infilling(part.layouts(model.tokenizer.vocabulary.fim_format), modes_of(model).get(name))
    return None


def infilling_parts(objective: ObjectiveConfig) -> dict[str, FIMConfig]:
    """The parts of an objective that teach the infilling tokens."""
    return {name: part for name, part in parts_of(objective).items() if isinstance(part, FIMConfig) and part.rate > 0}


def modes_of(model: TrainedModel) -> dict[str, int]:
    """Mode tokens by part."""
    objective = model.config.objective
    return objective.mode_tokens(model.tokenizer.vocabulary.sentinels)[0] if isinstance(objective, MixtureConfig) else {}


def opening(model: TrainedModel) -> int:
    """The token that opens a document read left to right: the end-of-document marker, or the mode token that training put in its place."""
    modes = modes_of(model)
    readers = [name for name, part in parts_of(model.config.objective).items() if not isinstance(part, FIMConfig) or part.rate < 1]
    plain = [name for name in readers if isinstance(parts_of(model.config.objective)[name], CausalConfig)]
    return next((modes[name] for name in [*plain, *readers] if name in modes), model.tokenizer.vocabulary.end_of_document)


def can_infill(model: TrainedModel) -> bool:
    """True for models whose infilling tokens were trained."""
    return infilling(model) is not None


def check_length(model: TrainedModel, new_tokens: int, *, always: int = SamplingRequest.max_new_tokens) -> None:
    """Refuse an answer that is as long as the model's sequences, or longer, unless it has at most `always` tokens (as by default)."""
    length = model.config.data.sequence_length
    if new_tokens >= length and new_tokens > always:
        raise ConfigError(f"max_new_tokens={new_tokens} does not fit sequences of {length} positions; use max_new_tokens={length // 2}")
