"""Tracking: where a run's numbers go besides its own folder (`tracking=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import Registry


@dataclass
class TrackingConfig(Option):
    """Base of every tracker. The run folder's metrics.jsonl is always written."""

    group: ClassVar[str] = "tracking"

    name: str = ""


trackers: Registry[TrackingConfig] = Registry("tracking", TrackingConfig)


@trackers.register("none")
@dataclass
class NoTrackingConfig(TrackingConfig):
    """The run folder alone."""

    name: str = "none"


@trackers.register("mlflow")
@dataclass
class MLflowConfig(TrackingConfig):
    """MLflow: an embedded SQLite store beside the runs, or any tracking server."""

    name: str = "mlflow"
    uri: str | None = None
    """Store, e.g. http://host:5000. None: $MLFLOW_TRACKING_URI, else sqlite in RUN_ROOT/mlflow.db with artifacts beside it."""
    experiment: str = "heads_lightning"
    """MLflow experiment that the run belongs to."""
    flush_seconds: float = 5.0
    """Longest time that a logged value waits in memory before it is sent."""
    system_metrics: bool = True
    """Log processor, memory and (where there is one) GPU use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.flush_seconds > 0, "flush_seconds", "more than 0")
