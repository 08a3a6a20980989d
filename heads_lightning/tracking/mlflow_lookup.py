"""Runs of a store, looked up from outside: the folder of one, and those whose process is gone."""

import time
from pathlib import Path

from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.mlflow_opening import connect, short_timeouts
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.run_folder import SIDECAR, read_json

RUN_DIR_TAG = "run_dir"
HEARTBEAT_TAG = "heartbeat"


def find_run_dir(run_id: str, run_root: Path, *, uri: str | None = None) -> Path | None:
    """The folder of an MLflow run: by the sidecar files below `run_root`, else by the tag that the run carries in its store.

    MLflow is asked (and imported) only when no sidecar names the run, and only where a store exists.
    """
    for sidecar in run_root.rglob(SIDECAR) if run_root.is_dir() else ():
        if read_json(sidecar).get("run_id") == run_id:
            return sidecar.parent
    store = resolve_store(MLflowConfig(uri=uri), run_root)
    if store.database is not None and not store.database.exists():
        return None
    from mlflow.exceptions import MlflowException

    with short_timeouts():
        try:
            tagged = connect(store).get_run(run_id).data.tags.get(RUN_DIR_TAG, "")
        except MlflowException:
            return None
    return Path(tagged) if tagged and Path(tagged).is_dir() else None


def reap(run_root: Path, *, uri: str | None = None, experiment: str = "heads_lightning", silent_seconds: float = 120.0) -> list[str]:
    """Mark as KILLED the runs that say RUNNING but have not given a sign for `silent_seconds` (a machine that died); returns their ids."""
    store = resolve_store(MLflowConfig(uri=uri), run_root)
    client = connect(store)
    found = client.get_experiment_by_name(experiment)
    reaped = []
    for run in client.search_runs([found.experiment_id], "attributes.status = 'RUNNING'", max_results=1000) if found else ():
        last = float(run.data.tags.get(HEARTBEAT_TAG, "nan"))
        if time.time() - last > silent_seconds:  # a run without the tag is not ours: NaN compares false
            client.set_tag(run.info.run_id, "ended", "no sign of life: reaped")
            client.set_terminated(run.info.run_id, "KILLED", end_time=int(last * 1000))
            reaped.append(run.info.run_id)
    return reaped
