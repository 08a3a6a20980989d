"""What the toolkit costs per training step: Lightning module, data module and tracking against a loop written by hand.

    python experiments/benchmarks/step.py [--steps 20] [--rounds 5] [OVERRIDE …]

Both train the same model from the same weights on the same batches with the same loss, optimizer, precision and clipping. Rounds of the two
alternate in one process; the figure is the median of the ratios of neighbouring rounds. The physical limit is the loop by hand: 1.00.
Steps are compared, not starts: the run is in MLflow before its first step, as that of `train` is, whose sender imports beside torch
(first_step.py shows it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from heads_lightning.composition import compose, flatten, to_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.experiment import build
from heads_lightning.tracking.open_run import open_run
from heads_lightning.training.agreement import settled
from heads_lightning.training.callbacks import MetricsCallback, ProgressCallback
from heads_lightning.training.optimizers import build_optimizer
from heads_lightning.training.run_logger import RunLogger
from heads_lightning.training.trainer import build_trainer


class Clock:
    """Times of optimizer steps, the first `skip` of a round left out."""

    def __init__(self, skip: int = 2) -> None:
        self.skip, self.times = skip, []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        kept = self.times[self.skip :]
        return (kept[-1] - kept[0]) / (len(kept) - 1)


def by_hand(config: ExperimentConfig, steps: int) -> float:
    """Seconds per step of a plain loop."""
    parts = build(config)
    backbone, head = parts.module.backbone.train(), parts.module.head.train()
    optimizer = build_optimizer(config.optimizer, backbone, head)
    parameters = [*backbone.parameters(), *head.parameters()]
    clock = Clock()
    bf16 = config.trainer.precision.startswith("bf16")
    for number, step in enumerate(parts.datamodule.train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * config.schedule.factor(number, steps)
        for batch in step:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = head.loss(backbone(batch), batch, divisor=float(batch.step_targets))
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    return clock.seconds_per_step()


def by_toolkit(config: ExperimentConfig, steps: int, folder: Path) -> float:
    """Seconds per step of the toolkit, with progress, metrics and tracking as `train` has them."""
    from rich.console import Console

    parts = build(config)
    text = to_yaml(config)
    clock = Clock()
    with open_run(
        config.tracking, run_dir=folder, run_root=folder.parent, name="bench", config_flat=flatten(config), config_yaml=text
    ) as log:
        log.wait_for_run_id(60)
        metrics = MetricsCallback(
            lambda values, step, tokens: log.log_metrics(values, step=step, tokens=tokens),
            every_steps=config.trainer.log_every_steps,
            waited_seconds=lambda: parts.datamodule.wait_seconds,
            tokens_read=config.trainer.batch_sizes(config.data.sequence_length).tokens,
        )

        class Ticks(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                clock.tick()

        with (folder / "progress.txt").open("w") as sink:
            progress = ProgressCallback(metrics, Console(file=sink, force_terminal=True))
            trainer = build_trainer(
                config.trainer,
                precision=config.trainer.precision,
                total_steps=config.trainer.steps(config.data.sequence_length),
                callbacks=[metrics, progress, Ticks()],
                logger=RunLogger(log),
            )
            trainer.fit(parts.module, datamodule=parts.datamodule)
    return clock.seconds_per_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"trainer.max_steps={arguments.steps}", f"run_root={folder}", "trainer.val_every_steps=100000"]
        config = compose([*arguments.overrides, *fixed])
        config.trainer = settled(config.trainer)
        by_hand(config, arguments.steps)  # prepares the data, warms the allocator
        rows = []
        for number in range(arguments.rounds):
            hand = by_hand(config, arguments.steps)
            ours = by_toolkit(config, arguments.steps, Path(folder) / f"run{number}")
            rows.append({"by_hand_ms": 1e3 * hand, "toolkit_ms": 1e3 * ours, "ratio": ours / hand})
            print(json.dumps({k: round(v, 3) for k, v in rows[-1].items()}), flush=True)
    ratios = sorted(row["ratio"] for row in rows)
    print(f"toolkit / by hand: median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f} over {len(ratios)} rounds")


if __name__ == "__main__":
    main()
