"""How long does a cell of a sweep take to start, forked from a warm parent and in an interpreter of its own?

    python experiments/benchmarks/sweeps.py [--cells 4]

Both ways in one run, one after the other, on the same prepared data. The start of a cell is the time from the end of the cell before it
(its last record in the ledger) to its first optimizer step (its first point): everything that the sweep does in between is in it. The
first cell of a sweep pays the imports either way and is told apart.
"""

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from heads_lightning.sweeps.ledger import FILE, Ledger
from heads_lightning.tracking.run_folder import read_metrics, read_records

TINY = [
    "data=files", f"data.root={sysconfig.get_paths()['stdlib']}", "data.include=[json/*.py,email/*.py]", "data.sequence_length=64",
    "data.validation_sequences=8", "tokenizer.vocab_size=512", "backbone.d_model=32", "backbone.num_layers=2", "backbone.num_heads=2",
    "trainer.max_steps=4", "trainer.global_batch_size=8", "trainer.micro_batch_size=8", "trainer.log_every_steps=1",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "evaluation.enabled=false",
]  # fmt: skip
BAR_SECONDS = 1.5


def starts(root: Path, name: str, cells: int, *overrides: str) -> list[float]:
    """Seconds from the end of the cell before to the first step, for each cell but the first."""
    folder = root / name
    seeds = ",".join(str(i) for i in range(cells))
    line = ["train", "-m", *TINY, f"seed={seeds}", f"run_root={root}", *overrides, f"hydra.sweep.dir={folder}"]
    subprocess.run([sys.executable, "-m", "heads_lightning", *line], check=True, capture_output=True)
    ended = {record["cell"]: record["time"] for record in read_records(folder / FILE) if record.get("state") == "done"}
    entries = list(Ledger.of(folder).entries().values())
    first_step = [min(point.time for point in read_metrics(folder / entry.folder)) for entry in entries]
    return [first_step[i] - ended[entries[i - 1].hash] for i in range(1, cells)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=4)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        starts(root, "prepare", 2, "tracking=none")
        print(f"{'seconds from the end of a cell to the first step of the next':62s} median   worst")
        for tracking in ("none", "mlflow"):
            found = {
                warm: starts(root, f"{tracking}_{warm}", cells, f"tracking={tracking}", f"sweep.warm={warm}") for warm in ("true", "false")
            }
            for warm, label in (("false", "an interpreter of its own"), ("true", "forked from a warm parent")):
                seconds = found[warm]
                verdict = ("met" if max(seconds) < BAR_SECONDS else "MISSED") if warm == "true" else ""
                row = f"tracking={tracking}, {label}"
                print(f"  {row:60s} {statistics.median(seconds):6.2f}  {max(seconds):6.2f}   {verdict}")
            print(f"  {'ratio':60s} {statistics.median(found['false']) / statistics.median(found['true']):6.1f}")


if __name__ == "__main__":
    main()
