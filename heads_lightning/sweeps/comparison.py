"""The cells of a sweep side by side: a ranked table, learning curves in one picture, and parallel coordinates.

Everything is read from the folders, so a sweep can be compared while it runs, after it was killed, and on another machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from heads_lightning.html_comparison import cells_page
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps import settings
from heads_lightning.sweeps.ledger import Entry, Ledger, State
from heads_lightning.tracking.run_folder import ARTIFACTS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from heads_lightning.tracking.open_run import RunLog

SUMMARY, PAGE = "summary.txt", "report.html"
CURVES, PARALLEL, TABLE = "curves.png", "parallel.png", "comparison.json"
SEEN = 0.8
"""The part of a colour map that is seen on white: viridis ends in yellow."""
MOST_IN_LEGEND = 12
DECIDE_TARGETS = ("objective", "tokenizer", "data", "experiment")
"""Groups of settings that decide what is predicted."""
SAME_TARGETS = ("data.cache_dir", "data.prepare_processes", "data.length_start", "data.length_warmup_steps")
"""Settings in them that leave held-out targets as they are."""


class Row(NamedTuple):
    """A cell in the table."""

    entry: Entry
    value: float
    """The metric that ranks; NaN where there is none."""
    step: int
    """Newest optimizer step on record."""
    varied: dict[str, str]
    """What tells the cell from the others, by key."""


class Comparison(NamedTuple):
    """A sweep's cells, the best first; those that are not done come last."""

    metric: str
    rows: list[Row]

    @property
    def keys(self) -> list[str]:
        """Varied keys in the order of the command line."""
        return list(dict.fromkeys(key for row in self.rows for key in row.varied))

    @property
    def caution(self) -> str:
        """Why the metric is no common measure of these cells, and what is one; empty where it is."""
        apart = [key for key in self.keys if key.split(".")[0] in DECIDE_TARGETS and key not in SAME_TARGETS]
        apart = [key for key in apart if len({row.varied.get(key) for row in self.rows}) > 1]
        if not apart or not self.metric.startswith(("train/loss", "val/loss")):
            return ""
        return (
            f"{self.metric} is no common measure here: what is predicted depends on {' and '.join(apart)}. One protocol for all: "
            f"sweep.metric=eval/left_to_right_bits_per_byte (or another eval/… that every cell has), or heads-lightning compare RUN RUN …"
        )


def rank(sweep_dir: Path) -> Comparison:
    """Read a sweep and rank its cells by `sweep.metric`."""
    options = settings.read(sweep_dir).options
    sign = -1 if options.direction == "maximize" else 1
    rows = [_row(sweep_dir, entry, options.metric) for entry in Ledger.of(sweep_dir).entries().values()]
    # a value of a cell that was stopped halfway is of another step: it is shown, not ranked
    rows.sort(key=lambda row: (row.entry.state != State.done, math.isnan(row.value), sign * row.value, row.entry.number))
    return Comparison(options.metric, rows)


def _row(sweep_dir: Path, entry: Entry, metric: str) -> Row:
    points = list(read_metrics(sweep_dir / entry.folder))
    logged = [point.values[metric] for point in points if metric in point.values]
    value = entry.metrics.get(metric, logged[-1] if logged else math.nan)
    varied = dict(text.lstrip("+").split("=", 1) for text in entry.overrides)
    return Row(entry, value, max((point.step for point in points), default=0), varied)


def columns(comparison: Comparison) -> list[str]:
    """Names of the table's columns."""
    return ["rank", "cell", *comparison.keys, comparison.metric, "step", "state", "seconds"]


def cells(comparison: Comparison) -> list[list[Any]]:
    """Rows of the table."""
    table = []
    for i, row in enumerate(comparison.rows):
        ranked: Any = i + 1 if row.entry.state == State.done and not math.isnan(row.value) else ""
        value = None if math.isnan(row.value) else round(row.value, 6)
        varied = [row.varied.get(key, "") for key in comparison.keys]
        table.append([ranked, row.entry.number, *varied, value, row.step, str(row.entry.state), round(row.entry.seconds, 1)])
    return table


