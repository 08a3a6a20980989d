"""The whole study in one command: times, memory, small shapes, then the tables and the pictures. Half an hour on two idle cores.

    python experiments/loss_implementations/measure.py [--quick]

Writes results/*.json, tables.md and loss_implementations.png. Nothing else should run meanwhile. --quick shows
in a minute that it works, and leaves its own numbers there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARK = HERE.parent / "benchmarks" / "loss.py"
LONG = "--rounds 15 --at-least 45"
RUNS = {
    "time_float32": f"time --dtypes float32 --implementations naive,default,compile,chunked {LONG}",
    "time_bfloat16": f"time --dtypes bfloat16 --implementations naive,default,compile,chunked {LONG}",
    "time_mixed": "time --dtypes mixed --labelled 1.0,0.15 --implementations naive,default,chunked",
    "time_labelled": f"time --labelled 0.15 --implementations naive,default,chunked {LONG}",
    "memory": "memory --shapes A,C --implementations naive,default,chunked",
    "memory_labelled": "memory --shapes A --labelled 0.15 --implementations naive,default,chunked",
    "sweep": "sweep --rounds 30",
    "split": "split --labelled 1.0,0.15",
}
"""Files of results/, and what fills them: two threads; at least 15 rounds and 45 seconds where there is a goal to reach, else 9 rounds, of
the small shapes 30."""
QUICK = ["--shapes", "C", "--rounds", "1", "--at-least", "0"]


def main(quick: bool) -> None:
    """Run everything, one after the other."""
    for name, arguments in RUNS.items():
        kept = ["--json", str(HERE / "results" / f"{name}.json")]
        subprocess.run([sys.executable, str(BENCHMARK), *arguments.split(), *(QUICK if quick else []), *kept], check=True)
    subprocess.run([sys.executable, str(HERE / "analysis.py")], check=True)


if __name__ == "__main__":
    main("--quick" in sys.argv[1:])
