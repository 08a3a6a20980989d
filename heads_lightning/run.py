"""A training run from start to summary: folder, log, data, model, fit, evaluation.

The run folder explains itself:

    config.yaml       the resolved config: rebuilds the run        metrics.jsonl     every logged point
    checkpoints/      step-00000100.ckpt …                         summary.txt       what was printed at the end
    report.html       all of it on one page to look at
    mlflow.json       where MLflow has the same facts              evaluation.json   the numbers of the summary
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from rich.console import Console

from heads_lightning.composition import flatten, machine_problems, to_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.data.progress import PreparationProgress
from heads_lightning.evaluation import Report
from heads_lightning.experiment import Experiment, TrainedModel, build, find_checkpoint, load, tokenizer_files
from heads_lightning.heads.base import LMHead
from heads_lightning.heads.value import ValueHead
from heads_lightning.html_report import write_report
from heads_lightning.losses.value import ValueStatistics
from heads_lightning.registry import ConfigError
from heads_lightning.scoring import evaluate
from heads_lightning.summary import summary_text
from heads_lightning.training.agreement import SameConfig, settled_precision
from heads_lightning.training.averaging import WeightAverage
from heads_lightning.training.callbacks import MetricsCallback, ProgressCallback
from heads_lightning.training.checkpoints import checkpoint_path
from heads_lightning.training.profiling import ProfileCallback
from heads_lightning.training.run_logger import RunLogger
from heads_lightning.training.saving import CheckpointCallback
from heads_lightning.training.spikes import SpikeWatch
from heads_lightning.training.system_metrics import peak_flops
from heads_lightning.training.tracking import RunLog, is_first_rank, open_run, read_metrics
from heads_lightning.training.trainer import build_trainer


@dataclass
class Result:
    """What a run gave."""

    run_dir: Path
    checkpoint: Path
    report: Report | None
    metrics: dict[str, float]
    """Last value of every logged metric."""


def train(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    console: Console | None = None,
    parent: str | None = None,
    callbacks: Sequence[lightning.Callback] = (),
) -> Result:
    """Train, evaluate and record. With `config.resume`, go on from that checkpoint in `run_dir`.

    Args:
        config: the experiment; every rank must be given the same, which is checked.
        run_dir: folder of the run, the same on every rank.
        console: where to talk; the first rank's output when left out.
        parent: run folder or MLflow run id of the sweep that the run belongs to.
        callbacks: further Lightning callbacks.

    Raises:
        ConfigError: a mistake in the config, or this machine cannot run it.
        Interrupted: a signal asked to stop; the step was saved.
        TrainingStopped: gradients were not finite for too many steps.
    """
    console = console or Console(quiet=not is_first_rank(os.environ))
    problems = machine_problems(config)
    if problems:
        raise ConfigError(problems[0])
    run_dir.mkdir(parents=True, exist_ok=True)
    config = _settle(config)
    text = to_yaml(config)
    with open_run(
        config.tracking,
        run_dir=run_dir,
        run_root=Path(config.run_root),
        name=config.name,
        config_flat=flatten(config),
        config_yaml=text,
        parent=parent,
        resume=config.resume is not None,
    ) as log:
        with contextlib.closing(PreparationProgress(console)) as progress:
            experiment = build(config, progress=progress)
        return _fit(experiment, run_dir, log, console, text, callbacks)


def _settle(config: ExperimentConfig) -> ExperimentConfig:
    """Replace what depends on the machine by what it means here, so that the saved config says it."""
    precision = settled_precision(config.trainer)
    return replace(config, trainer=replace(config.trainer, precision=precision))


def _fit(
    experiment: Experiment, run_dir: Path, log: RunLog, console: Console, config_yaml: str, further: Sequence[lightning.Callback]
) -> Result:
    config = experiment.config
    tokens_per_step = config.trainer.global_batch_size * config.data.sequence_length
    watch = SpikeWatch(run_dir, config.trainer.global_batch_size, lambda message: console.print(message, style="yellow"))
    metrics = MetricsCallback(
        lambda values, step, tokens: log.log_metrics(values, step=step, tokens=tokens),
        flush=log.flush,
        every_steps=config.trainer.log_every_steps,
        waited_seconds=lambda: experiment.datamodule.wait_seconds,
        tokens_per_step=tokens_per_step,
        counters=experiment.objective.counters,
        warn=lambda message: console.print(message, style="yellow"),
        spikes=watch,
        flops_per_second=peak_flops(config.trainer.world_size),
        flops_per_step=_flops_per_token(experiment) * tokens_per_step,
    )
    checkpoints = CheckpointCallback(
        run_dir,
        config.trainer,
        seed=config.seed,
        record={"config": config_yaml, "tokenizer": tokenizer_files(experiment.prepared.tokenizer), "tokens_per_step": tokens_per_step},
        warn=lambda message: console.print(message, style="yellow"),
    )
    callbacks: list[Any] = [SameConfig(config_yaml, run_dir), metrics, checkpoints, *further]
    if config.optimizer.average_decay is not None:
        callbacks.insert(1, WeightAverage(config.optimizer.average_decay))  # before what saves it
    if config.trainer.profile_step is not None:
        callbacks.append(ProfileCallback(run_dir, config.trainer.profile_step, lambda message: console.print(message, highlight=False)))
    if config.trainer.progress_bar:
        callbacks.insert(1, ProgressCallback(metrics, console))
    _quiet_lightning()
    torch.manual_seed(config.seed * 1_000_003 + _dropout_rank(config))
    trainer = build_trainer(config.trainer, precision=config.trainer.precision, callbacks=callbacks, logger=RunLogger(log))
    _say_what_runs(experiment, console, trainer)
    trainer.fit(experiment.module, datamodule=experiment.datamodule, ckpt_path=_resume_path(config))
    if trainer.num_training_batches % config.trainer.val_every_steps:
        trainer.validate(experiment.module, datamodule=experiment.datamodule, verbose=False)
    return _conclude(experiment, run_dir, log, console, metrics, checkpoints, trainer)


def _dropout_rank(config: ExperimentConfig) -> int:
    """Number of this rank among those that draw apart. Dropout draws from the global generators: ranks must not drop the same units, but
    ranks that compute the same hidden states must."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    return rank if config.backbone.shares_positions else rank // config.trainer.tensor_ranks


