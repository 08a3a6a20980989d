"""Every typed setting, one file per group. Nothing here imports torch: a config validates on a login node in milliseconds."""

from heads_lightning.configs import (
    backbone,
    data,
    evaluation,
    experiment,
    head,
    huggingface,
    huggingface_import,
    objective,
    optimizer,
    schedule,
    t5,
    tokenizer,
    tracking,
    trainer,
    value,
)
from heads_lightning.configs.experiment import ExperimentConfig

__all__ = [
    "ExperimentConfig",
    "backbone",
    "data",
    "evaluation",
    "experiment",
    "head",
    "huggingface",
    "huggingface_import",
    "objective",
    "optimizer",
    "schedule",
    "t5",
    "tokenizer",
    "tracking",
    "trainer",
    "value",
]
