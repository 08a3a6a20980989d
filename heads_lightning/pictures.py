"""The pictures of a run, drawn at its end from what its folder records: loss, loss by part, gradient norms, reliability of values.

A picture without points is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heads_lightning.losses.value import ValueStatistics
from heads_lightning.tracking.run_folder import Point, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from heads_lightning.tracking.open_run import RunLog

LOSS, PARTS, GRADIENTS, RELIABILITY = "loss.png", "loss_parts.png", "gradients.png", "reliability.png"
FEW_POINTS = 40
"""A curve of fewer shows each of them."""


def draw(log: RunLog, *, parts: Sequence[str], unit: str, statistics: Sequence[float] = ()) -> None:
    """Draw every picture that has something to show.

    Args:
        log: the run; its folder is read.
        parts: of the objective, as in val/loss_PART.
        unit: of the loss.
        statistics: of a value head, over the latest validation.
    """
    points = list(read_metrics(log.run_dir))
    pictures = {LOSS: loss(points, unit), PARTS: loss_by_part(points, parts, unit), GRADIENTS: gradients(points)}
    if statistics:
        pictures[RELIABILITY] = reliability(statistics, log.run_dir.parent.name)
    for name, figure in pictures.items():
        if figure is not None:
            log.log_figure(name, figure)


def loss(points: Sequence[Point], unit: str) -> Figure | None:
    """Training and held-out loss by optimizer step."""
    return _curves(points, {"train/loss": "training", "val/loss": "held out"}, unit)


def loss_by_part(points: Sequence[Point], parts: Sequence[str], unit: str) -> Figure | None:
    """Held-out loss of each part of the objective (left to right, infill, the parts of a mixture)."""
    return _curves(points, {f"val/loss_{part}": part.replace("_", " ") for part in parts}, f"held-out {unit}") if len(parts) > 1 else None


def gradients(points: Sequence[Point]) -> Figure | None:
    """Norm of the gradient before clipping, on a logarithmic axis, and the learning rate below it."""
    norms = _curve(points, "train/grad_norm")
    if not norms:
        return None
    figure = _figure()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _plot(above, norms, "gradient norm")
    above.set(ylabel="gradient norm before clipping")
    if min(y for _, y in norms) > 0:
        above.set_yscale("log")
    _plot(below, _curve(points, "train/learning_rate"), "learning rate")
    below.set(xlabel="optimizer step", ylabel="learning rate")
    return figure


def reliability(statistics: Sequence[float], name: str) -> Figure | None:
    """Mean held-out target by predicted value, with the number of targets in each bin below."""
    bins = ValueStatistics.from_vector(list(statistics))
    filled = [i for i, count in enumerate(bins.bin_count) if count]
    if not filled:
        return None
    predicted = [bins.bin_predicted[i] / bins.bin_count[i] for i in filled]
    figure = _figure((5, 5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    ends = [min(predicted), max(predicted)]
    above.plot(ends, ends, color="0.7", label="calibrated")
    above.plot(predicted, [bins.bin_target[i] / bins.bin_count[i] for i in filled], marker="o", label=name)
    above.set(ylabel="mean target")
    above.legend()
    below.bar(predicted, [bins.bin_count[i] for i in filled], width=0.6 * (ends[1] - ends[0]) / max(len(filled), 1) or 0.1)
    below.set(xlabel="predicted value", ylabel="targets")
    return figure


def _figure(size: tuple[float, float] = (7, 4)) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _curves(points: Sequence[Point], labels: dict[str, str], ylabel: str) -> Figure | None:
    drawn = {label: curve for name, label in labels.items() if (curve := _curve(points, name))}
    if not drawn:
        return None
    figure = _figure()
    axes = figure.subplots()
    for label, curve in drawn.items():
        _plot(axes, curve, label)
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend()
    return figure


def _curve(points: Sequence[Point], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, where it is finite."""
    return [(point.step, point.values[name]) for point in points if math.isfinite(point.values.get(name, math.nan))]


def _plot(axes: Axes, curve: Sequence[tuple[int, float]], label: str) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), label=label, marker="o" if len(curve) < FEW_POINTS else None, markersize=3)
    axes.grid(alpha=0.3)
