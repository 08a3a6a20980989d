"""Ends a cell early when others were better at the same step, whichever process or machine it runs in.

The cell reports to the study's storage at every validation and asks the study's pruner there; nothing passes through the launcher. The
first rank asks, and all ranks stop at the same step.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from heads_lightning.sweeps import settings
from heads_lightning.tracking.process import is_first_rank
from heads_lightning.training.run_logger import RunLogger

if TYPE_CHECKING:
    import optuna


class Pruned(SystemExit):
    """Others were better at the same step. The run is over as intended: exit code 0."""

    def __init__(self, step: int, metric: str, value: float) -> None:
        super().__init__(0)
        self.text = f"ended by the pruner after step {step}: {metric} {value:.4g}"

    def __str__(self) -> str:
        return self.text


def pruning(sweep_dir: Path, trial: int) -> list[Any]:
    """The callback of a cell of an Optuna sweep; none where the sweep has no pruner."""
    options = settings.read(sweep_dir).options
    if options.pruner == "none":
        return []
    if not is_first_rank():
        return [PruningCallback(None, trial=trial, metric=options.metric)]
    from heads_lightning.sweeps.study import open_study

    return [PruningCallback(open_study(sweep_dir, options), trial=trial, metric=options.metric)]


class PruningCallback(Callback):
    """Reports the metric and asks at every validation.

    Args:
        study: on the first rank; None on the others, which are told.
        trial: number of the trial in the study.
        metric: a name that a validation logs.
    """

    def __init__(self, study: "optuna.Study | None", *, trial: int, metric: str) -> None:
        self._study = study
        self._trial = trial
        self._metric = metric

    @override
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop on every rank where the pruner says so."""
        step = trainer.global_step
        if self._metric not in trainer.callback_metrics or step >= trainer.num_training_batches:
            return
        value = float(trainer.callback_metrics[self._metric])
        prune = self._study is not None and self._judged(step, value)
        if trainer.world_size > 1:
            prune = trainer.strategy.reduce_boolean_decision(prune, all=False)
        if prune:
            for logger in trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.log.set_tags({"pruned": f"after step {step}: {self._metric} {value:.6g}"})
            raise Pruned(step, self._metric, value)

    def _judged(self, step: int, value: float) -> bool:
        from heads_lightning.sweeps.study import judge

        assert self._study is not None
        return judge(self._study, self._trial, step=step, value=value)
