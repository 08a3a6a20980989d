"""One MLflow run as the copy of one run folder: creating or finding it, and sending what the folder holds and the run does not.

Each record of the folder is sent once: the offset behind the last record that the store took is kept in mlflow_sent.json. A store that
does not answer raises NotSent and nothing moves; a value that the store refuses for good is named, left out and does not block the rest.
"""

import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from heads_lightning.registry import ConfigError
from heads_lightning.training.mlflow_limits import MAX_DATASET_NAME, MAX_KEY, MAX_PARAM, MAX_TAG, allowed_name, cut
from heads_lightning.training.mlflow_store import HEARTBEAT_TAG, RUN_DIR_TAG, Store, connect, experiment_id, file_lock
from heads_lightning.training.run_folder import (
    EVENTS,
    METRICS,
    SENT,
    SIDECAR,
    SYSTEM,
    point_from_record,
    read_json,
    read_lines,
    read_records,
    write_json,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
FINAL = ("INVALID_PARAMETER_VALUE", "ENDPOINT_NOT_FOUND")
"""Errors of MLflow that another try does not change."""
STEP_TAG = "step"
"""Optimizer steps that a model was trained for."""


class NotSent(Exception):
    """The store did not take something now; it may later."""


class Refused(Exception):
    """The store will never take it."""


class Header(NamedTuple):
    """How a run asked to be copied: its newest `open` record."""

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

    @property
    def store(self) -> Store:
        """Where to send."""
        if self.uri is None:
            raise ConfigError("this run was not tracked by MLflow; name a store, e.g. uri=sqlite:///runs/mlflow.db")
        return Store(uri=self.uri, artifacts=self.artifacts)


def read_header(run_dir: Path) -> Header:
    """Header of a run folder."""
    opened = [record for record in read_records(run_dir / EVENTS) if record.get("kind") == "open"]
    if not opened:
        raise ConfigError(f"{run_dir} is not the folder of a run: it has no {EVENTS}")
    return Header(started=opened[0]["time"], **{k: opened[-1][k] for k in Header._fields if k != "started"})


class Unsent(NamedTuple):
    """What the folder holds and the store does not."""

    values: int
    records: int
    """Parameters, tags, files and the final status."""


class MlflowRun:
    """The copy. `say(text)` is called with what the user should know."""

    def __init__(self, run_dir: Path, *, store: Store, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.header = read_header(run_dir)
        self.store = store
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.last_step = 0
        """Newest optimizer step seen, for values that are logged by time."""
        self._say = say
        self._said: set[str] = set()
        self._client: MlflowClient | None = None
        self._sent: dict[str, Any] = {}
        self._names: dict[str, str] = {}

    def attach(self, *, live: bool) -> None:
        """Connect and find or create the run; `live` says that training goes on, so that the run shows as RUNNING."""
        client = self._call(connect, self.store)
        self._client = client
        self.run_id, self.experiment_id = self._call(self._find_or_create, client, self.run_dir, self.header)
        self._sent = read_json(self.run_dir / SENT)
        if self._sent.get("run_id") != self.run_id:
            self._sent = {"run_id": self.run_id, "offsets": {}, "nonfinite": {}}
        if live:
            self._call(client.update_run, self.run_id, status="RUNNING")
            self.set_tags({RUN_DIR_TAG: str(self.run_dir)})
            self.heartbeat()

    def _find_or_create(self, client: "MlflowClient", run_dir: Path, header: Header) -> tuple[str, str]:
        """(run id, experiment id) of the copy of `run_dir`; one process at a time, so that there is one copy."""
        with file_lock(run_dir / f".{SIDECAR}.lock"):
            sidecar = read_json(run_dir / SIDECAR)
            found = _existing(client, sidecar.get("run_id"))
            if found is not None:
                return found
            experiment = experiment_id(client, self.store, header.experiment)
            tags = {RUN_DIR_TAG: str(run_dir)}
            if header.parent:
                tags["mlflow.parentRunId"] = self._parent_id(client, header.parent)
            run = client.create_run(experiment, start_time=int(header.started * 1000), tags=tags, run_name=header.name)
            facts = {"run_id": run.info.run_id, "experiment_id": experiment, "experiment": header.experiment}
            write_json(run_dir / SIDECAR, {**facts, "uri": self.store.shown})
            return run.info.run_id, experiment

    def _parent_id(self, client: "MlflowClient", parent: str) -> str:
        """A parent may be named by its folder: whichever of its children comes first creates its run."""
        folder = Path(parent)
        return self._find_or_create(client, folder, read_header(folder))[0] if (folder / EVENTS).exists() else parent

    def send(self, progress: Callable[[], None] = lambda: None) -> int:
        """Send everything new; returns the number of values. `progress` is called after every answer of the store."""
        self._send_events(progress)
        return self._send_points(METRICS, progress) + self._send_points(SYSTEM, progress)

    def close(self, *, default: str) -> None:
        """Give the run the status that its folder records, or `default` where it does not say (training was killed)."""
        ending = self._ending()
        status, when = ending or (default, time.time())
        if ending is None:
            self.set_tags({"ended": "the process disappeared without closing its run"})
        assert self._client is not None
        if status in ("RUNNING", "SCHEDULED"):  # handed to a scheduler that starts it again: not an end
            self._call(self._client.update_run, self.run_id, status=status)
        else:
            self._call(self._client.set_terminated, self.run_id, status, int(when * 1000))

    def _ending(self) -> tuple[str, float] | None:
        """(status, time) of the end that the folder records, by this process or an earlier one; a run that was resumed since has none."""
        ending = None
        for record in read_records(self.run_dir / EVENTS):
            if record.get("kind") in ("open", "finish"):
                ending = (record["status"], record["time"]) if record["kind"] == "finish" else None
        return ending

    def heartbeat(self) -> None:
        """A sign of life, for `reap`."""
        self.set_tags({HEARTBEAT_TAG: f"{time.time():.0f}"})

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags; long values are cut, visibly."""
        from mlflow.entities import RunTag

        wanted = [RunTag(allowed_name(k), cut(str(v), MAX_TAG)) for k, v in tags.items()]
        for i in range(0, len(wanted), PARAMS_PER_BATCH):
            self._batch(tags=wanted[i : i + PARAMS_PER_BATCH])

    def unsent(self) -> Unsent:
        """Count what is left to send."""
        offsets = self._sent.get("offsets", read_json(self.run_dir / SENT).get("offsets", {}))
        values = sum(_count(self.run_dir / name, offsets.get(name, 0), lambda r: len(r["values"])) for name in (METRICS, SYSTEM))
        return Unsent(values=values, records=_count(self.run_dir / EVENTS, offsets.get(EVENTS, 0), lambda r: 1))

    # Points

    def _send_points(self, file: str, progress: Callable[[], None]) -> int:
        count = 0
        while True:
            offset = self._sent["offsets"].get(file, 0)
            lines = read_lines(self.run_dir / file, offset)
            if lines.end == offset:
                return count
            metrics = [metric for record, _ in lines.records for metric in self._metrics(record)]
            for i in range(0, len(metrics), METRICS_PER_BATCH):
                self._batch(metrics=metrics[i : i + METRICS_PER_BATCH])
                progress()
            self._tag_nonfinite()
            self._keep_offset(file, lines.end)
            count += len(metrics)

    def _metrics(self, record: dict[str, Any]) -> list["Metric"]:
        """MLflow's form of a point. Values that are not finite are counted in a tag: stores turn infinity into 1.8e308 and lose NaN."""
        from mlflow.entities import Metric

        point = point_from_record(record)
        self.last_step = max(self.last_step, point.step)
        when = int(point.time * 1000)
        metrics = []
        for name, value in point.values.items():
            if math.isfinite(value):
                metrics.append(Metric(self._metric_name(name), value, when, point.step))
            else:
                seen = self._sent["nonfinite"].setdefault(name, {"count": 0, "first_step": point.step, "first_value": str(value)})
                seen["count"] += 1
        if point.tokens is not None:
            metrics.append(Metric("tokens", float(point.tokens), when, point.step))
        return metrics

    def _tag_nonfinite(self) -> None:
        seen = self._sent["nonfinite"]
        tags = {f"nonfinite.{k}": f"{v['count']} values; the first at step {v['first_step']}: {v['first_value']}" for k, v in seen.items()}
        if tags:
            self.set_tags(tags)

    def _metric_name(self, name: str) -> str:
        """A name that MLflow takes; two names that would become one are told apart."""
        if name not in self._names:
            key = allowed_name(name)
            if key in self._names.values():
                key = allowed_name(f"{key[: MAX_KEY - 9]}_{zlib.crc32(name.encode()):08x}")
            if key != name:
                self._tell_once(f"MLflow cannot hold the metric name {name!r}; there it is called {key!r}")
            self._names[name] = key
        return self._names[name]

    # Everything else

    def _send_events(self, progress: Callable[[], None]) -> None:
        while True:
            offset = self._sent["offsets"].get(EVENTS, 0)
            lines = read_lines(self.run_dir / EVENTS, offset)
            if lines.end == offset:
                return
            for record, end in lines.records:
                self._send_event(record)
                self._keep_offset(EVENTS, end)
                progress()
            self._keep_offset(EVENTS, lines.end)

    def _send_event(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        if kind == "tags":
            self.set_tags(record["tags"])
        elif kind == "params":
            self._send_params(record["params"])
        elif kind == "file":
            self._send_file(record)
        elif kind == "datasets":
            self._send_datasets(record["datasets"])
        elif kind == "model":
            self._send_model(Path(record["path"]), record["step"])

    def _send_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        wanted = [Param(allowed_name(k), cut(v, MAX_PARAM)) for k, v in params.items()]
        for i in range(0, len(wanted), PARAMS_PER_BATCH):
            self._batch(params=wanted[i : i + PARAMS_PER_BATCH])

    def _send_file(self, record: dict[str, Any]) -> None:
        path = self.run_dir / record["path"]  # an absolute path stands for itself
        if not path.exists():
            self._tell_once(f"{path} was to be sent to MLflow but is gone")
            return
        assert self._client is not None
        try:
            self._call(self._client.log_artifact, self.run_id, str(path), record["folder"] or None)
        except Refused as error:
            self._tell_once(f"MLflow refuses the file {path}: {error}")

    def _send_datasets(self, datasets: list[dict[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for fact in datasets:
            source, profile = json.dumps(fact["source"]), json.dumps(fact["profile"])
            dataset = Dataset(cut(fact["name"], MAX_DATASET_NAME), fact["digest"], fact["source_type"], source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", fact["context"])]))
        assert self._client is not None
        try:
            self._call(self._client.log_inputs, self.run_id, inputs)
        except Refused as error:
            self._tell_once(f"MLflow refuses the run's datasets: {error}")

    def _send_model(self, folder: Path, step: int) -> None:
        """A model of the run's experiment, with the run as its source; plain files of the run where a server knows no such models."""
        if not folder.is_dir():
            self._tell_once(f"{folder} was to be sent to MLflow but is gone")
            return
        assert self._client is not None
        client = self._client
        try:
            model_id = self._call(self._model_id, client, step)
            self._call(client.log_model_artifacts, model_id, str(folder))
            self._call(client.finalize_logged_model, model_id, "READY")
        except Refused as error:
            self._tell_once(f"MLflow takes no models ({error}); {folder.name} is sent as files of the run")
            self._send_file({"path": str(folder), "folder": ""})

    def _model_id(self, client: "MlflowClient", step: int) -> str:
        """The run's model of that step; one that was begun before a crash is gone on with."""
        from mlflow.entities import LoggedModelOutput

        assert self.run_id is not None
        assert self.experiment_id is not None
        begun = client.search_logged_models([self.experiment_id], f"source_run_id = '{self.run_id}'")
        for model in begun:
            if model.tags.get(STEP_TAG) == str(step):
                return model.model_id
        model = client.create_logged_model(self.experiment_id, "model", self.run_id, {STEP_TAG: str(step)}, model_type="text")
        client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id

    # The store

    def _batch(self, **items: Any) -> None:
        assert self._client is not None
        try:
            self._call(self._client.log_batch, self.run_id, **items)
        except Refused as error:
            if self._call(self._client.get_run, self.run_id).info.lifecycle_stage == "deleted":
                raise NotSent("the run was deleted in MLflow; restored there, it goes on") from None
            what = ", ".join(f"{len(v)} {k}" for k, v in items.items())
            self._tell_once(f"MLflow refuses {what} ({error}); they stay in {self.run_dir}")

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call MLflow; its many kinds of failure become two."""
        try:
            return function(*arguments, **options)
        except (NotSent, Refused):
            raise
        except ConfigError as error:
            raise NotSent(str(error)) from error
        except Exception as error:  # clients of databases, HTTP and object stores each raise their own
            if getattr(error, "error_code", "") in FINAL:
                raise Refused(self.store.hide_password(_reason(error))) from error
            raise NotSent(self.store.hide_password(_reason(error))) from error

    def _keep_offset(self, file: str, offset: int) -> None:
        self._sent["offsets"][file] = offset
        try:
            write_json(self.run_dir / SENT, self._sent)
        except OSError as error:  # a full disk: what is sent again is not stored twice
            self._tell_once(f"{self.run_dir / SENT} cannot be written ({error})")

    def _tell_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


def _existing(client: "MlflowClient", run_id: str | None) -> tuple[str, str] | None:
    """(run id, experiment id) where the store has that run; one that was deleted is restored, since somebody goes on with it."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the folder was moved to another store
            return None
        raise
    if run.info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
    return run_id, run.info.experiment_id


def _count(path: Path, offset: int, weigh: Callable[[dict[str, Any]], int]) -> int:
    total = 0
    while True:
        lines = read_lines(path, offset, max_bytes=1 << 20)
        if lines.end == offset:
            return total
        total += sum(weigh(record) for record, _ in lines.records)
        offset = lines.end


def _reason(error: BaseException) -> str:
    """One line of what may be a page."""
    text = str(error) or type(error).__name__
    if "Connection refused" in text:
        return "connection refused"
    if "timed out" in text or "timeout" in text.lower():
        return "no answer in time"
    return cut(text.strip().splitlines()[0], 300)


def stored_address(store: Store) -> Store:
    """The header's own store, unless its address was written without its password."""
    if ":***@" in store.uri:
        raise ConfigError(f"the password of {store.uri} is not kept in run folders; give the full address, e.g. --uri=ADDRESS")
    return store
