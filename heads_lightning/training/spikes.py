"""Steps whose loss jumps: which they were, what they read, and how large their gradient was. Logged, said, and kept in `spikes.jsonl`."""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from heads_lightning.configs.batch_sizes import BatchSizes

FILE = "spikes.jsonl"


class StepRecord(NamedTuple):
    """One optimizer step, over all ranks."""

    step: int
    loss: float
    """Mean over its targets."""
    grad_norm: float
    """Before clipping."""


class Spike(NamedTuple):
    """A step whose loss is far above those before it."""

    step: int
    loss: float
    usual_loss: float
    """Median of the steps before."""
    grad_norm: float
    usual_grad_norm: float
    first_sequence: int
    """Number of the step's first sequence in the order of the run."""
    last_sequence: int

    def __str__(self) -> str:
        return (
            f"loss spike at step {self.step}: {self.loss:.3f} after {self.usual_loss:.3f}; gradient norm {self.grad_norm:.3g} after "
            f"{self.usual_grad_norm:.3g}; it read sequences {self.first_sequence:,} to {self.last_sequence:,} of the run"
        )


class SpikeWatch:
    """Compares each step with a window of those before it.

    A spike is a loss above the window's median by more than DEVIATIONS times its median absolute deviation, and by more than LEAST of it:
    medians, so that a spike does not hide the next. What follows a spike closely is part of it.

    Args:
        run_dir: folder of the run.
        sizes: sequences of each step.
        say: told about each.
    """

    WINDOW, ENOUGH, DEVIATIONS, LEAST, APART = 100, 20, 10.0, 0.05, 10

    def __init__(self, run_dir: Path, sizes: BatchSizes, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.sizes = sizes
        self.say = say
        self.spikes: list[Spike] = []
        self._window: deque[StepRecord] = deque(maxlen=self.WINDOW)

    def add(self, records: list[StepRecord]) -> None:
        """Judge further steps, in order."""
        for record in records:
            if (spike := self._judged(record)) is not None:
                self.spikes.append(spike)
                with (self.run_dir / FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(spike._asdict()) + "\n")
                self.say(str(spike))
            self._window.append(record)

    def _judged(self, record: StepRecord) -> Spike | None:
        if len(self._window) < self.ENOUGH or (self.spikes and record.step - self.spikes[-1].step < self.APART):
            return None
        losses = [before.loss for before in self._window]
        usual = statistics.median(losses)
        spread = statistics.median(abs(loss - usual) for loss in losses)
        if record.loss - usual <= max(self.DEVIATIONS * spread, self.LEAST * abs(usual)):
            return None
        norm = statistics.median(before.grad_norm for before in self._window)
        first, after = self.sizes.sequences(record.step - 1), self.sizes.sequences(record.step)
        return Spike(record.step, record.loss, usual, record.grad_norm, norm, first, after - 1)
