"""report.html: a run on one page that needs nothing else: final numbers, curves, samples, configuration, versions.

One file without a script and without an address in it: it can be mailed, kept, and opened years later. Everything that comes from a run
is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads_lightning import charts
from heads_lightning.charts import chart
from heads_lightning.tracking.run_folder import PROVENANCE, Point, read_json, read_metrics

if TYPE_CHECKING:
    from heads_lightning.evaluation.scoring import Sample

FILE = "report.html"
PICTURES = {
    "Loss": ("train/loss", "val/loss"),
    "Gradient norm": ("train/grad_norm",),
    "Learning rate": ("train/learning_rate", "optimizer/learning_rate"),
    "Positions per second": ("speed/tokens_per_second",),
}
"""Titles, and the metrics that share a picture; one without points is left out."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mute: #777;
  --prefix: #2563eb22; --middle: #16a34a40; --suffix: #d9770622; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
img { max-width: 100%; background: #fff; } .mute { color: var(--mute); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-wrap: normal; } .scroll th { white-space: nowrap; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: break-spaces; margin: 0; }
pre.page { white-space: pre; overflow-x: auto; overflow-wrap: normal; padding: .75rem; border: 1px solid var(--line); }
.sample { border: 1px solid var(--line); padding: .75rem; margin: .75rem 0; }
.prefix { background: var(--prefix); } .middle { background: var(--middle); } .suffix { background: var(--suffix); }
.key span { padding: 0 .5rem; margin-right: .5rem; }
"""


def write_report(
    run_dir: Path,
    *,
    name: str,
    config_yaml: str,
    numbers: Mapping[str, float],
    samples: Sequence[Sample] = (),
    summary: str = "",
) -> Path:
    """Write report.html of a run from its folder and what its end knows.

    Args:
        run_dir: the run; its metrics.jsonl and provenance.json are read.
        name: of the run.
        config_yaml: resolved configuration.
        numbers: last value of every metric, evaluation included.
        samples: infilled lines.
        summary: text of summary.txt.
    """
    body = [
        f"<h1>{escape(name)}</h1><p class='mute'>{escape('/'.join(run_dir.absolute().parts[-2:]))}</p>",
        section("Summary", f"<pre class='page'>{escape(summary.strip())}</pre>" if summary else ""),
        section("Curves", _pictures(list(read_metrics(run_dir)))),
        section("Infilled lines", _samples(samples)),
        section("Final numbers", _numbers(numbers)),
        section("Versions", _facts(read_json(run_dir / PROVENANCE))),
        section("Configuration", _folded("every setting", f"<pre class='page'>{escape(config_yaml.strip())}</pre>")),
    ]
    path = run_dir / FILE
    path.write_text(page(name, body), encoding="utf-8")
    return path


def samples_page(samples: Sequence[Sample]) -> str:
    """The infilled lines alone: prefix, middle and suffix coloured."""
    return page("Infilled lines", [section("Infilled lines", _samples(samples))])


def page(title: str, body: Sequence[str]) -> str:
    """A whole page of one file."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    start = f"<!doctype html><html lang='en'><head>{head}<title>{escape(title)}</title><style>{STYLE}{charts.STYLE}</style></head>"
    return f"{start}<body>{''.join(body)}</body></html>\n"


def section(title: str, body: str) -> str:
    """A titled part of a page; nothing where there is nothing to show."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _numbers(numbers: Mapping[str, float]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td class='n'>{value:.6g}</td></tr>" for key, value in sorted(numbers.items()))
    return f"<div class='scroll'><table>{rows}</table></div>" if rows else ""


def _facts(tree: Mapping[str, Any]) -> str:
    """provenance.json as a table of dotted names."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in _leaves(tree) if value not in (None, "", [])
    )
    return _folded("commit, packages, machine", f"<table>{rows}</table>") if rows else ""


def _folded(title: str, body: str) -> str:
    """Something long that opens with a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _leaves(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if key != "diff":
            found += _leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return found


def _samples(samples: Sequence[Sample]) -> str:
    key = "<p class='key'><span class='prefix'>prefix</span><span class='middle'>what the model wrote</span>" \
          "<span class='suffix'>suffix</span></p>"  # fmt: skip
    return key + "".join(map(_sample, samples)) if samples else ""


def _sample(sample: Sample) -> str:
    before = "\n".join(sample.prefix.split("\n")[-6:])
    after = "\n".join(sample.suffix.split("\n")[:5])
    parts = (("prefix", before), ("middle", sample.infill or "(nothing)"), ("suffix", after))
    code = "".join(f"<span class='{kind}'>{escape(text)}</span>" for kind, text in parts)
    return f"<div class='sample'><pre>{code}</pre><p class='mute'>hidden line</p><pre>{escape(sample.truth)}</pre></div>"


def _pictures(points: Sequence[Point]) -> str:
    drawn = [chart(title, {name: curve_of(points, name) for name in names}) for title, names in PICTURES.items()]
    return f"<div class='pictures'>{''.join(drawn)}</div>" if any(drawn) else ""


def curve_of(points: Sequence[Point], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    return [(point.step, point.values[name]) for point in points if name in point.values]
