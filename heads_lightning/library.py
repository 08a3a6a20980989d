"""The whole job from Python in five names: compose, build, train, load, infill. What a notebook or a script imports.

    from heads_lightning import compose, infill, load, train

    result = train(compose(["experiment=fim_proof"]))
    print(infill(load(result.run_dir), "def add(a, b):\\n", "    return c\\n"))

They are what the commands call, with defaults that suit a person at a keyboard. A mistake raises ConfigError with the line that the
command prints. Starting again after a scheduler's restart is the command's: it is the one that knows how it was started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as lightning
import torch
from rich.console import Console

from heads_lightning import experiment, run
from heads_lightning.composition import from_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation import scoring
from heads_lightning.experiment import Experiment, TrainedModel
from heads_lightning.registry import ConfigError
from heads_lightning.run import Result
from heads_lightning.tracking.process import is_first_rank
from heads_lightning.tracking.run_folder import CONFIG
from heads_lightning.training.attempts import agreed_name


def build(config: ExperimentConfig, *, quiet: bool = False) -> Experiment:
    """Prepare the data of an experiment and build every part, without training.

    Args:
        config: from `compose`, or made of the dataclasses in `heads_lightning.configs`.
        quiet: do not say how data preparation goes on.

    Raises:
        ConfigError: the parts do not fit each other, or the data cannot be prepared.

    >>> from heads_lightning import build, compose
    >>> config = compose(["experiment=fim_proof", "backbone.d_model=32", "data.num_documents=500"])
    >>> parts = build(config, quiet=True)
    >>> parts.objective.parts
    ('left_to_right', 'infill')
    >>> parts.module.backbone.d_model
    32
    """
    return experiment.build(config, say=_nothing if quiet else print)


def _nothing(line: str) -> None:
    """Say nothing."""


def train(
    config: ExperimentConfig,
    *,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    callbacks: Sequence[lightning.Callback] = (),
) -> Result:
    """Train, evaluate and record, as `heads-lightning train` does.

    Args:
        config: the experiment. With `config.resume` the run that it names goes on, in its own folder.
        run_dir: folder of the run; RUN_ROOT/NAME/DATE when left out.
        quiet: print nothing; the same text is in summary.txt of the run folder.
        callbacks: further Lightning callbacks.

    Raises:
        ConfigError: a mistake in the config, this machine cannot run it, or `resume` names a run of other parts.
        Interrupted: a signal asked to stop; the step was saved.

    >>> from heads_lightning import compose, train
    >>> overrides = ["experiment=fim_proof", "backbone.d_model=32", "data.num_documents=500"]
    >>> overrides += ["trainer.max_steps=2", "evaluation.enabled=false", "tracking=none", "trainer.accelerator=cpu"]
    >>> result = train(compose(overrides), run_dir="runs/example", quiet=True)
    >>> result.checkpoint.name
    'step-00000002.ckpt'
    >>> 0 < result.metrics["val/loss"] < 20
    True
    """
    if config.resume is not None:
        folder = _folder_to_go_on_in(config)
        if run_dir is not None and Path(run_dir).resolve() != folder.resolve():
            raise ConfigError(f"resume={config.resume} goes on in {folder}, not in run_dir={run_dir}; leave run_dir out")
    else:
        folder = Path(run_dir) if run_dir is not None else _new_folder(config)
    return run.train(config, folder, console=Console(quiet=quiet or not is_first_rank(os.environ)), callbacks=callbacks)


def _new_folder(config: ExperimentConfig) -> Path:
    """RUN_ROOT/NAME/DATE; the same on every rank where several processes were started together."""
    name = agreed_name(os.environ) or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{time.time_ns() // 1000 % 1_000_000:06}"
    return Path(config.run_root) / config.name / name


def _folder_to_go_on_in(config: ExperimentConfig) -> Path:
    """The folder of the run that `config.resume` names, where the config has the parts that this run was trained with."""
    assert config.resume is not None
    folder = experiment.find_checkpoint(config.resume, config.run_root).parent.parent
    trained = from_yaml(folder / CONFIG)
    for part in ("backbone", "head", "objective", "tokenizer"):
        if getattr(config, part) != getattr(trained, part):
            raise ConfigError(
                f"resume={config.resume} was trained with another {part} than this config has; start from the run's own: "
                f"dataclasses.replace(load({config.resume!r}).config, resume={config.resume!r})"
            )
    return folder


def load(run: str | Path, *, run_root: str | Path = "runs", device: torch.device | str = "cpu") -> TrainedModel:
    """A trained model with its config and tokenizer, in evaluation mode.

    Args:
        run: run folder (its newest checkpoint), checkpoint file, or MLflow run id.
        run_root: where an MLflow run id is looked up.
        device: where the weights go.

    Raises:
        ConfigError: there is no such run.

    >>> from heads_lightning import load
    >>> model = load("runs/example")
    >>> (model.step, model.config.objective.name)
    (2, 'fim')
    """
    return experiment.load(str(run), run_root=str(run_root), device=device)


def infill(
    model: TrainedModel,
    prefix: str,
    suffix: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    layout: str | None = None,
) -> str:
    """What a model puts between two texts.

    Args:
        model: from `load`; trained with objective=fim, or an encoder-decoder trained on span corruption.
        prefix: what stands before the hole.
        suffix: what stands after it.
        max_new_tokens: longest answer, in tokens.
        temperature: 0: always the likeliest token; higher: more varied.
        top_k: draw from the k likeliest tokens. None: all.
        top_p: draw from the likeliest tokens that together have this probability. None: all.
        seed: of the draws.
        layout: psm or spm. None: one that the model was trained on.

    Raises:
        ConfigError: the model was not trained to infill, or a value is out of range.

    >>> from heads_lightning import infill, load
    >>> isinstance(infill(load("runs/example"), "abcd\\n", "efgh\\n", max_new_tokens=3), str)
    True
    """
    request = InfillRequest(
        checkpoint=str(model.checkpoint),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        layout=layout,
    )
    return scoring.infill(model, prefix, suffix, request)
