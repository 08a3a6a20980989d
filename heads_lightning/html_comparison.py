"""Runs, or the cells of a sweep, on one page that needs nothing else: tables, learning curves over each other, pictures, what differs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from heads_lightning.charts import chart, key
from heads_lightning.html_report import curve_of, page, section
from heads_lightning.tracking.run_folder import CONFIG, read_metrics

CURVES = {"Held-out loss": "val/loss", "Training loss": "train/loss", "Gradient norm": "train/grad_norm"}
"""Titles, and the metric that each picture shows of every run."""


def comparison_page(comparison: Mapping[str, Any], folders: Mapping[str, Path]) -> str:
    """The page of `comparison.compare`: a table for each protocol, curves, and the settings that differ.

    Args:
        comparison: as made there.
        folders: run folders by the names that the comparison uses.
    """
    names = [run["name"] for group in comparison["groups"] for run in group["runs"]]
    body = [
        f"<h1>{len(names)} runs</h1><p class='mute'>ranked by {escape(comparison['by'])}, best first</p>",
        *(section(_protocol(number, group), _measured(group)) for number, group in enumerate(comparison["groups"])),
        section("Curves", overlaid({name: folders[name] for name in names}, CURVES)),
        section("What differs", _differences({name: folders[name] for name in names})),
    ]
    return page(f"{len(names)} runs", body)


def cells_page(
    title: str,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    folders: Mapping[str, Path],
    metric: str,
    caution: str = "",
    pictures: Sequence[Path] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page of a sweep.

    Args:
        title: of the sweep.
        columns, rows: its table, best first.
        folders: of the cells by name, best first.
        metric: that ranks.
        caution: why it should not, if so.
        pictures: PNG files to show as they are.
        notes: why cells failed.
    """
    curves = {metric: metric, **{name: other for name, other in CURVES.items() if other != metric}}
    body = [
        f"<h1>{escape(title)}</h1><p class='mute'>{len(rows)} cells, ranked by {escape(metric)}</p>",
        f"<p>{escape(caution)}</p>" if caution else "",
        section("Cells", _table(columns, rows)),
        section("Not done", "".join(f"<p>{escape(note)}</p>" for note in notes)),
        section("Curves", overlaid(folders, curves)),
        section("Settings and results", "".join(map(_picture, pictures))),
    ]
    return page(title, body)


def overlaid(folders: Mapping[str, Path], metrics: Mapping[str, str]) -> str:
    """One chart for each metric, a curve for each run."""
    points = {name: list(read_metrics(folder)) for name, folder in folders.items()}
    drawn = [chart(title, {name: curve_of(p, metric) for name, p in points.items()}, named=False) for title, metric in metrics.items()]
    return f"{key(list(folders))}<div class='pictures'>{''.join(drawn)}</div>" if any(drawn) else ""


def _protocol(number: int, group: Mapping[str, Any]) -> str:
    return "Held-out protocol" if number == 0 else f"Not comparable with the above (protocol {group['protocol'] or 'unknown'})"


def _measured(group: Mapping[str, Any]) -> str:
    measures = group["measures"]
    rows = [
        [run["rank"] or "–", run["name"], *(f"{run['values'][m]:.4f}" if m in run["values"] else "–" for m in measures)]
        for run in group["runs"]
    ]
    return _table(["", "run", *(measure.replace("_", " ") for measure in measures)], rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    lines = ("".join(f"<td class='n'>{escape('' if cell is None else str(cell))}</td>" for cell in row) for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _differences(folders: Mapping[str, Path]) -> str:
    """Settings that are not the same in every run, by dotted name."""
    flat = {name: dict(_leaves(_config(folder))) for name, folder in folders.items()}
    keys = sorted({key for settings in flat.values() for key in settings})
    differing = [key for key in keys if len({str(settings.get(key, "–")) for settings in flat.values()}) > 1]
    return _table(["setting", *flat], [[key, *(flat[name].get(key, "–") for name in flat)] for key in differing]) if differing else ""


def _config(folder: Path) -> Any:
    import yaml

    path = folder / CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}.{key}".lstrip("."))]


def _picture(path: Path) -> str:
    """A PNG as part of the page."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{escape(path.stem)}' src='data:image/png;base64,{data}'>"
