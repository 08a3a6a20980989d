"""Runs side by side: one table of what the held-out protocol found, best first, whatever the models were trained with.

Numbers come from each run's `evaluation.json`; nothing is computed again, and no model is loaded. Reports of different protocols (other
held-out text, other questions) are not comparable: they are shown apart, never ranked in one list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heads_lightning.registry import ConfigError, nearest

REPORT = "evaluation.json"
HIGHER_IS_BETTER = ("accuracy", "exact_match", "similarity", "stopped")
"""Words in the names of measures that are better when they are higher; all others are losses."""
ORDER = (
    "left_to_right_bits_per_byte",
    "bound_bits_per_byte",
    "masked_bits_per_byte",
    "infill_bits_per_byte",
    "prefix_bits_per_byte",
    "infill_exact_match",
    "infill_edit_similarity",
    "stop_accuracy",
    "infill_stopped",
    "random_span_bits_per_byte",
    "random_span_prefix_bits_per_byte",
    "random_span_exact_match",
    "copy_accuracy_infill",
    "copy_accuracy_prefix",
)
"""Columns, in this order; what no run has is left out."""
SHORT = {"bits_per_byte": "b/B", "left_to_right": "l-to-r", "exact_match": "exact", "random_span": "span", "edit_similarity": "similar"}


@dataclass
class RunRow:
    """A run in the table."""

    name: str
    values: dict[str, float]
    protocol: str
    facts: dict[str, Any] = field(default_factory=dict)
    """What tells the runs apart: objective, head, …"""


def read_run(folder: Path, name: str | None = None) -> RunRow:
    """A run folder's row, or one line that says what is missing."""
    path = folder / REPORT
    if not path.is_file():
        raise ConfigError(f"{folder} has no {REPORT}: evaluate it first with heads-lightning evaluate checkpoint={folder} save=true")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        floors = {f"floor_{k}": v for k, v in (report.pop("floors", None) or {}).items()}
        protocol = str(report.pop("protocol", ""))
        values = {k: float(v) for k, v in (report | floors).items() if v is not None}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); evaluate the run again") from None
    return RunRow(name or f"{folder.parent.name}/{folder.name}", values, protocol, _facts(folder))


def _facts(folder: Path) -> dict[str, Any]:
    """Options of the run's config."""
    import yaml

    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {group: config[group]["name"] for group in ("objective", "head", "backbone") if isinstance(config.get(group), dict)}


def measures(rows: Sequence[RunRow]) -> list[str]:
    """Columns of the table: the known measures that any run has."""
    return [name for name in ORDER if any(name in row.values for row in rows)]


def ranked(rows: Sequence[RunRow], by: str) -> list[RunRow]:
    """Best first; runs that lack the measure last, in the order given."""
    known = sorted({name for row in rows for name in row.values})
    if by not in known:
        raise ConfigError(f"by={by} is measured in none of the runs.{nearest(by, known)} Available: {', '.join(known)}")
    sign = -1 if any(word in by for word in HIGHER_IS_BETTER) else 1
    return sorted(rows, key=lambda row: (by not in row.values, sign * row.values.get(by, 0.0)))


def by_protocol(rows: Sequence[RunRow]) -> dict[str, list[RunRow]]:
    """The rows that may be compared with one another, the largest group first."""
    groups: dict[str, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(row.protocol, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def compare(rows: Sequence[RunRow], by: str | None = None) -> dict[str, Any]:
    """The comparison as plain data: {"by": measure, "groups": [{"protocol", "measures", "runs": [{"rank", "name", "values", …}]}]}."""
    columns = measures(rows)
    if not columns:
        raise ConfigError("none of the runs has a measure to compare; evaluate them with heads-lightning evaluate checkpoint=RUN save=true")
    chosen = by or max(columns, key=lambda name: sum(name in row.values for row in rows))
    ranked(rows, chosen)
    groups = []
    for protocol, members in by_protocol(rows).items():
        has = chosen in {name for row in members for name in row.values}
        runs = [
            {"rank": place if has and chosen in row.values else None, "name": row.name, **row.facts, "values": row.values}
            for place, row in enumerate(ranked(members, chosen) if has else members, start=1)
        ]
        groups.append({"protocol": protocol, "measures": measures(members), "runs": runs})
    return {"by": chosen, "groups": groups}


def table_text(comparison: dict[str, Any]) -> str:
    """The comparison as aligned text."""
    blocks = [f"ranked by {comparison['by']} (best first)"]
    for number, group in enumerate(comparison["groups"]):
        if number:
            blocks.append(f"not comparable with the above: other held-out text or questions (protocol {group['protocol'] or 'unknown'})")
        facts = [key for key in ("objective", "head", "backbone") if len({run.get(key) for run in group["runs"]}) > 1]
        header = ["", "run", *facts, *(_short(name) for name in group["measures"])]
        lines = [header]
        for run in group["runs"]:
            values = [f"{run['values'][name]:.3f}" if name in run["values"] else "–" for name in group["measures"]]
            lines.append([str(run["rank"] or "–"), run["name"], *(str(run.get(key, "–")) for key in facts), *values])
        blocks.append(_aligned(lines, left=2 + len(facts)))
    return "\n\n".join(blocks)


def _short(name: str) -> str:
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name.replace("_", " ")


def _aligned(lines: list[list[str]], left: int) -> str:
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    padded = (
        [cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)
