"""Seconds from typing `heads-lightning train` to the first finished optimizer step, data prepared, everything else cold.

    python experiments/benchmarks/first_step.py [ROUNDS]

A process of its own each time, of a tiny model, until the first line of its metrics.jsonl; byte code is cached, as it is for an
installed package. The ratio is to a process that only imports
torch and Lightning: what any program built on them pays before its first line runs. Target: at most 7 s on a quiet machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET_SECONDS = 7.0
OVERRIDES = ["backbone=tiny", "data.sequence_length=64", "trainer.global_batch_size=4", "trainer.log_every_steps=1"]


def seconds_to_first_step(folder: Path, environment: dict[str, str]) -> float:
    """One run, stopped after the first logged step was seen."""
    run_root = folder / f"runs{time.monotonic_ns()}"
    command = [sys.executable, "-m", "heads_lightning", "train", *OVERRIDES, "trainer.max_steps=100000", f"run_root={run_root}"]
    command.append(f"data.cache_dir={folder}/data")
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not any(path.stat().st_size for path in run_root.glob("*/*/metrics.jsonl")):
            if process.poll() is not None:
                raise SystemExit(f"training ended with {process.returncode} before its first step: {' '.join(command)}")
            time.sleep(0.01)
        return time.perf_counter() - start
    finally:
        process.terminate()
        process.wait()


def seconds_of_imports(environment: dict[str, str]) -> float:
    """A process that imports torch and Lightning, no more."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, lightning.pytorch"], env=environment, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(rounds: int) -> None:
    """Print the table."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare = [sys.executable, "-m", "heads_lightning", "prepare", *OVERRIDES, f"data.cache_dir={folder}/data"]
        subprocess.run(prepare, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds_to_first_step(folder, environment)  # the first fills the cache
        pairs = [(seconds_of_imports(environment), seconds_to_first_step(folder, environment)) for _ in range(rounds)]
    imports, steps = zip(*pairs, strict=True)
    ratio = statistics.median(step / base for base, step in pairs)
    print(f"import torch, lightning   {statistics.median(imports):5.2f} s")
    verdict = "met" if statistics.median(steps) <= TARGET_SECONDS else "missed"
    print(f"first step                {statistics.median(steps):5.2f} s  ({min(steps):.2f} to {max(steps):.2f}), {ratio:.2f} x the imports")
    print(f"target {TARGET_SECONDS:.0f} s: {verdict}, {rounds} rounds")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