def _flops_per_token(experiment: Experiment) -> float:
    """Of the model, forward and backward, as `check` counts them, with a target at every position at most."""
    head, length = experiment.module.head, experiment.config.data.sequence_length
    of_head = head.num_flops_per_token(length) if isinstance(head, LMHead) else 0.0
    return experiment.config.backbone.num_flops_per_token(length) + of_head


def _resume_path(config: ExperimentConfig) -> Path | None:
    return find_checkpoint(config.resume, config.run_root) if config.resume else None


def _draw_curves(run_dir: Path, log: RunLog, ylabel: str) -> None:
    """loss.png: training and held-out loss by optimizer step."""
    from matplotlib.figure import Figure

    points = list(read_metrics(run_dir))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train/loss", "training"), ("val/loss", "held out")):
        drawn = [(point.step, point.values[name]) for point in points if name in point.values]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), label=label, marker="o" if len(drawn) < 40 else None, markersize=3)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    log.log_figure("loss.png", figure)


def _draw_reliability(experiment: Experiment, log: RunLog) -> None:
    """reliability.png: mean held-out target by predicted value, with the number of targets in each bin below."""
    from matplotlib.figure import Figure

    bins = ValueStatistics.from_vector(experiment.module.statistics)
    filled = [i for i, count in enumerate(bins.bin_count) if count]
    if not filled:
        return
    predicted = [bins.bin_predicted[i] / bins.bin_count[i] for i in filled]
    figure = Figure(figsize=(5, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    ends = [min(predicted), max(predicted)]
    above.plot(ends, ends, color="0.7", label="calibrated")
    above.plot(predicted, [bins.bin_target[i] / bins.bin_count[i] for i in filled], marker="o", label=experiment.config.name)
    above.set(ylabel="mean target")
    above.legend()
    below.bar(predicted, [bins.bin_count[i] for i in filled], width=0.6 * (ends[1] - ends[0]) / max(len(filled), 1) or 0.1)
    below.set(xlabel="predicted value", ylabel="targets")
    log.log_figure("reliability.png", figure)


def _quiet_lightning() -> None:
    """Lightning announces devices and tips at INFO; the run says in its own line what matters."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    # the position in the data is the data module's, not the loader's
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # what validation logs are sums over all ranks already
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # one process makes batches faster than workers could hand them over (see data.datamodule)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # a login node has srun, and a run started by hand there is meant to run there
    warnings.filterwarnings("ignore", message=".*srun.* command is available on your system but is not used.*")


def _say_what_runs(experiment: Experiment, console: Console, trainer: lightning.Trainer) -> None:
    config, prepared = experiment.config, experiment.prepared
    parameters = sum({id(p): p.numel() for p in experiment.module.parameters()}.values())
    tokens = config.trainer.steps(config.data.sequence_length) * config.trainer.global_batch_size * config.data.sequence_length
    console.print(
        f"{config.objective.name} · {config.head.name} head · {config.backbone.name} · {parameters / 1e6:.1f} M parameters · "
        f"{tokens / 1e6:.1f} M positions in {config.trainer.steps(config.data.sequence_length)} steps "
        f"({tokens / max(prepared.train.tokens, 1):.1f} passes) · {config.trainer.precision} · {trainer.world_size} device(s)",
        highlight=False,
        soft_wrap=True,
    )


def _trained(experiment: Experiment, step: int, path: Path) -> TrainedModel:
    """The model that was trained; where this rank holds a share of it only, or an average beside it, from its checkpoint."""
    if experiment.config.trainer.is_sharded or experiment.config.optimizer.average_decay is not None:
        return load(str(path))
    module = experiment.module
    return TrainedModel(experiment.config, experiment.prepared.tokenizer, module.backbone.eval(), module.head.eval(), step, path)


def _conclude(
    experiment: Experiment,
    run_dir: Path,
    log: RunLog,
    console: Console,
    metrics: MetricsCallback,
    checkpoints: CheckpointCallback,
    trainer: lightning.Trainer,
) -> Result:
    """Evaluate on rank 0, print the summary and record it."""
    config = experiment.config
    path = checkpoint_path(run_dir, checkpoints.saved_step)
    result = Result(run_dir, path, None, dict(metrics.latest))
    samples = []
    if not trainer.is_global_zero:
        return result
    if config.evaluation.enabled:
        outcome = evaluate(_trained(experiment, trainer.global_step, path), experiment.prepared)
        result.report, samples = outcome.report, outcome.samples
        log.log_metrics(outcome.report.metrics(), step=trainer.global_step, tokens=None)
        (run_dir / "evaluation.json").write_text(json.dumps(asdict(outcome.report), indent=1))
        log.log_text("samples.txt", outcome.samples_text())
    _draw_curves(run_dir, log, "loss, nats per target" if config.objective.predicts == "token" else "loss per target")
    if isinstance(experiment.module.head, ValueHead):
        _draw_reliability(experiment, log)
    text = summary_text(
        config,
        run_dir=run_dir,
        report=result.report,
        samples=samples,
        metrics=metrics.latest,
        seconds=metrics.seconds_in_steps,
        spikes=[str(spike) for spike in metrics.spikes.spikes] if metrics.spikes else [],
        ui_command=log.ui_command(),
    )
    (run_dir / "summary.txt").write_text(text)
    log.log_text("summary.txt", text)
    numbers = metrics.latest | (result.report.metrics() if result.report else {})
    log.log_file(write_report(run_dir, name=config.name, config_yaml=to_yaml(config), numbers=numbers, samples=samples, summary=text))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return result
