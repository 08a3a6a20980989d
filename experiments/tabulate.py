"""A sweep's cells as a study's table: mean and spread over seeds of what each cell measured, into results.json and the study's README.

    python experiments/tabulate.py STUDY SWEEP_FOLDER [SWEEP_FOLDER …] --by KEY [KEY …] --measures NAME [NAME …]
    python experiments/tabulate.py STUDY SWEEP_FOLDER --add       further cells of the same kind, e.g. of other seeds
    python experiments/tabulate.py STUDY                          table and picture anew from results.json

`STUDY` is a folder below experiments/. Cells that differ in `seed` alone are one row. The README's table stands between two marker lines
and is written anew; everything in it comes from `results.json`, which is committed beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from heads_lightning.sweeps import settings
from heads_lightning.sweeps.ledger import Ledger, State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parent
BEGIN, END = "<!-- table -->", "<!-- /table -->"
UNIT = " bits per byte"
"""Left out of the heads where every measure has it; the README names it."""


class Cell(NamedTuple):
    """One run of a sweep."""

    cell: dict[str, str]
    """What varied, by key."""
    seed: int
    values: dict[str, float]
    """What it measured; a measure that its objective does not have is missing."""


class Results(NamedTuple):
    """What results.json holds."""

    by: list[str]
    measures: list[str]
    cells: list[Cell]

    def rows(self) -> dict[tuple[str, ...], list[Cell]]:
        """Cells that differ in their seed alone, by what varied."""
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(tuple(cell.cell.values()), []).append(cell)
        return found

    def heads(self) -> list[str]:
        """Measures as a reader would say them."""
        names = [name.split("/")[-1].replace("_", " ") for name in self.measures]
        return [name.removesuffix(UNIT) for name in names] if all(name.endswith(UNIT) for name in names) else names


def load(path: Path) -> Results:
    """Read results.json."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Results(found["by"], found["measures"], [Cell(**cell) for cell in found["cells"]])


def save(path: Path, results: Results) -> None:
    """Write results.json, a cell a line."""
    cells = ",\n  ".join(json.dumps(cell._asdict()) for cell in results.cells)
    head = f'"by": {json.dumps(results.by)},\n "measures": {json.dumps(results.measures)}'
    path.write_text(f'{{{head},\n "cells": [\n  {cells}\n ]}}\n', encoding="utf-8")


def read(sweep: Path, by: list[str], measures: list[str]) -> list[Cell]:
    """The cells of a sweep that is done."""
    found, asked = [], [override for override in settings.read(sweep).overrides if "=" in override]
    for entry in Ledger.of(sweep).entries().values():
        if entry.state != State.done:
            raise SystemExit(f"{entry.label} is {entry.state}: {entry.reason or 'not finished'}; go on with sweep.resume={sweep}")
        given = dict(override.split("=", 1) for override in [*asked, *entry.overrides])  # a key with one value is no part of a cell's name
        values = {name: entry.metrics[name] for name in measures if name in entry.metrics}
        if missing := [key for key in by if key not in given]:
            raise SystemExit(f"{sweep} does not say {', '.join(missing)}; --by takes what it was given: {', '.join(sorted(given))}")
        found.append(Cell({key: given[key] for key in by}, int(given.get("seed", 0)), values))
    return found


def table(results: Results) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    heads = [*results.by, *results.heads(), "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for key, cells in results.rows().items():
        shown = [_spread([cell.values[name] for cell in cells if name in cell.values]) for name in results.measures]
        lines.append(f"| {' | '.join([*key, *shown, str(len(cells))])} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


# ------------------------------------------------------------------------------------------------------------- pictures


def picture(path: Path, results: Results) -> None:
    """A panel for each measure that two rows have, a dot a run. One key: its values at the left. Two: a curve for each value of the first,
    over the second, which is a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [name for name in results.measures if sum(any(name in c.values for c in cells) for cells in results.rows().values()) > 1]
    panels = [(name, head) for name, head in zip(results.measures, results.heads(), strict=True) if name in compared]
    curves = len(results.by) > 1
    height = 3.2 if curves else 0.35 * len(results.rows()) + 1.4
    figure, axes_P = pyplot.subplots(
        1, len(panels), figsize=(2.6 * len(panels) + 1.6, height), squeeze=False, sharey=not curves, layout="constrained"
    )
    for axes, (measure, head) in zip(axes_P[0], panels, strict=True):
        (_curves if curves else _dots)(axes, results, measure)
        axes.set_title(head, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    first = axes_P[0][0]
    if curves:
        first.legend(fontsize=8)
        first.set_ylabel("bits per byte")
    else:
        first.set_yticks(range(len(results.rows())), [key[0] for key in results.rows()])
        first.set_ylabel(results.by[0])
        first.set_ylim(len(results.rows()) - 0.5, -0.5)
        figure.supxlabel("bits per byte", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _number(text: str) -> float:
    """A value of a key on an axis; NaN for a word."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _dots(axes: Axes, results: Results, measure: str) -> None:
    """A row a value of the key, a bar at its mean, joined where the values are numbers."""
    means = []
    for y, cells in enumerate(results.rows().values()):
        values = [cell.values[measure] for cell in cells if measure in cell.values]
        axes.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4, alpha=0.6)
        means.append(statistics.mean(values) if values else math.nan)
    numeric = not any(math.isnan(_number(key[0])) for key in results.rows())
    axes.plot(means, range(len(means)), "-" if numeric else "|", color="tab:blue", linewidth=1, markersize=10)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=4)


def _curves(axes: Axes, results: Results, measure: str) -> None:
    """A line through the means for each value of the first key, over the second, by its logarithm."""
    for i, arm in enumerate(dict.fromkeys(key[0] for key in results.rows())):
        found = {_number(key[1]): cells for key, cells in results.rows().items() if key[0] == arm}
        points = [(x, [cell.values[measure] for cell in found[x] if measure in cell.values]) for x in sorted(found)]
        points = [(x, values) for x, values in points if values]
        axes.plot([x for x, _ in points], [statistics.mean(values) for _, values in points], "-", color=f"C{i}", linewidth=1, label=arm)
        for x, values in points:
            axes.plot([x] * len(values), values, "o", color=f"C{i}", markersize=4, alpha=0.6)
    ticks = sorted({_number(key[1]) for key in results.rows()})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(results.by[1], fontsize=8)


# ------------------------------------------------------------------------------------------------------------- the study


def with_table(readme: str, text: str) -> str:
    """A README with its table replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("sweeps", nargs="*", type=Path, help="none: results.json is read again")
    parser.add_argument("--add", action="store_true", help="keep what results.json has, its keys and measures")
    parser.add_argument("--by", nargs="+")
    parser.add_argument("--measures", nargs="+")
    given = parser.parse_args()
    file = ROOT / given.study / "results.json"
    if given.sweeps and not given.add and not (given.by and given.measures):
        parser.error("say what varied and what to show: --by and --measures; or --add to what results.json has")
    kept = load(file) if given.add or not given.sweeps else Results(given.by, given.measures, [])
    added = [cell for sweep in given.sweeps for cell in read(sweep, kept.by, kept.measures)]
    taken = [(cell.cell, cell.seed) for cell in added]
    results = kept._replace(cells=[cell for cell in kept.cells if (cell.cell, cell.seed) not in taken] + added)
    save(file, results)
    readme = ROOT / given.study / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    picture(file.with_name("results.png"), results)
    print(table(results))


if __name__ == "__main__":
    main()
