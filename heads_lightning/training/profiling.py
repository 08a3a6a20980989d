"""PyTorch's profiler over a few steps (`trainer.profile_step=N`): a trace to look at and a table to read, in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

TRACE, TABLE = "profile.json.gz", "profile.txt"
STEPS, ROWS = 3, 40
"""Optimizer steps that are recorded, and operations in the table."""


class ProfileCallback(Callback):
    """Records steps on the first rank: every operation with its shapes and time, memory, and the kernels of a GPU.

    Args:
        run_dir: folder of the run.
        first_step: optimizer step, from 1, with which recording begins.
        say: told where the record lies.
    """

    def __init__(self, run_dir: Path, first_step: int, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.first_step = first_step
        self.say = say
        self._profile: Any = None

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin."""
        if batch_idx + 1 != self.first_step or not trainer.is_global_zero:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End, and write."""
        if batch_idx + 1 == self.first_step + STEPS - 1:
            self._write()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The run was over first."""
        self._write()

    def _write(self) -> None:
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        recorded.export_chrome_trace(str(self.run_dir / TRACE))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.run_dir / TABLE).write_text(recorded.key_averages().table(sort_by=by, row_limit=ROWS), encoding="utf-8")
        self.say(f"profile of {STEPS} steps: {self.run_dir / TABLE}, and {self.run_dir / TRACE} for https://ui.perfetto.dev")
