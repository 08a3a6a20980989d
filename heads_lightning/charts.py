"""Line charts as SVG text: sharp at any size, following a dark page, without a script and without an import worth naming."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 250, 80, 44, 12
"""Of a picture and its margins, in SVG units."""
MOST_POINTS = 400
"""Of a curve; a longer one is thinned, its first and last point kept."""
COLOURS = ("#2563eb", "#d97706", "#16a34a", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
"""Of curves, in turn; every second one is dashed, so that a print without colours tells neighbours apart."""
MUTED = "#9ca3af"
MOST_NAMED = 12
"""Curves with a colour and a name; further ones are grey, under them."""

STYLE = """
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } figcaption small { font-weight: 400; }
figcaption small span, .names span { display: inline-block; margin-right: .75rem; }
svg { width: 100%; height: auto; display: block; overflow: visible; } svg text { fill: currentColor; font-size: 13px; }
.grid { stroke: var(--line); }
polyline, circle { vector-effect: non-scaling-stroke; fill: none; stroke-width: 2; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 1rem; }
@media (max-width: 500px) { svg text { font-size: 19px; } }
@media (prefers-color-scheme: dark) { polyline, circle, figcaption span, .names span { filter: brightness(1.4); } }
"""
"""What a page that holds charts needs, beside a colour --line."""

Curve = list[tuple[float, float]]


def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, named: bool = True) -> str:
    """A figure of curves by optimizer step; nothing where there are no points.

    Args:
        title: above the picture.
        curves: (step, value) by name, the most important first. Values that are not finite are left out and counted.
        named: name the curves beside the title; otherwise `key` says once what several figures show.
    """
    missing = sum(not math.isfinite(y) for curve in curves.values() for _, y in curve)
    finite = {name: thinned([(float(x), y) for x, y in curve if math.isfinite(y)]) for name, curve in curves.items()}
    if not any(finite.values()):
        return ""
    xs, ys = ([point[axis] for curve in finite.values() for point in curve] for axis in (0, 1))
    x_of, y_of = _scale(min(xs), max(xs), LEFT, WIDTH - 12), _scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    drawing = "".join(_line(number, curve, x_of, y_of) for number, curve in reversed(list(enumerate(finite.values()))) if curve)
    said = _names([name if curve else "" for name, curve in finite.items()]) if named else ""
    said += f"<span>{missing} values were not finite</span>" if missing else ""
    return (
        f"<figure><figcaption>{escape(title)} <small>{said}</small></figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)} by optimizer step'>"
        f"{_axes(min(xs), max(xs), min(ys), max(ys), x_of, y_of)}{drawing}</svg></figure>"
    )


def key(names: Sequence[str]) -> str:
    """Names of curves in their colours, for figures that show the same ones."""
    return f"<p class='names'><small>{_names(names)}</small></p>"


def _names(names: Sequence[str]) -> str:
    """A name keeps its place, and so its colour, also where another one has no curve."""
    shown = [f"<span style='color:{_colour(i)}'>{_dash(i)} {escape(name)}</span>" for i, name in enumerate(names[:MOST_NAMED]) if name]
    return "".join(shown) + (f"<span>and {len(names) - MOST_NAMED} more</span>" if len(names) > MOST_NAMED else "")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)] if number < MOST_NAMED else MUTED


def _dash(number: int) -> str:
    return "- -" if number % 2 else "—"


def _line(number: int, curve: Curve, x_of: Any, y_of: Any) -> str:
    """A curve; a single point as a circle."""
    stroke = f"stroke='{_colour(number)}'" + (" stroke-dasharray='6 3'" if number % 2 else "")
    places = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in curve]
    if len(places) == 1:
        return f"<circle {stroke} r='3' cx='{places[0][0]}' cy='{places[0][1]}'/>"
    return f"<polyline {stroke} points='{' '.join(','.join(place) for place in places)}'/>"


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS of the curve, evenly by position, both ends kept."""
    if len(curve) <= MOST_POINTS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """The linear map of [low, high] onto [start, end]; a single value lies in the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high == low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(power * factor for factor in (1, 2, 5) if power * factor <= (high - low) / 3 * (1 + 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _axes(x_low: float, x_high: float, y_low: float, y_high: float, x_of: Any, y_of: Any) -> str:
    """Grid lines with their values, which are round."""
    parts = []
    for y in _ticks(y_low, y_high):
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - 12}' y1='{y_of(y):.1f}' y2='{y_of(y):.1f}'/>")
        parts.append(f"<text text-anchor='end' x='{LEFT - 6}' y='{y_of(y) + 4:.1f}'>{_tick(y)}</text>")
    for x in (tick for tick in _ticks(x_low, x_high) if tick == round(tick)):  # steps are whole
        parts.append(f"<text text-anchor='middle' x='{min(max(x_of(x), LEFT), WIDTH - 24):.1f}' y='{HEIGHT - 26}'>{x:,.0f}</text>")
    return "".join([*parts, f"<text text-anchor='middle' x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 6}'>optimizer step</text>"])
