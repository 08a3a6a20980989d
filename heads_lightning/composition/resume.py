"""`resume=RUN`: the run's own saved config, plus the fields given beside it; parts cannot be swapped under a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from heads_lightning.composition.mistakes import parse
from heads_lightning.composition.saved import from_yaml, plain
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, Registry

CONFIG_FILE = "config.yaml"
FREE = {"backbone": ("dropout",), "head": ("loss_implementation", "z_loss_multiplier", "label_smoothing"), "tokenizer": ()}
"""Fields of the parts whose weights or ids are saved that may change under a trained model; no other one may."""

MEASURED_FOR = ("trainer.precision", "trainer.accelerator", "trainer.compile", "trainer.parallel")
"""Fields that decide whether trainer.linear_kernel has a choice: the saved answer holds while they stay."""


def _check_field(reference: str, key: str, kept: Any, given: Any) -> None:
    """Refuse another value of what the weights were trained with."""
    group, _, field = key.partition(".")
    if group in FREE and field not in FREE[group] and given != kept:
        raise ConfigError(f"resume={reference} goes on with {key}={kept}; leave out {key}=…, or start a new run")


def resumed_config(run_dir: Path, reference: str, overrides: Sequence[str]) -> ExperimentConfig:
    """The config of `run_dir` with the overrides of the command line, and `resume` set to `reference`.

    Raises:
        ConfigError: the folder holds no config, or an override would swap a part.
    """
    saved = run_dir / CONFIG_FILE
    if not saved.is_file():
        raise ConfigError(f"resume={reference}: {run_dir} holds no {CONFIG_FILE}, so it is not a run folder")
    parts = plain(from_yaml(saved))
    tree: Any = OmegaConf.create(parts)
    given = {override.get_key_element(): override for override in parse(list(overrides))}
    if given.keys() & set(MEASURED_FOR):
        tree.trainer.linear_kernel = "auto"
    for key, override in given.items():
        if key == "resume" or key.startswith("hydra"):
            continue
        if key in Registry.groups or key == "experiment":
            kept = parts[key]["name"] if key in parts else "its own"
            raise ConfigError(f"resume={reference} goes on with {key}={kept}; leave out {key}=…, or start a new run")
        _check_field(reference, key, OmegaConf.select(tree, key), override.value())
        OmegaConf.update(tree, key, override.value(), merge=True)
    tree.resume = reference
    return from_yaml(yaml.safe_dump(OmegaConf.to_container(tree)))
