"""Tracking: where a run's numbers go besides its own folder (`tracking=…`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry, nearest

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
"""Kinds of MLflow store. `postgresql+psycopg://…` and the like are kinds with a driver. File stores are gone since MLflow 3.13."""


def check_uri(uri: str, source: str = "tracking.uri") -> None:
    """Refuse an address that no MLflow store can have; `source` is where the user wrote it."""
    scheme = re.match(r"([A-Za-z0-9]+)(\+\w+)?(://|:|$)", uri)
    kind = scheme.group(1).lower() if scheme else ""
    if kind == "databricks" or (scheme and kind in SCHEMES and scheme.group(3) == "://"):
        return
    if kind == "file" or not (scheme and scheme.group(3)):
        raise ConfigError(
            f"{source}={uri} is a folder, which MLflow no longer takes as a store; "
            f"use tracking.uri=sqlite:///{uri.removeprefix('file:').removeprefix('//').rstrip('/')}/mlflow.db"
        )
    raise ConfigError(
        f"{source}={uri} is not the address of an MLflow store.{nearest(kind, SCHEMES)} "
        f"It starts with one of {', '.join(f'{s}://' for s in SCHEMES)}; e.g. tracking.uri=http://localhost:5000"
    )


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
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of your own on the run, e.g. `+tracking.tags.team=speech`."""
    flush_seconds: float = 5.0
    """Longest time in seconds that a value is in the run folder only, before it is sent to the store."""
    exit_seconds: float = 10.0
    """Longest time in seconds that the end of a run waits for a store that does not answer. What is unsent stays in the run folder."""
    system_metrics: bool = True
    """Log processor, memory and (where there is one) GPU use, every 10 seconds."""
    log_model: bool = False
    """At the end of a run, write its model so that `mlflow models predict` infills with it, and send it: the weights once more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.flush_seconds > 0, "flush_seconds", "more than 0")
        self.require(self.exit_seconds >= 0, "exit_seconds", "0 or more")
        self.require(bool(self.experiment.strip()), "experiment", "any text that is not empty")
        if self.uri is not None:
            check_uri(self.uri)
