"""Seconds from typing `heads-lightning train` to the first finished optimizer step, data prepared, everything else cold.

    python experiments/benchmarks/first_step.py [ROUNDS]

A process of its own each time, of a tiny model, until the first line of its metrics.jsonl; byte code is cached, as it is for an
installed package. The ratio is to a process that only imports torch and Lightning: what any program built on them pays before its first
line runs. Target: at most 7 s on a quiet machine. Told beside it: when the run was in MLflow, whose imports must not fall into the steps.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from heads_lightning.tracking.run_folder import METRICS, SIDECAR

ROOT = Path(__file__).resolve().parents[2]
TARGET_SECONDS = 7.0
OVERRIDES = ["backbone=tiny", "data.sequence_length=64", "trainer.global_batch_size=4", "trainer.log_every_steps=1"]


class Start(NamedTuple):
    """Seconds from the start of the command."""

    first_step: float
    in_mlflow: float


def start(folder: Path, environment: dict[str, str]) -> Start:
    """One run, stopped after its first logged step and its run in MLflow were seen."""
    run_root = folder / f"runs{time.monotonic_ns()}"
    command = [sys.executable, "-m", "heads_lightning", "train", *OVERRIDES, "trainer.max_steps=100000", f"run_root={run_root}"]
    command.append(f"data.cache_dir={folder}/data")
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        seen: dict[str, float] = {}
        while len(seen) < 2:
            if process.poll() is not None:
                raise SystemExit(f"training ended with {process.returncode} before its first step: {' '.join(command)}")
            for name in (METRICS, SIDECAR):
                if any(path.stat().st_size for path in run_root.glob(f"*/*/{name}")):
                    seen.setdefault(name, time.perf_counter() - began)
            time.sleep(0.01)
        return Start(first_step=seen[METRICS], in_mlflow=seen[SIDECAR])
    finally:
        process.terminate()
        process.wait()


def seconds_of_imports(environment: dict[str, str]) -> float:
    """A process that imports torch and Lightning, no more."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, lightning.pytorch"], env=environment, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main(rounds: int) -> None:
    """Print the table."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, "-m", "heads_lightning", "prepare", *OVERRIDES, f"data.cache_dir={folder}/data"]
        subprocess.run(prepare, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start(folder, environment)  # the first fills the cache
        pairs = [(seconds_of_imports(environment), start(folder, environment)) for _ in range(rounds)]
    imports, starts = zip(*pairs, strict=True)
    steps = [found.first_step for found in starts]
    ratio = statistics.median(found.first_step / base for base, found in pairs)
    print(f"import torch, lightning   {statistics.median(imports):5.2f} s")
    verdict = "met" if statistics.median(steps) <= TARGET_SECONDS else "missed"
    print(f"first step                {statistics.median(steps):5.2f} s  ({min(steps):.2f} to {max(steps):.2f}), {ratio:.2f} x the imports")
    print(f"run in MLflow             {statistics.median(found.in_mlflow for found in starts):5.2f} s")
    print(f"target {TARGET_SECONDS:.0f} s: {verdict}, {rounds} rounds")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
