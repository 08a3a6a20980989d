"""How a run asked to be copied to MLflow: the newest `open` record of its folder."""

from pathlib import Path
from typing import NamedTuple

from heads_lightning.registry import ConfigError
from heads_lightning.tracking.mlflow_store import Store
from heads_lightning.tracking.run_folder import EVENTS, read_records


class Header(NamedTuple):
    """What the record says."""

    uri: str | None
    """Store without password; None where the run was not tracked."""
    artifacts: str | None
    experiment: str
    name: str
    parent: str | None
    """MLflow run id or run folder of the run that this one is a part of."""
    started: float
    flush_seconds: float
    exit_seconds: float
    system_metrics: bool
    first_step: int = 0
    """Optimizer steps that were done when the record was written."""

    @property
    def store(self) -> Store:
        """Where to send.

        Raises:
            ConfigError: the run was not tracked, or its address had a password, which no folder keeps.
        """
        if self.uri is None:
            raise ConfigError("this run was not tracked by MLflow; name a store, e.g. uri=sqlite:///runs/mlflow.db")
        if ":***@" in self.uri:
            raise ConfigError(f"the password of {self.uri} is not kept in run folders; give the full address, e.g. --uri=ADDRESS")
        return Store(uri=self.uri, artifacts=self.artifacts)


def read_header(run_dir: Path) -> Header:
    """Header of a run folder."""
    opened = [record for record in read_records(run_dir / EVENTS) if record.get("kind") == "open"]
    if not opened:
        raise ConfigError(f"{run_dir} is not the folder of a run: it has no {EVENTS}")
    return Header(started=opened[0]["time"], **{k: opened[-1][k] for k in Header._fields if k in opened[-1]})
