"""The whole experiment as one typed value: what a run is made from and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.data import DataConfig
from heads_lightning.configs.evaluation import EvaluationConfig
from heads_lightning.configs.head import HeadConfig
from heads_lightning.configs.objective import ObjectiveConfig
from heads_lightning.configs.optimizer import OptimizerConfig
from heads_lightning.configs.schedule import ScheduleConfig
from heads_lightning.configs.sweep import SweepConfig
from heads_lightning.configs.tokenizer import TokenizerConfig
from heads_lightning.configs.tracking import TrackingConfig
from heads_lightning.configs.trainer import TrainerConfig


@dataclass
class ExperimentConfig:
    """An experiment. Groups are chosen by `GROUP=OPTION`, fields by `GROUP.FIELD=VALUE`."""

    objective: ObjectiveConfig = MISSING
    """What is hidden and what is the target."""
    head: HeadConfig = MISSING
    """What turns hidden states into a score."""
    backbone: BackboneConfig = MISSING
    """What turns tokens into hidden states."""
    data: DataConfig = MISSING
    """Where documents come from."""
    tokenizer: TokenizerConfig = MISSING
    """Text to ids."""
    optimizer: OptimizerConfig = MISSING
    """How weights are updated."""
    schedule: ScheduleConfig = MISSING
    """Learning rate over time."""
    trainer: TrainerConfig = MISSING
    """Length, batch, devices, precision."""
    tracking: TrackingConfig = MISSING
    """Where numbers go."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured at the end."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Many runs from one command (`-m`); belongs to the command, not to a run, and is not saved with one."""
    name: str = "experiment"
    """Name of the run: part of its folder and of the MLflow run."""
    seed: int = 0
    """Seed of everything random: weights, order of samples, cuts and masks, dropout."""
    run_root: str = "runs"
    """Folder that holds runs, prepared data and the embedded MLflow store."""
    resume: str | None = None
    """Run folder, checkpoint file or MLflow run id to go on from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything of your own to record with the run; not read by the toolkit."""

    def __post_init__(self) -> None:
        """The objective takes the form that fits the backbone, and the backbone that which fits the head: a saved config says what ran."""
        if isinstance(self.objective, ObjectiveConfig) and isinstance(self.backbone, BackboneConfig):
            self.objective = self.objective.fitted(self.backbone.attention_supported())
        if isinstance(self.backbone, BackboneConfig) and isinstance(self.head, HeadConfig):
            self.backbone = self.backbone.fitted(tied=self.head.is_tied)
