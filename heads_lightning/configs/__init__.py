"""Every typed setting, one file per group. Nothing here imports torch: a config validates on a login node in milliseconds."""

from heads_lightning.configs import transformer  # the default comes first wherever options are listed

# isort: split
from heads_lightning.configs import (
    backbone,
    bigs,
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
    "bigs",
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
    "transformer",
    "value",
]
