"""A sweep's cells as a study's table: mean and spread over seeds of what each cell measured, into results.json and the study's README.

    python experiments/tabulate.py STUDY SWEEP_FOLDER --by KEY [KEY …] --measures NAME [NAME …]

`STUDY` is a folder below experiments/. Cells that differ in `seed` alone are one row. The README's table stands between two marker lines
and is written anew; everything in it comes from `results.json`, which is committed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from heads_lightning.sweeps.ledger import Ledger, State

ROOT = Path(__file__).resolve().parent
BEGIN, END = "<!-- table -->", "<!-- /table -->"


def read(sweep: Path, by: list[str], measures: list[str]) -> list[dict[str, object]]:
    """One entry a cell: what varied, its seed, its measures."""
    found = []
    for entry in Ledger.of(sweep).entries().values():
        if entry.state != State.done:
            raise SystemExit(f"{entry.label} is {entry.state}: {entry.reason or 'not finished'}; go on with sweep.resume={sweep}")
        given = dict(override.split("=", 1) for override in entry.overrides)
        values = {name: entry.metrics[name] for name in measures if name in entry.metrics}
        found.append({"cell": {key: given.get(key, "") for key in by}, "seed": int(given.get("seed", 0)), "values": values})
    return found


def table(cells: list[dict[str, object]], by: list[str], measures: list[str]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    groups: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell["cell"].values())].append(cell["values"])  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    heads = [*by, *(name.split("/")[-1].replace("_", " ") for name in measures), "seeds"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for key, rows in groups.items():
        shown = [_spread([row[name] for row in rows if name in row]) for name in measures]
        lines.append(f"| {' | '.join([*key, *shown, str(len(rows))])} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def picture(path: Path, cells: list[dict[str, object]], by: str, measures: list[str]) -> None:
    """One panel a measure: a dot a cell, a line through the means where the key is a number; names stand at the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(cell["cell"][by]) for cell in cells))  # pyright: ignore[reportIndexIssue]
    numeric = all(name.replace(".", "", 1).isdigit() for name in names)
    figure, panels = pyplot.subplots(
        1, len(measures), figsize=(2.6 * len(measures) + 1, 0.35 * len(names) + 1.2), squeeze=False, sharey=True
    )
    for axes, measure in zip(panels[0], measures, strict=True):
        means = []
        for y, name in enumerate(names):
            values = [c["values"].get(measure) for c in cells if str(c["cell"][by]) == name]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
            values = [value for value in values if value is not None]
            axes.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4, alpha=0.6)
            means.append(statistics.mean(values) if values else float("nan"))
        axes.plot(means, range(len(names)), "-" if numeric else "|", color="tab:blue", linewidth=1)
        axes.set_title(measure.split("/")[-1].replace("_", " "), fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    panels[0][0].set_ylabel(by)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("sweep", nargs="?", type=Path, help="left out: results.json is read again")
    parser.add_argument("--by", nargs="+", required=True)
    parser.add_argument("--measures", nargs="+", required=True)
    given = parser.parse_args()
    folder = ROOT / given.study
    results = folder / "results.json"
    if given.sweep is not None:
        results.write_text(json.dumps(read(given.sweep, given.by, given.measures), indent=1) + "\n", encoding="utf-8")
    cells = json.loads(results.read_text(encoding="utf-8"))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    text = f"{before}{BEGIN}\n{table(cells, given.by, given.measures)}\n{END}{after}"
    (folder / "README.md").write_text(text, encoding="utf-8")
    picture(folder / "results.png", cells, given.by[0], given.measures)
    print(table(cells, given.by, given.measures))


if __name__ == "__main__":
    main()
