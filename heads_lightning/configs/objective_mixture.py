"""Several objectives as one (`objective=mixture`): parts, weights that may change over training, mode tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from heads_lightning.batch import Attention
from heads_lightning.configs.base import from_mapping
from heads_lightning.configs.fim_format import FIMLevel
from heads_lightning.configs.objective_base import ObjectiveConfig, objectives
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    from heads_lightning.objectives.base import Vocabulary


@objectives.register("mixture")
@dataclass
class MixtureConfig(ObjectiveConfig):
    """Several objectives: each sample is given to one of them, by weight. The loss of each is reported on its own."""

    name: str = "mixture"
    parts: Any = None  # a mapping; a default that is none is replaced by what is given, where Hydra would merge two mappings
    """Parts by a name of your choice: the objective's `name`, its `weight` (1 if not given; 0 leaves the part out), its `weight_start` (at
    the beginning of training), `mode: true` (its pieces open with a token of their own), and any of that objective's own fields.
    None: half causal, half fim at rate 1."""
    anneal_tokens: int = 0
    """Positions of training over which each weight goes linearly from weight_start to weight. 0: no schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is None:
            half = {"weight": 0.5}
            self.parts = {"left_to_right": {"name": "causal", **half}, "fim": {"name": "fim", **half, "rate": 1.0}}
        if not self.parts:
            raise ConfigError("objective.parts={} has no part; give one, e.g. 'objective.parts={a:{name:causal},b:{name:fim,weight:2}}'")
        self.require(self.anneal_tokens >= 0, "anneal_tokens", "0 or more")
        starts = [part for part, given in self.parts.items() if isinstance(given, Mapping) and "weight_start" in given]
        if bool(starts) != (self.anneal_tokens > 0):
            raise ConfigError(
                f"objective.anneal_tokens={self.anneal_tokens} with weight_start of {', '.join(starts) or 'no part'} is half a schedule; "
                f"give both (objective.anneal_tokens=10000000, and weight_start in objective.parts) or neither"
            )
        configs = self.part_configs()
        if not configs:
            raise ConfigError("objective.parts gives every part the weight 0; give one of them a weight")
        kinds: set[Attention] = {config.attention for config in configs.values()}
        if kinds == {Attention.causal, Attention.prefix}:
            kinds = {Attention.prefix}  # a causal part has an empty prefix
        if len(kinds) > 1:
            each = ", ".join(f"{part} {config.attention}" for part, config in configs.items())
            raise ConfigError(f"objective.parts cannot be mixed in one batch, their attention differs: {each}; leave one kind out")
        # of this mixture, not of the class: what validation compares with the backbone
        self.attention = kinds.pop()  # pyright: ignore[reportAttributeAccessIssue]
        self.special_tokens = tuple(  # pyright: ignore[reportAttributeAccessIssue]
            dict.fromkeys(role for config in configs.values() for role in config.special_tokens)
        )

    def fitted(self, supported: frozenset[Attention]) -> ObjectiveConfig:
        chosen = {part: config.fitted(supported) for part, config in self.part_configs().items()}
        forms = {part: {"form": form.value} for part, config in chosen.items() if (form := getattr(config, "form", None)) is not None}
        parts = {part: {**given, **forms.get(part, {})} for part, given in self.parts.items()}
        return self if parts == self.parts else replace(self, parts=parts)

    def part_configs(self) -> dict[str, ObjectiveConfig]:
        """The parts' own configs, validated."""
        assert self.parts is not None
        configs = {}
        for part, given in self.parts.items():
            place = f"objective.parts.{part}"
            if not isinstance(given, Mapping) or "name" not in given:
                raise ConfigError(f"{place}={given} names no objective; write {{name: causal, weight: 1}}")
            settings = {key: value for key, value in given.items() if key not in ("name", "weight", "weight_start", "mode")}
            if given["name"] == "mixture":
                raise ConfigError(f"{place}.name=mixture is a mixture in a mixture; list its parts here instead")
            if given["name"] == "multi_token":
                raise ConfigError(f"{place}.name=multi_token has targets of several steps and cannot be mixed; use objective=multi_token")
            for key in ("weight", "weight_start"):
                if not isinstance(given.get(key, 1), (int, float)) or given.get(key, 1) < 0:
                    raise ConfigError(f"{place}.{key}={given[key]} is out of range; a weight is 0 (left out) or more")
            if not isinstance(given.get("mode", False), bool):
                raise ConfigError(f"{place}.mode={given['mode']} is not possible; it is true or false")
            if max(self._weights(part)) == 0:
                continue
            configs[part] = from_mapping(objectives[given["name"]], settings, place)
            if getattr(configs[part], "level", None) == FIMLevel.document:
                raise ConfigError(f"{place}.level=document changes what the rows of all parts are; use {place}.level=context")
        return configs

    def _weights(self, part: str) -> tuple[float, float]:
        """At the beginning of training, and at the end of the schedule."""
        assert self.parts is not None
        weight = float(self.parts[part].get("weight", 1))
        return float(self.parts[part].get("weight_start", weight)), weight

    @property
    def num_modes(self) -> int:
        """Mode tokens that its parts want."""
        return sum(bool(self.parts[part].get("mode", False)) for part in self.part_configs())

    def mode_tokens(self, sentinels: tuple[int, ...]) -> tuple[dict[str, int], tuple[int, ...]]:
        """Mode tokens by part, taken from the end of the tokenizer's sentinels; and the sentinels that are left for the parts."""
        assert self.parts is not None
        wanted = [part for part in self.part_configs() if self.parts[part].get("mode", False)]
        if len(wanted) > len(sentinels):
            raise ConfigError(
                f"objective.parts wants {len(wanted)} mode tokens, and the tokenizer has {len(sentinels)} sentinels to make them of; "
                f"set tokenizer.num_sentinels={len(wanted)} or more"
            )
        left = len(sentinels) - len(wanted)
        return dict(zip(wanted, reversed(sentinels), strict=False)), sentinels[:left]

    def build(self, vocabulary: Vocabulary) -> Any:
        from heads_lightning.objectives.base import Ramp
        from heads_lightning.objectives.mixture import Mixture, Part

        modes, sentinels = self.mode_tokens(vocabulary.sentinels)
        inner = replace(vocabulary, sentinels=sentinels) if modes else vocabulary
        parts = [
            Part(part, Ramp(*self._weights(part), self.anneal_tokens), config.build(inner), modes.get(part))
            for part, config in self.part_configs().items()
        ]
        return Mixture(parts, self.attention, vocabulary)