def summary(sweep_dir: Path) -> str:
    """The table as text, with the reasons of failures; also written to summary.txt."""
    comparison = rank(sweep_dir)
    lines = [*_aligned([columns(comparison), *cells(comparison)]), *([comparison.caution] if comparison.caution else [])]
    for row in comparison.rows:
        if row.entry.reason:
            lines.append(f"cell {row.entry.number} {row.entry.state}: {row.entry.reason}")
            lines.append(f"    log: {Ledger(sweep_dir).log_file(row.entry)}")
    counts = {state: sum(row.entry.state == state for row in comparison.rows) for state in State}
    lines.append(f"{sweep_dir}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    text = "\n".join(lines)
    (sweep_dir / SUMMARY).write_text(text + "\n", encoding="utf-8")
    return text


def _aligned(rows: Sequence[Sequence[Any]]) -> list[str]:
    texts = [["" if value is None else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def compare(sweep_dir: Path, *, log: "RunLog | None" = None) -> Comparison:
    """Write the pictures and the table to the sweep's folder, and to MLflow through `log`."""
    comparison = rank(sweep_dir)
    pictures = {CURVES: curves(sweep_dir, comparison), PARALLEL: parallel(comparison)}
    folder = sweep_dir / ARTIFACTS
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        if log is None:
            figure.savefig(folder / name)
        else:
            log.log_figure(name, figure)
    (sweep_dir / PAGE).write_text(page(sweep_dir, comparison), encoding="utf-8")
    if log is not None:
        log.log_table(TABLE, columns=columns(comparison), rows=cells(comparison))
        log.log_text(SUMMARY, summary(sweep_dir))
        log.log_file(sweep_dir / PAGE)
    return comparison


def page(sweep_dir: Path, comparison: Comparison) -> str:
    """The sweep on one page, its pictures drawn already."""
    return cells_page(
        f"{sweep_dir.parent.name}/{sweep_dir.name}",
        columns=columns(comparison),
        rows=cells(comparison),
        folders={f"{row.entry.number}: {row.entry.label}": sweep_dir / row.entry.folder for row in comparison.rows},
        metric=comparison.metric,
        caution=comparison.caution,
        pictures=[sweep_dir / ARTIFACTS / PARALLEL],
        notes=[f"cell {row.entry.number} {row.entry.state}: {row.entry.reason}" for row in comparison.rows if row.entry.reason],
    )


def report(sweep_dir: Path) -> str:
    """The table as text after drawing anew; the sweep's MLflow run gets the pictures too, where its store is at hand."""
    from heads_lightning.tracking.mlflow_header import read_header
    from heads_lightning.tracking.open_run import send_later
    from heads_lightning.tracking.run_folder import EVENTS, JsonLines, event

    compare(sweep_dir)
    notes = [f"pictures: {sweep_dir / PAGE}, {sweep_dir / ARTIFACTS / CURVES}, {sweep_dir / ARTIFACTS / PARALLEL}"]
    if (sweep_dir / EVENTS).exists() and read_header(sweep_dir).uri is not None:
        lines = JsonLines(sweep_dir / EVENTS)
        for name in (CURVES, PARALLEL):
            lines.append(event("file", path=f"{ARTIFACTS}/{name}", folder=""))
        lines.append(event("file", path=PAGE, folder=""))
        lines.close()
        try:
            notes += ["MLflow does not answer; the pictures are sent with the next command"] * any(send_later(sweep_dir))
        except ConfigError as error:
            notes.append(f"not sent to MLflow: {error}")
    return "\n".join([summary(sweep_dir), *notes])


# ------------------------------------------------------------------------------------------------------------- pictures


def curves(sweep_dir: Path, comparison: Comparison) -> "Figure":
    """The metric by optimizer step, a line for each cell, the best in strong colours; training loss where the metric is no curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    name = comparison.metric
    for i, row in reversed(list(enumerate(comparison.rows))):
        points = [(p.step, p.values[name]) for p in read_metrics(sweep_dir / row.entry.folder) if name in p.values]
        if points:
            label = f"{row.entry.number}: {row.entry.label}" if i < MOST_IN_LEGEND else None
            style = {"color": f"C{i % 10}", "zorder": 3} if i < MOST_IN_LEGEND else {"color": "0.8", "zorder": 1}
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, **style)
    axes.set(xlabel="optimizer step", ylabel=name, title=f"{len(comparison.rows)} cells")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles[::-1], labels[::-1], fontsize="small")
    return figure


def parallel(comparison: Comparison) -> "Figure":
    """One axis for each varied key and one for the metric; a line for each finished cell, coloured by its metric."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, colour = figure.subplots(), colormaps["viridis"]
    rows = [row for row in comparison.rows if math.isfinite(row.value)]
    names = [*comparison.keys, comparison.metric]
    scales = [_Scale([row.varied.get(key, "") for row in rows]) for key in comparison.keys] + [_Scale([f"{row.value!r}" for row in rows])]
    for row in rows:
        heights = [
            scale(text) for scale, text in zip(scales, [*(row.varied.get(k, "") for k in comparison.keys), f"{row.value!r}"], strict=True)
        ]
        axes.plot(range(len(names)), heights, color=colour(SEEN * heights[-1]), alpha=0.8)
    for i, scale in enumerate(scales):
        scale.draw(axes, i)
    axes.set(xticks=range(len(names)), xticklabels=names, yticks=[], ylim=(-0.05, 1.05), xlim=(-0.05, len(names) - 0.85))
    axes.spines[:].set_visible(False)
    return figure


class _Scale:
    """Places the values of one axis between 0 and 1: numbers by size (by their logarithm over more than a decade), words by order."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._words = sorted(set(texts))
        try:
            self._numbers: list[float] | None = sorted({float(text) for text in texts})
        except ValueError:
            self._numbers = None
        low, high = (self._numbers[0], self._numbers[-1]) if self._numbers else (0.0, 0.0)
        self._log = low > 0 and high / low > 10
        self._low, self._high = (math.log(low), math.log(high)) if self._log else (low, high)

    def __call__(self, text: str) -> float:
        if self._numbers is None:
            return self._words.index(text) / max(len(self._words) - 1, 1)
        value = math.log(float(text)) if self._log else float(text)
        return (value - self._low) / (self._high - self._low) if self._high > self._low else 0.5

    def draw(self, axes: "Axes", position: int) -> None:
        """The axis with its ticks: every word, or the ends and the middle of the numbers."""
        axes.axvline(position, color="0.3", linewidth=1)
        numbers = self._numbers or []
        few = numbers if len(numbers) <= 5 else [numbers[0], numbers[len(numbers) // 2], numbers[-1]]
        texts = self._words if self._numbers is None else [repr(number) for number in few]
        kept = [text for i, text in enumerate(texts) if not i or self(text) - self(texts[i - 1]) > 0.03]  # others would lie on it
        for text in kept:
            shown = text if self._numbers is None else f"{float(text):.4g}"
            axes.annotate(shown, (position, self(text)), xytext=(4, 2), textcoords="offset points", fontsize="small", va="bottom")
