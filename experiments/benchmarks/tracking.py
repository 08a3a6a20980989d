"""What does recording a run cost a training step?

    python experiments/benchmarks/tracking.py [--seconds 60]

Every way to log takes turns with not logging at all, block by block in one process, so that a busy machine disturbs all of them alike; the
ratio is the median over blocks of (block with logging / the blocks without it beside it). Two steps are timed: a short one (a small
network, about 5.7 ms on a quiet machine, five values at every step) and a usual one (100 ms, eight values every ten steps; the model is a
sleep there, since only the difference matters). One thread computes. Our sender is made ten times as eager as by default and a block
lasts several of its rounds, so that its work falls into the block that caused it. `dead server` is a store where nobody answers.
Lightning's MLFlowLogger gets the store that makes it work (SQLite, tables made), since MLflow refuses its default address.
"""

import argparse
import logging
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from heads_lightning.configs.tracking import MLflowConfig, NoTrackingConfig
from heads_lightning.tracking.open_run import RunLog, open_run

Log = Callable[[dict[str, float], int], None]
BARS = {"short step": 1.03, "usual step": 1.01}
"""Most that our record may cost, by step."""
SHORTER = 4
"""Blocks of Lightning's logger are shorter by this, for it needs tens of milliseconds at a call."""


def short_step() -> Callable[[], None]:
    """About 5.7 ms of forward, backward and update on one thread."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.randn(32, 256)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = 32
    for _ in range(5):
        step()
    while _milliseconds(step, 20) < 5.2:
        rows += 16
        inputs = torch.randn(rows, 256)
    return step


def _milliseconds(function: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        function()
    return 1e3 * (time.perf_counter() - began) / count


class Cost(NamedTuple):
    """Milliseconds per step of one block."""

    wall: float
    own: float
    """Processor time of this process: what a busy machine cannot blur, and where waiting does not show."""


def measure(step: Callable[[], None], log: Log | None, names: list[str], *, count: int, every: int, first: int) -> Cost:
    """Time one block."""
    values = dict.fromkeys(names, 0.5)
    began, own = time.perf_counter(), time.process_time()
    for i in range(first, first + count):
        step()
        if log is not None and i % every == 0:
            log(values, i)
    return Cost(wall=1e3 * (time.perf_counter() - began) / count, own=1e3 * (time.process_time() - own) / count)


def compare(title: str, step: Callable[[], None], loggers: dict[str, Log], *, values: int, every: int, count: int, seconds: float) -> None:
    """Print a row for every logger."""
    names = [f"train/value_{i}" for i in range(values)]
    without: list[Cost] = []
    ratios: dict[str, list[Cost]] = {name: [] for name in loggers}
    at = 1
    end = time.monotonic() + seconds
    without.append(measure(step, None, names, count=count, every=every, first=at))
    while time.monotonic() < end or len(without) < 3 * len(loggers):
        for name, log in loggers.items():
            shorter = 1 if name.startswith("RunLog") else SHORTER
            ours = measure(step, log, names, count=count // shorter, every=every, first=at)
            at += count
            without.append(measure(step, None, names, count=count, every=every, first=at))
            wall, own = ((a + b) / 2 for a, b in zip(without[-1], without[-2], strict=True))
            # a step that sleeps has no processor time to compare with: there it is a share of the wall time
            ratios[name].append(Cost(wall=ours.wall / wall, own=1 + (ours.own - own) / max(own, wall if own < wall / 10 else own)))
    print(f"\n{title}: {statistics.median(c.wall for c in without):.2f} ms without logging; {values} values every {every} step(s)")
    print(f"  {'':34s} {'wall':>7s} {'processor':>10s}   bar")
    for name in loggers:
        wall, own = (statistics.median(column) for column in zip(*ratios[name], strict=True))
        verdict = f"{BARS[title]:.2f} {'met' if wall <= BARS[title] else 'MISSED'}" if name.startswith("RunLog") else ""
        print(f"  {name:34s} {wall:7.3f} {own:10.3f}   {verdict}")


def call_cost(log: RunLog, values: int = 8, count: int = 2000) -> float:
    """Milliseconds per value of the call alone."""
    numbers = {f"call/value_{i}": 0.5 for i in range(values)}
    return _milliseconds(lambda: log.log_metrics(numbers, step=1, tokens=1), count) / values


def open_logs(root: Path) -> dict[str, RunLog]:
    """Our record with three stores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    configs = {
        "RunLog, folder alone": NoTrackingConfig(),
        "RunLog, sqlite": MLflowConfig(flush_seconds=0.5),
        "RunLog, dead server": MLflowConfig(uri=dead, exit_seconds=0, flush_seconds=0.5),
    }
    return {
        name: open_run(config, run_dir=root / name.replace(", ", "_"), run_root=root, name=name, config_flat={}, config_yaml="")
        for name, config in configs.items()
    }


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each table")
    seconds = parser.parse_args().seconds
    logging.getLogger("heads_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        logs = open_logs(root)
        logs["RunLog, sqlite"].wait_for_run_id(120)
        loggers: dict[str, Log] = {name: _ours(log) for name, log in logs.items()} | {"Lightning's MLFlowLogger, sqlite": _lightning(root)}
        compare("short step", short_step(), loggers, values=5, every=1, count=300, seconds=seconds)
        compare("usual step", lambda: time.sleep(0.1), loggers, values=8, every=10, count=40, seconds=seconds)
        print("\nthe call alone:")
        for name, log in logs.items():
            print(f"  {name:34s} {call_cost(log):.4f} ms per value (bar 0.1)")
        for log in logs.values():
            log.finish()


def _ours(log: RunLog) -> Log:
    return lambda values, step: log.log_metrics(values, step=step, tokens=step)


def _lightning(root: Path) -> Log:
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("lightning", tracking_uri=f"sqlite:///{root}/lightning.db", artifact_location=str(root / "artifacts"))
    logger.log_metrics({"warm": 1.0}, step=0)
    return lambda values, step: logger.log_metrics(values, step=step)


if __name__ == "__main__":
    main()
