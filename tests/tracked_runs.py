"""What the tests of runs in MLflow stores share."""

import time
from pathlib import Path
from typing import Any

from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.mlflow_opening import connect
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.open_run import RunLog, open_run


def open_tracked(root: Path, name: str = "run", **options: Any) -> RunLog:
    config = options.pop("config", None) or MLflowConfig(flush_seconds=0.5, exit_seconds=1.0)
    arguments = {"run_dir": root / name, "config_flat": {"seed": "0"}, "config_yaml": "seed: 0\n"} | options
    return open_run(config, run_root=root, name=name, **arguments)


def client_of(root: Path) -> Any:
    return connect(resolve_store(MLflowConfig(), root, {}))


def runs(client: Any, experiment: str = "heads_lightning") -> dict[str, Any]:
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])} if found else {}


def steps(client: Any, run_id: str, name: str = "loss") -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
