"""report.html: a run on one page that needs nothing else: final numbers, curves, samples, configuration, versions.

One file without a script and without an address in it: it can be mailed, kept, and opened years later. Curves are drawn as SVG text by
this module, so they stay sharp, follow a dark page, and cost no import. Everything that comes from a run is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads_lightning.training.run_folder import PROVENANCE, Point, read_json, read_metrics

if TYPE_CHECKING:
    from heads_lightning.scoring import Sample

FILE = "report.html"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 250, 80, 44, 12
"""Of a picture and its margins, in SVG units."""
PICTURES = {
    "Loss": ("train/loss", "val/loss"),
    "Gradient norm": ("train/grad_norm",),
    "Learning rate": ("train/learning_rate", "optimizer/learning_rate"),
    "Positions per second": ("speed/tokens_per_second",),
}
"""Titles, and the metrics that share a picture; one without points is left out."""
MOST_POINTS = 400
"""Of a curve; a longer one is thinned, its first and last point kept."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mute: #777; --one: #2563eb; --two: #d97706;
  --prefix: #2563eb22; --middle: #16a34a40; --suffix: #d9770622; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.mute { color: var(--mute); } .scroll { overflow-x: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font-size: 13px; } .grid { stroke: var(--line); }
polyline, circle { vector-effect: non-scaling-stroke; } .key-one { color: var(--one); } .key-two { color: var(--two); }
.one { stroke: var(--one); } .two { stroke: var(--two); stroke-dasharray: 6 3; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; margin: 0; }
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
        f"<h1>{escape(name)}</h1><p class='mute'>{escape(run_dir.name)}</p>",
        _section("Summary", f"<pre class='page'>{escape(summary.strip())}</pre>" if summary else ""),
        _section("Curves", _pictures(list(read_metrics(run_dir)))),
        _section("Infilled lines", _samples(samples)),
        _section("Final numbers", _numbers(numbers)),
        _section("Versions", _facts(read_json(run_dir / PROVENANCE))),
        _section("Configuration", f"<pre class='page'>{escape(config_yaml.strip())}</pre>"),
    ]
    path = run_dir / FILE
    path.write_text(page(name, body), encoding="utf-8")
    return path


def samples_page(samples: Sequence[Sample]) -> str:
    """The infilled lines alone: prefix, middle and suffix coloured."""
    return page("Infilled lines", [_section("Infilled lines", _samples(samples))])


def page(title: str, body: Sequence[str]) -> str:
    """A whole page of one file."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    start = f"<!doctype html><html lang='en'><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    return f"{start}<body>{''.join(body)}</body></html>\n"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _numbers(numbers: Mapping[str, float]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td class='n'>{value:.6g}</td></tr>" for key, value in sorted(numbers.items()))
    return f"<div class='scroll'><table>{rows}</table></div>" if rows else ""


def _facts(tree: Mapping[str, Any]) -> str:
    """provenance.json as a table of dotted names."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in _leaves(tree) if value not in (None, "", [])
    )
    return f"<details><summary>commit, packages, machine</summary><table>{rows}</table></details>" if rows else ""


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


# ------------------------------------------------------------------------------------------------------------------ pictures


def _pictures(points: Sequence[Point]) -> str:
    drawn = [picture for title, names in PICTURES.items() if (picture := _picture(title, names, points))]
    return f"<div class='pictures'>{''.join(drawn)}</div>" if drawn else ""


def _picture(title: str, names: Sequence[str], points: Sequence[Point]) -> str:
    """A line chart by optimizer step; values that are not finite are left out and counted."""
    curves = {name: [(float(p.step), p.values[name]) for p in points if name in p.values] for name in names}
    missing = sum(not math.isfinite(y) for curve in curves.values() for _, y in curve)
    curves = {name: thinned([(x, y) for x, y in curve if math.isfinite(y)]) for name, curve in curves.items()}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return ""
    xs, ys = ([point[axis] for curve in curves.values() for point in curve] for axis in (0, 1))
    x_of, y_of = _scale(min(xs), max(xs), LEFT, WIDTH - 12), _scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    lines, key = [], []
    for style, (name, curve) in zip(("one", "two"), curves.items(), strict=False):
        places = [f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve]
        lines.append(f"<polyline class='{style}' fill='none' stroke-width='2' points='{' '.join(places)}'/>")
        if len(curve) == 1:
            lines.append(
                f"<circle class='{style}' fill='none' stroke-width='2' r='3' cx='{x_of(curve[0][0]):.1f}' cy='{y_of(curve[0][1]):.1f}'/>"
            )
        key.append(f"<span class='key-{style}'>{'—' if style == 'one' else '- -'} {escape(name)}</span>")
    label = "  ".join(key) + (f"; {missing} values were not finite" if missing else "")
    drawing = "".join(lines)
    return (f"<figure><figcaption>{escape(title)} <small>{label}</small></figcaption>"
            f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)} by optimizer step'>"
            f"{_axes(min(xs), max(xs), min(ys), max(ys), x_of, y_of)}{drawing}</svg></figure>")  # fmt: skip


def thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of the curve, evenly by position, both ends kept."""
    if len(curve) <= MOST_POINTS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """The linear map of [low, high] onto [start, end]; a single value lies in the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_of: Any, y_of: Any) -> str:
    """Grid lines with their values: the ends and thirds of each axis."""
    parts = []
    for i in range(4):
        y, x = y_low + (y_high - y_low) * i / 3, x_low + (x_high - x_low) * i / 3
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - 12}' y1='{y_of(y):.1f}' y2='{y_of(y):.1f}'/>")
        parts.append(f"<text text-anchor='end' x='{LEFT - 6}' y='{y_of(y) + 4:.1f}'>{_tick(y)}</text>")
        parts.append(f"<text text-anchor='middle' x='{min(max(x_of(x), LEFT), WIDTH - 24):.1f}' y='{HEIGHT - 26}'>{x:,.0f}</text>")
        if x_low == x_high or y_low == y_high:
            break
    return "".join([*parts, f"<text text-anchor='middle' x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 6}'>optimizer step</text>"])
