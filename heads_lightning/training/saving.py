"""When checkpoints are written, which are kept, and how a signal ends a run."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback

from heads_lightning.configs.trainer import CheckpointFormat, TrainerConfig
from heads_lightning.module import LanguageModule
from heads_lightning.registry import RunError
from heads_lightning.tracking.process import STOP_SIGNALS, is_first_rank
from heads_lightning.tracking.stopping import Stopped
from heads_lightning.training.agreement import gathered
from heads_lightning.training.checkpoints import (
    FOLDER,
    KEY,
    checkpoint_path,
    random_state,
    remove,
    restore_random_state,
    saved_checkpoints,
    step_of,
)

if TYPE_CHECKING:
    from heads_lightning.training.distributed_checkpoints import FolderWriter


class Interrupted(Stopped):
    """Training was asked to stop by a signal, and the step was finished.

    Args:
        signal_number: which signal.
        checkpoint: of the last step; None where it could not be saved.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        super().__init__(signal_number)
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        saved = f"saved {self.checkpoint}" if self.checkpoint else "it could not be saved"
        return f"{super().__str__()} after a whole step; {saved}"


class BestCheckpoints:
    """Which checkpoints of a folder stay: the newest few, and the few with the best value of a metric. Values lie beside them."""

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        self.folder = folder
        self.config = config
        self._file = folder / "values.json"

    def values(self) -> dict[int, float]:
        """The metric by step."""
        if not self._file.is_file():
            return {}
        return {int(step): value for step, value in json.loads(self._file.read_text()).items()}

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Note the metric of a step.

        Raises:
            RunError: validation does not report it.
        """
        name = self.config.keep_best_metric
        if name not in metrics:
            known = ", ".join(sorted(n for n in metrics if n.startswith("val/")))
            raise RunError(f"trainer.keep_best_metric={name} is not reported by validation; use one of {known}")
        if not math.isfinite(metrics[name]):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.values() | {step: metrics[name]}))
        temporary.replace(self._file)

    def prune(self) -> None:
        """Delete the checkpoints that are not kept."""
        saved = saved_checkpoints(self.folder)
        regular = [path for path in saved if not is_halfway(step_of(path), self.config)] or saved
        values = self.values() if self.config.keep_best else {}
        valued = sorted((values[step_of(path)], -step_of(path), path) for path in saved if step_of(path) in values)
        kept = {*regular[-self.config.keep_checkpoints :], *(path for _, _, path in valued[: self.config.keep_best])}
        kept |= {path for path in saved if step_of(path) > step_of(regular[-1])}
        for path in saved:
            if path not in kept:
                remove(path)


def is_halfway(step: int, config: TrainerConfig) -> bool:
    """A step that is saved beside the regular ones, so that one that is lost while it is written costs no more than the interval."""
    interval = config.checkpoint_every_steps
    return config.checkpoint_format == CheckpointFormat.distributed and interval > 1 and step % interval == interval // 2


class CheckpointCallback(Callback):
    """Saves every n steps, at the end, and when a signal asks to stop; keeps the newest few and the best few.

    A disk that is full while saving costs a warning, not the run: the checkpoint before stays, and the next interval tries again.

    Args:
        run_dir: folder of the run.
        config: interval, format, what is kept.
        seed: of the random state of a rank for which the checkpoint holds none.
        record: what a checkpoint says of the run that wrote it.
        warn: where to talk.
    """

    def __init__(self, run_dir: Path, config: TrainerConfig, *, seed: int, record: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.config = config
        self.every_steps = config.checkpoint_every_steps
        self.seed = seed
        self.record = record
        self.warn = warn
        self._writer: FolderWriter | None = None
        self._best = BestCheckpoints(run_dir / FOLDER, config)
        self._random_states: list[dict[str, Any]] | None = None
        self.saved_step = self._resumed_step = -1
        self._begun = -1
        self._stop_signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save."""
        assert isinstance(pl_module, LanguageModule)
        states = gathered(random_state(), trainer.world_size)
        checkpoint[KEY] = {**self.record, "random_states": states, "bad_steps": pl_module.bad_steps}
        # what was the last step of this run need not be of the run that goes on from it
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the random state: it is set when training starts, after everything else has drawn."""
        assert isinstance(pl_module, LanguageModule)
        self._random_states = checkpoint[KEY]["random_states"]
        pl_module.bad_steps = checkpoint[KEY]["bad_steps"]
        if checkpoint_path(self.run_dir, checkpoint["global_step"]).exists():
            self.saved_step = self._resumed_step = checkpoint["global_step"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the signals (after Lightning took them) and set the random state."""
        self._restore_random_state(trainer)
        for number in STOP_SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # only the main thread may; elsewhere the owner of the main thread handles signals
                break

    def _restore_random_state(self, trainer: lightning.Trainer) -> None:
        if self._random_states is None:
            return
        if len(self._random_states) == trainer.world_size:
            restore_random_state(self._random_states[trainer.global_rank])
        else:  # on another number of ranks dropout cannot go on as it would have; every rank draws for itself, and anew
            torch.manual_seed((self.seed * 1_000_003 + trainer.global_step) * 1_009 + trainer.global_rank)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Note how good the checkpoint of this step is."""
        if self.config.keep_best and trainer.is_global_zero:
            self._best.add(trainer.global_step, {name: float(value) for name, value in trainer.callback_metrics.items()})

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self._stop_signal = number
        if number == signal.SIGINT and is_first_rank():
            # not `print`: the signal may have come in the middle of one
            os.write(2, b"heads-lightning: stopping after this step, which is saved; Ctrl-C again stops at once and loses it\n")

    def _is_stopping(self, trainer: lightning.Trainer) -> bool:
        """Whether any rank was asked to stop; every rank must come here."""
        asked = self._stop_signal is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _interrupted(self, step: int) -> Interrupted:
        """What ends the run after `step`."""
        saved = checkpoint_path(self.run_dir, step) if self.saved_step == step else None
        return Interrupted(self._stop_signal or signal.SIGTERM, saved)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due; stop when asked, at a step boundary that every rank agrees on."""
        step = batch_idx + 1
        stop = self._is_stopping(trainer)
        # the last step too: after the epoch has ended, Lightning's counters would say that there is nothing to go on with
        last = step == trainer.num_training_batches
        if stop or last or step % self.every_steps == 0 or is_halfway(step, self.config):
            self.save(trainer, step)
        if stop or last or self.every_steps == 1:  # there is no half-way
            self._wait()
        if stop:
            raise self._interrupted(step)

    def save(self, trainer: lightning.Trainer, step: int) -> None:
        """Write the checkpoint of `step` and drop those that are not kept."""
        if step in (self.saved_step, self._begun):
            return
        path = checkpoint_path(self.run_dir, step)
        if self.config.checkpoint_format == CheckpointFormat.distributed:
            self._begin(trainer, step, path)
            return
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            self._say_not_saved(path, error)
            return
        self.saved_step = step
        if trainer.is_global_zero:
            self._best.prune()

    def _begin(self, trainer: lightning.Trainer, step: int, path: Path) -> None:
        """Copy the state and let it be written beside training."""
        self._wait()
        from heads_lightning.training.distributed_checkpoints import FolderWriter  # other runs do not need its imports

        self._writer = self._writer or FolderWriter(lambda path: self._best.prune())
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)  # what save_checkpoint hands to the first rank alone
        try:
            self._writer.save(state, path)
            self._begun = step
        except (OSError, RuntimeError) as error:
            self._say_not_saved(path, error)

    def _wait(self) -> None:
        """Until what was begun is on disk."""
        begun, self._begun = self._begun, -1
        if self._writer is None or begun < 0:
            return
        try:
            self._writer.wait()
            self.saved_step = begun
        except (OSError, RuntimeError) as error:
            self._say_not_saved(checkpoint_path(self.run_dir, begun), error)

    def _say_not_saved(self, path: Path, error: Exception) -> None:
        # torch's writer hides what the disk said behind what it found in its file
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        self.warn(f"could not save {path}: {reason}; what was saved before is kept")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing is left unsaved, and who asked to stop in the last validation is obeyed.

        Raises:
            RunError: the last checkpoint could not be saved.
        """
        step = int(trainer.num_training_batches)
        if self._resumed_step == step:
            self.warn(f"{self.run_dir} has done its {step} steps already; to go on: trainer.max_steps={2 * step}")
        if self._is_stopping(trainer):
            raise self._interrupted(step)
        if self.saved_step != step and trainer.global_step:
            saved = saved_checkpoints(self.run_dir / FOLDER)
            go_on = f"go on with: heads-lightning train resume={self.run_dir}" if saved else "train again"
            raise RunError(f"the last checkpoint could not be saved to {checkpoint_path(self.run_dir, step)}; free some space and {go_on}")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back (after an exception Lightning does)."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
