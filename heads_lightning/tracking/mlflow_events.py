"""The records of tracking.jsonl as MLflow keeps them: tags, parameters, files, datasets, models."""

import json
from pathlib import Path
from typing import Any

from heads_lightning.tracking.mlflow_calls import ITEMS_PER_BATCH, Calls, Refused
from heads_lightning.tracking.mlflow_limits import MAX_DATASET_NAME, MAX_PARAM, allowed_name, cut

STEP_TAG = "step"
"""Optimizer steps that a model was trained for."""


def send_event(calls: Calls, record: dict[str, Any]) -> None:
    """Send one record; those that only open or finish a run say nothing here."""
    kind = record.get("kind")
    if kind == "tags":
        calls.set_tags(record["tags"])
    elif kind == "params":
        _send_params(calls, record["params"])
    elif kind == "file":
        _send_file(calls, record["path"], record["folder"])
    elif kind == "datasets":
        _send_datasets(calls, record["datasets"])
    elif kind == "model":
        _send_model(calls, Path(record["path"]), record["step"])


def _send_params(calls: Calls, params: dict[str, str]) -> None:
    from mlflow.entities import Param

    wanted = [Param(allowed_name(k), cut(v, MAX_PARAM)) for k, v in params.items()]
    for i in range(0, len(wanted), ITEMS_PER_BATCH):
        calls.batch(params=wanted[i : i + ITEMS_PER_BATCH])


def _send_file(calls: Calls, name: str, folder: str) -> None:
    path = calls.run_dir / name  # an absolute path stands for itself
    if not path.exists():
        calls.tell_once(f"{path} was to be sent to MLflow but is gone")
        return
    try:
        calls.call(calls.client.log_artifact, calls.run_id, str(path), folder or None)
    except Refused as error:
        calls.tell_once(f"MLflow refuses the file {path}: {error}")


def _send_datasets(calls: Calls, datasets: list[dict[str, Any]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for fact in datasets:
        source, profile = json.dumps(fact["source"]), json.dumps(fact["profile"])
        dataset = Dataset(cut(fact["name"], MAX_DATASET_NAME), fact["digest"], fact["source_type"], source, profile=profile)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", fact["context"])]))
    try:
        calls.call(calls.client.log_inputs, calls.run_id, inputs)
    except Refused as error:
        calls.tell_once(f"MLflow refuses the run's datasets: {error}")


def _send_model(calls: Calls, folder: Path, step: int) -> None:
    """A model of the run's experiment, with the run as its source; plain files of the run where a server knows no such models."""
    if not folder.is_dir():
        calls.tell_once(f"{folder} was to be sent to MLflow but is gone")
        return
    try:
        model_id = calls.call(_model_id, calls, step)
        calls.call(calls.client.log_model_artifacts, model_id, str(folder))
        calls.call(calls.client.finalize_logged_model, model_id, "READY")
    except Refused as error:
        calls.tell_once(f"MLflow takes no models ({error}); {folder.name} is sent as files of the run")
        _send_file(calls, str(folder), "")


def _model_id(calls: Calls, step: int) -> str:
    """The run's model of that step; one that was begun before a crash is gone on with."""
    from mlflow.entities import LoggedModelOutput

    client, run_id = calls.client, calls.run_id
    for model in client.search_logged_models([calls.experiment_id], f"source_run_id = '{run_id}'"):
        if model.tags.get(STEP_TAG) == str(step):
            return model.model_id
    model = client.create_logged_model(calls.experiment_id, "model", run_id, {STEP_TAG: str(step)}, model_type="text")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    return model.model_id
