"""Tables and picture of the study from results/*.json (what experiments/benchmarks/loss.py wrote with --json).

python experiments/loss_implementations/analysis.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
COLOURS = {"naive": "#b0b0b0", "default": "#7a7a7a", "torch": "#c98a3b", "compile": "#8a6fb0", "chunked": "#2a78b5", "auto": "#3aa17e"}
KINDS = {"float32": "fp32", "bfloat16": "bf16"}


def read(name: str) -> dict[str, Any]:
    """One file of results."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def results(name: str) -> dict[str, Any]:
    """The numbers of one file."""
    return read(name)["results"]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def time_table(cells: dict[str, Any]) -> str:
    """One row per shape and type: milliseconds, the ratio to the limit, and `chunked` against both plain ones."""
    names = [name for name in COLOURS if any(name in cell for cell in cells.values())]
    rows = []
    for cell, times in cells.items():
        entries = [f"{times[n]['ms']:.0f} ({times[n]['to_limit']:.2f})" if n in times else "" for n in names]
        against = [f"{times['chunked'][f'to_{plain}']:.2f}" for plain in ("naive", "default")]
        rows.append([cell, f"{times['limit']['ms']:.0f}", *entries, *against])
    return markdown(["shape, type, labelled", "limit ms", *names, "chunked ÷ naive", "chunked ÷ default"], rows)


def memory_table(peaks: dict[str, float]) -> str:
    """Peak MiB beyond dX and dW, one row per shape and type."""
    rows: dict[str, dict[str, float]] = {}
    for key, mib in peaks.items():
        cell, name = key.rsplit(" ", 1)
        rows.setdefault(cell, {})[name] = mib
    names = [name for name in COLOURS if any(name in row for row in rows.values())]
    return markdown(
        ["shape, type, labelled", *names], [[cell, *(f"{row[n]:.0f}" if n in row else "" for n in names)] for cell, row in rows.items()]
    )


def sweep_table(cells: dict[str, Any]) -> str:
    """Small shapes: what `auto` takes, and the times against `default`."""
    rows = [
        [*cell.split(), found["auto_takes"], *(f"{found[kind][name]:.2f}" for kind in KINDS for name in ("chunked", "auto"))]
        for cell, found in cells.items()
    ]
    header = ["rows", "classes", "auto takes", *(f"{kind} {name}" for kind in KINDS.values() for name in ("chunked", "auto"))]
    return markdown(header, rows)


def split_table(cells: dict[str, Any]) -> str:
    """Where `chunked` spends its time, in shares of the limit; the parts are those of experiments/benchmarks/loss.py."""
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    return markdown(["shape, type, labelled", *names], [[cell, *(f"{found[n]:.2f}" for n in names)] for cell, found in cells.items()])


def draw_times(axis: Axes, times: dict[str, Any]) -> None:
    """Time ÷ limit, one group of bars per shape, type and share of labels; a bar that leaves the picture carries its number."""
    top = 5.0
    for group, cell in enumerate(times):
        names = [name for name in COLOURS if name in times[cell]]
        for number, name in enumerate(names):
            place, height = group + (number - (len(names) - 1) / 2) * 0.16, times[cell][name]["to_limit"]
            axis.bar(place, min(height, top), width=0.15, color=COLOURS[name])
            if height > top:
                axis.text(place, top, f"{height:.0f}", ha="center", va="bottom", fontsize=7)
    axis.axhline(1, color="black", linewidth=1)
    labels = [cell.replace("float32", "fp32").replace("bfloat16", "bf16") for cell in times]
    axis.set_xticks(range(len(times)), labels, rotation=30, ha="right")
    axis.set_ylabel("time ÷ three matrix products")
    drawn = [name for name in COLOURS if any(name in cell for cell in times.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in drawn]
    axis.legend(handles, drawn, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.03))


def draw_sweep(axis: Axes, cells: dict[str, Any]) -> None:
    """Time ÷ default over the number of logits."""
    logits = [int(cell.split()[0]) * int(cell.split()[1]) for cell in cells]
    for kind, marker in (("float32", "o"), ("bfloat16", "s")):
        for name in ("chunked", "auto"):
            ratios = [found[kind][name] for found in cells.values()]
            axis.scatter(logits, ratios, color=COLOURS[name], marker=marker, s=22, label=f"{name}, {KINDS[kind]}")
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("logits")
    axis.set_ylabel("time ÷ default")
    axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.03))


def main() -> None:
    """Write tables.md and the picture."""
    times = {cell: found for name in ("float32", "bfloat16", "mixed", "labelled") for cell, found in results(f"time_{name}").items()}
    about = read("time_float32")["about"]
    where = f"{about['processor']}, {about['threads']} threads, torch {about['torch']}."
    tables = [
        f"Written by measure.py on: {where}",
        "Forward and backward in milliseconds (÷ limit):",
        time_table(times),
        "`mixed` is bf16 with weights of fp32, under autocast.",
        "Peak memory of one step beyond dX and dW, MiB:",
        memory_table({**results("memory"), **results("memory_labelled")}),
        "Small shapes, width 256, time ÷ `default`:",
        sweep_table(results("sweep")),
        "Where `chunked` spends its time, ÷ limit (`fresh dW`: all of its time where the memory of gradients is not kept):",
        split_table(results("split")),
    ]
    (HERE / "tables.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    print("\n\n".join(tables))
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.6), width_ratios=(2.2, 1))
    draw_times(axes[0], times)
    draw_sweep(axes[1], results("sweep"))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "loss_implementations.png", dpi=110)


if __name__ == "__main__":
    main()
