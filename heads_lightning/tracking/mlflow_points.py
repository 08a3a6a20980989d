"""A run's points as MLflow's metrics: names that it takes, numbers that are finite."""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from heads_lightning.tracking.mlflow_calls import Calls
from heads_lightning.tracking.mlflow_limits import MAX_KEY, allowed_name
from heads_lightning.tracking.run_folder import Point, point_from_record

if TYPE_CHECKING:
    from mlflow.entities import Metric

VALUES_PER_BATCH = 1000
"""Metrics in a call: MLflow's limit."""


class Points:
    """Sends points to the run of `calls`."""

    def __init__(self, calls: Calls, nonfinite: dict[str, dict[str, Any]]) -> None:
        self.last_step = 0
        """Newest optimizer step seen, for values that are logged by time."""
        self._calls = calls
        self._nonfinite = nonfinite
        """By metric: how many values were not finite, and the first of them."""
        self._names: dict[str, str] = {}

    def send(self, records: Iterable[dict[str, Any]], progress: Callable[[], None]) -> int:
        """Send the points of these records; returns the number of values. `progress` is called after every answer of the store."""
        points = [point_from_record(record) for record in records]
        values = [value for point in points for value in self._values(point)]
        for i in range(0, len(values), VALUES_PER_BATCH):
            self._calls.batch(metrics=values[i : i + VALUES_PER_BATCH])
            progress()
        self._tag_nonfinite(points)
        return len(values)

    def _values(self, point: Point) -> "list[Metric]":
        """The finite ones of a point: stores turn infinity into 1.8e308 and lose NaN."""
        from mlflow.entities import Metric

        self.last_step = max(self.last_step, point.step)
        when = int(point.time * 1000)
        values = [Metric(self._name(name), value, when, point.step) for name, value in point.values.items() if math.isfinite(value)]
        if point.tokens is not None:
            values.append(Metric("tokens", float(point.tokens), when, point.step))
        return values

    def _tag_nonfinite(self, points: list[Point]) -> None:
        """Count the others in a tag. They are counted once the store has taken it: these points come again where it has not."""
        counted = {name: dict(seen) for name, seen in self._nonfinite.items()}
        for point in points:
            for name, value in point.values.items():
                if not math.isfinite(value):
                    seen = counted.setdefault(name, {"count": 0, "first_step": point.step, "first_value": str(value)})
                    seen["count"] += 1
        if counted != self._nonfinite:
            self._calls.set_tags({f"nonfinite.{name}": _told(seen) for name, seen in counted.items()})
            self._nonfinite.update(counted)

    def _name(self, name: str) -> str:
        """A name that MLflow takes; two names that would become one are told apart."""
        if name not in self._names:
            key = allowed_name(name)
            if key in self._names.values():
                key = allowed_name(f"{key[: MAX_KEY - 9]}_{zlib.crc32(name.encode()):08x}")
            if key != name:
                self._calls.tell_once(f"MLflow cannot hold the metric name {name!r}; there it is called {key!r}")
            self._names[name] = key
        return self._names[name]


def _told(seen: dict[str, Any]) -> str:
    return f"{seen['count']} values; the first at step {seen['first_step']}: {seen['first_value']}"
