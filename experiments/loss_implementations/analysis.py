"""Tables and picture of the study from results/*.json (what experiments/benchmarks/loss.py wrote with --json).

python experiments/loss_implementations/analysis.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {"naive": "#b0b0b0", "default": "#7a7a7a", "torch": "#c98a3b", "compile": "#8a6fb0", "chunked": "#2a78b5"}


def results(name: str) -> dict[str, Any]:
    """The results of one file, {} where it is missing."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def time_table(cells: dict[str, Any]) -> str:
    """One row per shape and type: milliseconds, and the ratio to the limit."""
    names = [name for name in COLOURS if any(name in cell for cell in cells.values())]
    lines = ["| shape, type, labelled | limit ms | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for cell, times in cells.items():
        entries = [f"{times[n]['ms']:.0f} ({times[n]['to_limit']:.2f})" if n in times else "" for n in names]
        lines.append(f"| {cell} | {times['limit']['ms']:.0f} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def memory_table(peaks: dict[str, float]) -> str:
    """Peak MiB beyond dX and dW, one row per shape and type."""
    rows: dict[str, dict[str, float]] = {}
    for key, mib in peaks.items():
        cell, name = key.rsplit(" ", 1)
        rows.setdefault(cell, {})[name] = mib
    names = [name for name in COLOURS if any(name in row for row in rows.values())]
    lines = ["| shape, type, labelled | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for cell, row in rows.items():
        lines.append(f"| {cell} | " + " | ".join(f"{row[n]:.0f}" if n in row else "" for n in names) + " |")
    return "\n".join(lines)


def picture(times: dict[str, Any], path: Path) -> None:
    """Time ÷ limit, one group of bars per shape, type and share of labels."""
    figure, axis = plt.subplots(figsize=(11, 4))
    for group, cell in enumerate(times):
        names = [name for name in COLOURS if name in times[cell]]
        for number, name in enumerate(names):
            place = group + (number - (len(names) - 1) / 2) * 0.16
            axis.bar(place, times[cell][name]["to_limit"], width=0.15, color=COLOURS[name], label=name if group == 0 else None)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(
        range(len(times)), [cell.replace("float32", "fp32").replace("bfloat16", "bf16") for cell in times], rotation=25, ha="right"
    )
    axis.set_ylabel("time ÷ limit (three matrix products)")
    axis.legend(frameon=False, ncols=len(COLOURS))
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print the tables, write the picture."""
    times = {**results("time_float32"), **results("time_bfloat16"), **results("time_labelled")}
    print(time_table(times), memory_table({**results("memory"), **results("memory_labelled")}), sep="\n\n")
    picture(times, HERE / "loss_implementations.svg")


if __name__ == "__main__":
    main()
