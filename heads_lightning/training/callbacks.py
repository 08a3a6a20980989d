"""What happens around optimizer steps: metrics, progress, checkpoints, stop signals. Each is one small callback.

Nothing here runs per step what it can run every `log_every_steps`: the module sums losses as tensors, and the host reads them only at a
logged point.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from heads_lightning.module import LanguageModule
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import (
    KEY,
    checkpoint_path,
    random_state,
    restore_random_state,
    saved_checkpoints,
)
from heads_lightning.training.process import STOP_SIGNALS


class Interrupted(SystemExit):
    """Training was asked to stop by a signal; the step was finished and saved. Exits with 128 + the signal's number, as shells expect."""

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name} after a whole step; saved {self.checkpoint}"


class MetricsCallback(Callback):
    """Reads the module's sums every n steps and hands the means to `record`.

    Args:
        record: receives (values, step, tokens). (Not named `log`: Lightning puts its own `log` on callbacks.)
        flush: called when numbers that somebody may be waiting for were recorded.
        every_steps: optimizer steps between points.
        waited_seconds: total seconds that the loader has kept training waiting so far.
        tokens_per_step: positions of one optimizer step, over all ranks.
        counters: what the objective has counted so far.
        warn: told once when it is the loader that training waits for.
    """

    WAITS = 0.1
    """Share of the time between two points from which on waiting for data is worth a warning."""

    def __init__(
        self,
        record: Callable[[dict[str, float], int, int], None],
        *,
        flush: Callable[[], None] = lambda: None,
        every_steps: int,
        waited_seconds: Callable[[], float],
        tokens_per_step: int,
        counters: Callable[[], dict[str, int]] = dict,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.counters = counters
        self.warn = warn
        self._warned = False
        self.record = record
        self.flush = flush
        self.every_steps = every_steps
        self.waited_seconds = waited_seconds
        self.tokens_per_step = tokens_per_step
        self.latest: dict[str, float] = {}
        self.seconds_in_steps = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since = time.perf_counter()
        self._waited = self.waited_seconds()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Do not count validation as training time."""
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Shift the clock by the time validation took; log what it found."""
        if trainer.training or trainer.fit_loop.epoch_loop.val_loop is trainer._active_loop:
            self._since += time.perf_counter() - self._pause
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        step = trainer.global_step
        self.latest |= values
        self.record(values, step, step * self.tokens_per_step)
        self.flush()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a point when it is due."""
        assert isinstance(pl_module, LanguageModule)
        step = batch_idx + 1
        if step % self.every_steps and step != trainer.num_training_batches:
            return
        values = self._values(trainer, pl_module)
        self._check_loader(values, step)
        self.latest |= values
        self.record(values, step, step * self.tokens_per_step)
        pl_module.totals.clear()
        self._restart_clock()

    def _check_loader(self, values: dict[str, float], step: int) -> None:
        """Say once that the loader, not the model, is the limit. The first point has the first steps in it, which wait for everything."""
        waited = values["speed/data_wait_share"]
        if waited > self.WAITS and step > self.every_steps and not self._warned:
            self._warned = True
            self.warn(
                f"training waited for data {waited:.0%} of the time up to step {step}: the loader is the limit, at "
                f"{values['speed/tokens_per_second']:,.0f} positions/s; a larger model would cost nothing, and objective.cut=token or "
                f"line is faster than syntax"
            )

    def _values(self, trainer: lightning.Trainer, module: LanguageModule) -> dict[str, float]:
        totals = module.totals
        summed = totals.read()
        names = sorted(summed.keys() - {"grad_norm"})
        sums = [float(totals.targets), *(summed[name] for name in names)]
        if trainer.world_size > 1:
            shared = torch.tensor(sums, dtype=torch.float64, device=module.device)
            torch.distributed.all_reduce(shared)
            sums = shared.tolist()
        seconds = time.perf_counter() - self._since
        self.seconds_in_steps += seconds
        targets = max(sums[0], 1.0)
        values = {f"train/{name}": value / targets for name, value in zip(names, sums[1:], strict=True)}
        return values | {
            "train/grad_norm": summed.get("grad_norm", 0.0) / max(totals.steps, 1),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/target_share": targets / max(totals.steps * self.tokens_per_step, 1),
            "train/bad_steps": float(module.bad_steps),
            "data/padding_share": totals.padding / max(totals.positions, 1),
            "speed/tokens_per_second": totals.steps * self.tokens_per_step / max(seconds, 1e-9),
            "speed/data_wait_share": (self.waited_seconds() - self._waited) / max(seconds, 1e-9),
            **{f"data/{name}": float(count) for name, count in self.counters().items()},
        }


class ProgressCallback(Callback):
    """A live bar on a terminal; elsewhere a plain line whenever a point is logged, at most one every few seconds."""

    PLAIN_SECONDS = 5.0

    def __init__(self, metrics: MetricsCallback, console: Console) -> None:
        self.metrics = metrics
        self.console = console
        self.progress: Progress | None = None
        self._last_line = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar."""
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )
        self.progress.start()
        self.task = self.progress.add_task("train", total=float(trainer.num_training_batches), numbers="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line."""
        step = batch_idx + 1
        if self.progress is not None:
            self.progress.update(self.task, completed=step, numbers=self._numbers())
            return
        due = step % self.metrics.every_steps == 0 and time.perf_counter() - self._last_line >= self.PLAIN_SECONDS
        if due or step == trainer.num_training_batches:
            self._last_line = time.perf_counter()
            self.console.print(f"step {step}/{trainer.num_training_batches}  {self._numbers()}", highlight=False)

    def _numbers(self) -> str:
        shown = [("loss", "train/loss", "{:.3f}"), ("val", "val/loss", "{:.3f}"), ("tok/s", "speed/tokens_per_second", "{:,.0f}")]
        latest = self.metrics.latest
        return "  ".join(f"{name} {form.format(latest[key])}" for name, key, form in shown if key in latest)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self.close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self.close()


class CheckpointCallback(Callback):
    """Saves every n steps, at the end, and when a signal asks to stop; keeps the newest few.

    A disk that is full while saving costs a warning, not the run: the checkpoint before stays, and the next interval tries again.
    """

    def __init__(self, run_dir: Path, *, every_steps: int, keep: int, record: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.every_steps = every_steps
        self.keep = keep
        self.record = record
        self.warn = warn
        self.saved_step = -1
        self._stop_signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save."""
        assert isinstance(pl_module, LanguageModule)
        checkpoint[KEY] = {**self.record, "random_state": random_state(), "bad_steps": pl_module.bad_steps}
        # what was the last step of this run need not be of the run that goes on from it
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the random state: it is set when training starts, after everything else has drawn."""
        assert isinstance(pl_module, LanguageModule)
        self._random_state = checkpoint[KEY]["random_state"]
        pl_module.bad_steps = checkpoint[KEY]["bad_steps"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take over the signals (after Lightning took them) and set the random state."""
        state = getattr(self, "_random_state", None)
        if state is not None:
            restore_random_state(state)
        for number in STOP_SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._on_signal)
            except ValueError:  # only the main thread may; elsewhere the owner of the main thread handles signals
                break

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        self._stop_signal = number

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due; stop when asked, at a step boundary that every rank agrees on."""
        step = batch_idx + 1
        stop = (
            trainer.strategy.reduce_boolean_decision(self._stop_signal is not None, all=False)
            if trainer.world_size > 1
            else (self._stop_signal is not None)
        )
        # the last step too: after the epoch has ended, Lightning's counters would say that there is nothing to go on with
        last = step == trainer.num_training_batches
        if stop or last or step % self.every_steps == 0:
            self.save(trainer, step)
        if stop:
            raise Interrupted(self._stop_signal or signal.SIGTERM, checkpoint_path(self.run_dir, step))

    def save(self, trainer: lightning.Trainer, step: int) -> None:
        """Write the checkpoint of `step` and drop those that are not kept."""
        if step == self.saved_step:
            return
        path = checkpoint_path(self.run_dir, step)
        try:
            trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            self.warn(f"could not save {path}: {error}; the checkpoint before it is kept, the next one is due in {self.every_steps} steps")
            return
        self.saved_step = step
        if trainer.is_global_zero:
            for old in saved_checkpoints(path.parent)[: -self.keep]:
                old.unlink(missing_ok=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Nothing is left unsaved."""
        step = int(trainer.num_training_batches)
        if self.saved_step != step and trainer.global_step:
            raise ConfigError(
                f"the last checkpoint could not be saved to {checkpoint_path(self.run_dir, step)}; free some space and resume"
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
