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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from rich.console import Console

from heads_lightning.composition import flatten, machine_problems, to_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.data.progress import PreparationProgress
from heads_lightning.evaluation.protocol import Report
from heads_lightning.evaluation.scoring import Sample, evaluate
from heads_lightning.experiment import Experiment, TrainedModel, build, find_checkpoint, load, tokenizer_files
from heads_lightning.heads.base import LMHead
from heads_lightning.heads.value import ValueHead
from heads_lightning.html_report import samples_page, write_report
from heads_lightning.lineage import datasets_of
from heads_lightning.pictures import draw
from heads_lightning.registry import ConfigError
from heads_lightning.served_model import check_servable, write_model
from heads_lightning.summary import summary_text
from heads_lightning.tracking.open_run import RunLog, check_nobody_trains, is_first_rank, open_run, read_metrics
from heads_lightning.tracking.stopping import obey
from heads_lightning.tracking.system_metrics import peak_flops
from heads_lightning.training.agreement import SameConfig, settled
from heads_lightning.training.averaging import WeightAverage
from heads_lightning.training.callbacks import MetricsCallback, ProgressCallback
from heads_lightning.training.checkpoints import checkpoint_path, step_of
from heads_lightning.training.profiling import ProfileCallback
from heads_lightning.training.run_logger import RunLogger
from heads_lightning.training.saving import CheckpointCallback
from heads_lightning.training.spikes import SpikeWatch
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
    if _is_served(config):
        check_servable(config.objective)
    config = replace(config, trainer=settled(config.trainer))  # so that the saved config says what depends on the machine
    if config.resume and is_first_rank():
        check_nobody_trains(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = to_yaml(config)
    checkpoint = _resume_path(config)
    with open_run(
        config.tracking,
        run_dir=run_dir,
        run_root=Path(config.run_root),
        name=config.name,
        config_flat=flatten(config),
        config_yaml=text,
        parent=parent,
        resume=checkpoint is not None,
        first_step=step_of(checkpoint) if checkpoint else 0,
    ) as log:
        with contextlib.closing(PreparationProgress(console)) as progress:
            experiment = build(config, progress=progress)
        log.log_datasets(list(datasets_of(experiment.prepared, config.data)))
        return _fit(experiment, run_dir, log, console, text, callbacks)


def _fit(
    experiment: Experiment, run_dir: Path, log: RunLog, console: Console, config_yaml: str, further: Sequence[lightning.Callback]
) -> Result:
    config = experiment.config
    sizes = config.trainer.batch_sizes(config.data.sequence_length)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    warn = partial(say, style="yellow")
    _check_held_out(experiment, warn)
    watch = SpikeWatch(run_dir, sizes, warn)
    metrics = MetricsCallback(
        lambda values, step, tokens: log.log_metrics(values, step=step, tokens=tokens),
        flush=log.flush,
        every_steps=config.trainer.log_every_steps,
        waited_seconds=lambda: experiment.datamodule.wait_seconds,
        tokens_read=sizes.tokens,
        counters=experiment.objective.counters,
        warn=warn,
        spikes=watch,
        flops_per_second=peak_flops(config.trainer.world_size),
        flops_per_token=_flops_per_token(experiment),
    )
    if config.resume:  # what is known of the run, until there is something newer
        metrics.latest = {name: value for point in read_metrics(run_dir) for name, value in point.values.items()}
    checkpoints = CheckpointCallback(
        run_dir,
        config.trainer,
        seed=config.seed,
        record={"config": config_yaml, "tokenizer": tokenizer_files(experiment.prepared.tokenizer)},
        warn=warn,
    )
    callbacks: list[Any] = [SameConfig(config_yaml, run_dir), metrics, checkpoints, *further]
    if config.optimizer.average_decay is not None:
        callbacks.insert(1, WeightAverage(config.optimizer.average_decay))  # before what saves it
    if config.trainer.profile_step is not None:
        callbacks.append(ProfileCallback(run_dir, config.trainer.profile_step, say))
    if config.trainer.progress_bar:
        callbacks.insert(callbacks.index(metrics) + 1, ProgressCallback(metrics, console))  # shows what was just recorded
    _quiet_lightning()
    torch.manual_seed(config.seed * 1_000_003 + _dropout_rank(config))
    trainer = build_trainer(
        config.trainer,
        precision=config.trainer.precision,
        total_steps=experiment.datamodule.total_steps,
        callbacks=callbacks,
        logger=RunLogger(log),
    )
    _say_what_runs(experiment, console, trainer)
    _run_steps(trainer, experiment)
    return _conclude(experiment, run_dir, log, console, metrics, checkpoints, trainer)


def _check_held_out(experiment: Experiment, warn: Callable[[str], None]) -> None:
    """Say before training that there will be no held-out loss, or refuse to train where checkpoints are kept by it.

    Raises:
        ConfigError: trainer.keep_best has nothing to go by.
    """
    if experiment.datamodule.has_held_out_targets():
        return
    trainer = experiment.config.trainer
    metric = trainer.keep_best_metric if trainer.keep_best else "val/loss"
    message = (
        f"none of the {experiment.datamodule.validation_sequences} held-out sequences has a target, so there is no {metric}; "
        f"hold out more: data.validation_fraction, data.validation_sequences"
    )
    if trainer.keep_best:
        raise ConfigError(f"{message}, or leave out trainer.keep_best={trainer.keep_best}")
    warn(message)


def _run_steps(trainer: lightning.Trainer, experiment: Experiment) -> None:
    """Train from the beginning or from a checkpoint, and validate at the end.

    Raises:
        KeyboardInterrupt: Ctrl-C that is not a wish for the end of the step, of which Lightning makes an exit code of its own.
    """
    obey()
    try:
        trainer.fit(experiment.module, datamodule=experiment.datamodule, ckpt_path=_resume_path(experiment.config))
        if trainer.num_training_batches % experiment.config.trainer.val_every_steps:
            trainer.validate(experiment.module, datamodule=experiment.datamodule, verbose=False)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise exit_.__context__ from None
        raise


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
    tokens = config.trainer.tokens(config.data.sequence_length)
    console.print(
        f"{config.objective.name} · {config.head.name} head · {config.backbone.name} · {parameters / 1e6:.1f} M parameters · "
        f"{tokens / 1e6:.1f} M positions in {config.trainer.steps(config.data.sequence_length)} steps "
        f"({tokens / max(prepared.train.tokens, 1):.1f} passes) · {config.trainer.arithmetic} · {trainer.world_size} device(s)",
        highlight=False,
        soft_wrap=True,
    )


def _is_served(config: ExperimentConfig) -> bool:
    return isinstance(config.tracking, MLflowConfig) and config.tracking.log_model


def _record_looks(experiment: Experiment, log: RunLog, samples: Sequence[Sample]) -> None:
    """Pictures and coloured samples."""
    tokens = experiment.config.objective.predicts == "token"
    unit = "loss, nats per target" if tokens else "loss per target"
    statistics = experiment.module.statistics if isinstance(experiment.module.head, ValueHead) else ()
    draw(log, parts=experiment.objective.parts, unit=unit, statistics=statistics)
    if samples:
        log.log_text("samples.html", samples_page(samples))


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
    served = _is_served(config)
    model = _trained(experiment, trainer.global_step, path) if config.evaluation.enabled or served else None
    if model is not None and config.evaluation.enabled:
        outcome = evaluate(model, experiment.prepared)
        result.report, samples = outcome.report, outcome.samples
        log.log_metrics(outcome.report.metrics(), step=trainer.global_step, tokens=None)
        (run_dir / "evaluation.json").write_text(json.dumps(asdict(outcome.report), indent=1))
        log.log_text("samples.txt", outcome.samples_text())
    if model is not None and served:
        log.log_model(write_model(run_dir / "model", model), step=trainer.global_step)
    _record_looks(experiment, log, samples)
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
