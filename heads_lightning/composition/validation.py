"""The parts of an experiment checked together, and against this machine, before anything is allocated.

A dataclass checks its own fields; what needs two parts is checked here. Each refusal is one sentence with an override that works.
"""

from heads_lightning.configs.experiment import ExperimentConfig


def validate(config: ExperimentConfig) -> None:
    """Refuse (ConfigError) a combination that cannot work."""


def machine_problems(config: ExperimentConfig) -> list[str]:
    """What of this experiment cannot run on this machine, one sentence each; empty when all is well."""
    return []
