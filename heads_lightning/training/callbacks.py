"""What happens around optimizer steps: metrics and progress. Each is one small callback. (Checkpoints and signals: saving.py.)

Nothing here runs per step what it can run every `log_every_steps`: the module sums losses as tensors, and the host reads them only at a
logged point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from heads_lightning.module import LanguageModule
from heads_lightning.training.spikes import SpikeWatch, StepRecord


class MetricsCallback(Callback):
    """Reads the module's sums every n steps and hands the means to `record`.

    Args:
        record: receives (values, step, tokens). (Not named `log`: Lightning puts its own `log` on callbacks.)
        flush: called when numbers that somebody may be waiting for were recorded.
        every_steps: optimizer steps between points.
        waited_seconds: total seconds that the loader has kept training waiting so far.
        tokens_read: positions of the first n optimizer steps, over all ranks.
        counters: what the objective has counted so far.
        warn: told once when it is the loader that training waits for, and once when steps had no target.
        spikes: judges every step.
        flops_per_second: that the devices can do at their peak, for the utilisation; None: unknown.
        flops_per_token: of the model, forward and backward.
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
        tokens_read: Callable[[int], int],
        counters: Callable[[], dict[str, int]] = dict,
        warn: Callable[[str], None] = lambda message: None,
        spikes: SpikeWatch | None = None,
        flops_per_second: float | None = None,
        flops_per_token: float = 0.0,
    ) -> None:
        self.spikes = spikes
        self.flops_per_second, self.flops_per_token = flops_per_second, flops_per_token
        self.counters = counters
        self.warn = warn
        self._warned: set[str] = set()
        self.record = record
        self.flush = flush
        self.every_steps = every_steps
        self.waited_seconds = waited_seconds
        self.tokens_read = tokens_read
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
        self.latest = self.latest | values
        self.record(values, step, self.tokens_read(step))
        self.flush()

    def _is_due(self, trainer: lightning.Trainer, step: int) -> bool:
        return step % self.every_steps == 0 or step == trainer.num_training_batches

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for what is measured where a point is due alone."""
        assert isinstance(pl_module, LanguageModule)
        pl_module.is_looked_at = self._is_due(trainer, batch_idx + 1)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a point when it is due."""
        assert isinstance(pl_module, LanguageModule)
        step = batch_idx + 1
        if not self._is_due(trainer, step):
            return
        values = self._values(trainer, pl_module, step) | self._judge_steps(pl_module, step)
        self._check_loader(values, step)
        self.latest = self.latest | values
        self.record(values, step, self.tokens_read(step))
        pl_module.totals.clear()
        self._restart_clock()

    def _judge_steps(self, module: LanguageModule, step: int) -> dict[str, float]:
        """Look at each step since the last point, over all ranks: one exchange for all of them."""
        if self.spikes is None:
            return {}
        by_step = module.totals.by_step
        if not by_step:
            return {}
        losses, targets, norms = zip(*by_step, strict=True)
        sums = module.sum_over_data_ranks([*torch.stack(losses).tolist(), *map(float, targets)])
        count = len(by_step)
        rows = zip(range(step - count + 1, step + 1), sums[:count], sums[count:], torch.stack(norms).tolist(), strict=True)
        # a step that is not finite is skipped and counted: train/bad_steps; one without a target has no loss
        self.spikes.add([StepRecord(at, loss / number, norm) for at, loss, number, norm in rows if number and math.isfinite(loss)])
        return {"train/spikes": float(len(self.spikes.spikes))}

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Utilisation and memory, where there is a device that knows them."""
        found: dict[str, float] = {}
        if self.flops_per_second is not None:
            found["speed/mfu"] = tokens * self.flops_per_token / max(seconds, 1e-9) / self.flops_per_second
        if torch.cuda.is_initialized():
            found["memory/peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def _check_loader(self, values: dict[str, float], step: int) -> None:
        """Say once that the loader, not the model, is the limit. The first point has the first steps in it, which wait for everything."""
        waited = values["speed/data_wait_share"]
        if waited > self.WAITS and step > self.every_steps:
            self._warn_once(
                "loader",
                f"training waited for data {waited:.0%} of the time up to step {step}: the loader is the limit, at "
                f"{values['speed/tokens_per_second']:,.0f} positions/s; a larger model would cost nothing, and objective.cut=token or "
                f"line is faster than syntax",
            )

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self.warn(text)

    def _means(self, module: LanguageModule, tokens: int, step: int) -> dict[str, float]:
        """Means over the targets since the last point, skipped steps left out. A mean over none is not there: 0 would look perfect."""
        totals = module.totals
        summed = totals.read()
        names = sorted(summed.keys() - {"grad_norm"})
        counts = [float(totals.targets_seen), float(totals.targets)]
        seen, targets, *flat = module.sum_over_data_ranks([*counts, *(summed[name] for name in names)])
        named = dict(zip(names, flat, strict=True))
        values = {f"train/{name}": value / targets for name, value in named.items() if targets and not name.startswith("part_")}
        values |= {f"train/{name}": value for name, value in totals.part_means(named, module.parts).items()}
        if totals.good_steps:
            values["train/grad_norm"] = summed["grad_norm"] / totals.good_steps
        if not seen:
            steps = f"steps {step - totals.steps + 1} to {step}"
            self._warn_once("targets", f"{steps} had nothing to predict: no position has a target, so there is no train/loss of them")
        return values | {"train/target_share": seen / max(tokens, 1)}

    def _values(self, trainer: lightning.Trainer, module: LanguageModule, step: int) -> dict[str, float]:
        totals = module.totals
        tokens = self.tokens_read(step) - self.tokens_read(step - totals.steps)
        means = self._means(module, tokens, step)  # waits for the device: the clock is read after it
        seconds = time.perf_counter() - self._since
        self.seconds_in_steps += seconds
        return means | {
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/bad_steps": float(module.bad_steps),
            "data/padding_share": totals.padding / max(totals.positions, 1),
            "speed/tokens_per_second": tokens / max(seconds, 1e-9),
            "speed/data_wait_share": (self.waited_seconds() - self._waited) / max(seconds, 1e-9),
            **({} if module.update_ratio is None else {"train/update_ratio": float(module.update_ratio)}),
            **self._speed(tokens, seconds),
            **{f"data/{name}": float(count) for name, count in self.counters().items()},
        }


class ProgressCallback(Callback):
    """A live bar on a terminal; elsewhere a plain line whenever a point is logged, at most one every few seconds.

    Both say the stage, the newest numbers, the memory of the process (of the device, where there is one) and the time that is left. A
    step costs a comparison: the numbers are put together when they are new, and drawn four times a second.
    """

    PLAIN_SECONDS = 5.0

    def __init__(self, metrics: MetricsCallback, console: Console) -> None:
        self.metrics = metrics
        self.console = console
        self.progress: Progress | None = None
        self._last_line = 0.0
        self._began = 0.0
        self._first_step = 0
        self._shown: dict[str, float] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar."""
        self._began, self._first_step = time.perf_counter(), trainer.global_step
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
        self.task = self.progress.add_task("train", total=float(trainer.num_training_batches), completed=self._first_step, numbers="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line."""
        step = batch_idx + 1
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
            self._refresh()
            return
        last = step == trainer.num_training_batches
        if (step % self.metrics.every_steps == 0 and time.perf_counter() - self._last_line >= self.PLAIN_SECONDS) or last:
            self._last_line = time.perf_counter()
            left = "" if last else f"  {self._left(step, int(trainer.num_training_batches))} left"
            self.console.print(f"train {step}/{trainer.num_training_batches}  {self._numbers()}{left}", highlight=False, soft_wrap=True)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say that it is not training that takes the time."""
        if self.progress is not None:
            self.progress.update(self.task, description="validate")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Back to training."""
        if self.progress is not None:
            self.progress.update(self.task, description="train")
            self._refresh()

    def _refresh(self) -> None:
        """Put the numbers on the bar where they are new."""
        if self.progress is not None and self.metrics.latest is not self._shown:
            self._shown = self.metrics.latest
            self.progress.update(self.task, numbers=self._numbers())

    def _numbers(self) -> str:
        shown = [("loss", "train/loss", "{:.3f}"), ("val", "val/loss", "{:.3f}"), ("tok/s", "speed/tokens_per_second", "{:,.0f}")]
        latest = self.metrics.latest
        texts = [f"{name} {form.format(latest[key])}" for name, key, form in shown if key in latest]
        return "  ".join([*texts, f"{memory_gigabytes():.1f} GB"])

    def _left(self, step: int, steps: int) -> str:
        """Time that the steps to come take at the pace so far, validation and checkpoints included: 0:12:05."""
        pace = (time.perf_counter() - self._began) / max(step - self._first_step, 1)
        return str(timedelta(seconds=round(pace * (steps - step))))

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


def memory_gigabytes() -> float:
    """Memory held: the most that this run has taken on its GPU, else what the process has resident now. 1 GB is 10^9 bytes."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9
