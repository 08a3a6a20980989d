"""What the command line costs before it does anything: CPU seconds of help, a printed configuration, a mistake, tab completion.

    python experiments/benchmarks/startup.py [ROUNDS]

Byte code is cached, as it is for an installed package. Each command runs in a process of its own, interleaved with a bare Hydra
application that prints its (empty) configuration; the ratio to it says what this program adds and holds on a busy machine, where
seconds do not. Target: at most 0.4 s of CPU each on a quiet core.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET_SECONDS = 0.4
BARE = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(cfg): pass
main()
"""
PROGRAM = [sys.executable, "-m", "heads_lightning"]
COMMANDS: dict[str, list[str]] = {
    "bare hydra --cfg job": [sys.executable, "BARE", "--cfg", "job"],
    "--help": [*PROGRAM, "--help"],
    "train --help": [*PROGRAM, "train", "--help"],
    "train --cfg job": [*PROGRAM, "train", "--cfg", "job"],
    "unknown option": [*PROGRAM, "train", "objective=mln"],
    "unknown field": [*PROGRAM, "train", "objective.rat=1"],
    "completion": [*PROGRAM, "-sc", "query=bash"],
    "list": [*PROGRAM, "list"],
}


def cpu_seconds(command: list[str], folder: str) -> float:
    """User and system time of one run of `command`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "heads-lightning train objective="}
    environment["PYTHONDONTWRITEBYTECODE"] = ""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: int) -> None:
    """Print the table."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE)
        for _ in range(rounds + 1):
            for name, command in COMMANDS.items():
                times[name].append(cpu_seconds([str(bare) if word == "BARE" else word for word in command], folder))
    reference = times["bare hydra --cfg job"][1:]  # the first round fills caches
    print(f"{'command':22} {'best':>7} {'median':>7} {'ratio':>6}   CPU seconds, {rounds} rounds; target {TARGET_SECONDS} s")
    for name, values in times.items():
        kept = values[1:]
        ratio = statistics.median(value / base for value, base in zip(kept, reference, strict=True))
        print(f"{name:22} {min(kept):7.3f} {statistics.median(kept):7.3f} {ratio:6.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
