"""A run's record: what is logged, where it is, and how the run ended.

    with open_run(config.tracking, run_dir=..., run_root=..., name=..., config_flat=..., config_yaml=...) as log:
        log.log_metrics({"train/loss": 2.31}, step=10, tokens=40960)

Three choices. The run folder is the truth and is written at once, line by line; MLflow is a copy that a process of its own keeps up to
date (`mlflow_sync.py`), so a step pays for a few microseconds of JSON whatever the store does. The run is opened before the model is
built and closed exactly once, with the status that is true: FINISHED, FAILED for an exception, KILLED for Ctrl-C, SIGTERM and a process
that disappeared. And one process tracks: every other rank gets a `NullRunLog` that takes the same calls.

Nothing here imports MLflow, Lightning or torch.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from heads_lightning.configs.tracking import MLflowConfig, TrackingConfig
from heads_lightning.registry import ConfigError
from heads_lightning.tracking import provenance
from heads_lightning.tracking.mlflow_lookup import find_run_dir, reap
from heads_lightning.tracking.mlflow_store import Store, resolve_store, ui_command
from heads_lightning.tracking.mlflow_sync import send_later
from heads_lightning.tracking.process import Status, is_first_rank, is_there, status_of
from heads_lightning.tracking.run_folder import (
    ARTIFACTS,
    CONFIG,
    DIFF,
    EVENTS,
    METRICS,
    PROVENANCE,
    Dataset,
    JsonLines,
    Point,
    event,
    point_record,
    read_metrics,
    read_records,
    write_json,
)
from heads_lightning.tracking.run_log import NullRunLog, RunLog
from heads_lightning.tracking.sender_process import SenderProcess, start_ahead

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


class FolderRunLog(RunLog):
    """Records in the run folder; with a store, a sender process copies the folder to MLflow."""

    def __init__(self, run_dir: Path, *, store: Store | None, resume: bool) -> None:
        self.run_dir = run_dir
        self.uri = store.shown if store else None
        self._store = store
        self._owner = os.getpid()
        self._status: Status | None = None
        self._stored = last_steps(run_dir) if resume else {}
        self._metrics = JsonLines(run_dir / METRICS)
        self._events = JsonLines(run_dir / EVENTS)
        self._sender: SenderProcess | None = None
        self._background: list[threading.Thread] = []

    @property
    def run_id(self) -> str | None:  # type: ignore[override]
        return self._sender.run_id if self._sender else None

    def start(self) -> None:
        """Record where the run comes from and begin to copy; both beside the caller, who goes on at once."""
        thread = threading.Thread(target=self._record_provenance, daemon=True)
        thread.start()
        self._background.append(thread)
        if self._store is not None:
            self._sender = SenderProcess(self.run_dir, uri=self._store.uri)

    def record(self, kind: str, **facts: Any) -> None:
        """Append to tracking.jsonl."""
        self._events.append(event(kind, **facts))

    def log_metrics(self, values: Mapping[str, Any], *, step: int, tokens: int | None = None) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if self._stored:  # resumed: steps between the checkpoint and the end of the record were logged before
            numbers = {name: value for name, value in numbers.items() if step > self._stored.get(name, -1)}
        if numbers and self._status is None:
            self._metrics.append(point_record(Point(step=step, tokens=tokens, time=time.time(), values=numbers)))

    def log_text(self, name: str, text: str) -> None:
        path = self._artifact(name)
        path.write_text(text, encoding="utf-8")
        self._record_artifact(path)

    def log_file(self, path: Path, *, folder: str = "") -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} is to be recorded with the run but does not exist")
        self.record("file", path=str(path.resolve()), folder=folder)

    def log_figure(self, name: str, figure: "Figure") -> None:
        path = self._artifact(name)
        figure.savefig(path)
        self._record_artifact(path)

    def log_table(self, name: str, *, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        path = self._artifact(name)
        path.write_text(json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}), encoding="utf-8")
        self._record_artifact(path)

    def log_datasets(self, datasets: Sequence[Dataset]) -> None:
        self.record("datasets", datasets=[dataset._asdict() for dataset in datasets])

    def log_model(self, folder: Path, *, step: int) -> None:
        self.record("model", path=str(folder.resolve()), step=step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.record("tags", tags={str(k): str(v) for k, v in tags.items()})

    def flush(self) -> None:
        self._metrics.sync()
        self._events.sync()
        if self._sender:
            self._sender.wake()

    def finish(self, status: Status = "FINISHED") -> None:
        if self._status is not None or os.getpid() != self._owner:  # a forked data worker does not end the run
            return
        self._status = status
        for thread in self._background:
            thread.join(timeout=30)
        self.record("finish", status=status)
        self._metrics.sync()
        self._metrics.close()
        self._events.close()
        if self._sender:
            self._sender.close()

    def wait_for_run_id(self, seconds: float) -> str | None:
        if self._sender:
            self._sender.attached.wait(seconds)
        return self.run_id

    def ui_command(self) -> str | None:
        if self._store is None or self._sender is None:
            return None
        return ui_command(self._store, experiment_id=self._sender.experiment_id, run_id=self.run_id)

    def describe(self) -> str:
        copied = f", copied to MLflow at {self.uri}" if self.uri else ""
        return f"metrics in {self.run_dir / METRICS}{copied}"

    def _artifact(self, name: str) -> Path:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.name:
            raise ValueError(f"{name!r} is no name for an artifact: give a relative path such as samples/step_100.txt")
        path = self.run_dir / ARTIFACTS / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _record_artifact(self, path: Path) -> None:
        relative = path.relative_to(self.run_dir)
        self.record("file", path=relative.as_posix(), folder="" if path.parent == self.run_dir / ARTIFACTS
                    else path.parent.relative_to(self.run_dir / ARTIFACTS).as_posix())  # fmt: skip

    def _record_provenance(self) -> None:
        found = provenance.collect()
        self.record("tags", tags=found.tags())
        try:
            write_json(self.run_dir / PROVENANCE, found.as_dict())
            (self.run_dir / DIFF).write_text(found.git.diff, encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written (%s); the run goes on without it", self.run_dir / PROVENANCE, error)
            return
        self.record("file", path=PROVENANCE, folder="")
        if found.git.dirty:
            self.record("file", path=DIFF, folder="")


def open_ahead(tracking: TrackingConfig, *, run_root: Path) -> None:
    """Start what a run will need that this process opens in a moment: MLflow is imported beside what is imported here until then."""
    store = store_of(tracking, run_root)
    if store is not None and is_first_rank():
        store.check_place(make=False)
        start_ahead(store.uri)


def store_of(tracking: TrackingConfig, run_root: Path) -> Store | None:
    """The MLflow store of a run; None where it has none."""
    return resolve_store(tracking, run_root) if isinstance(tracking, MLflowConfig) else None


def open_run(
    tracking: TrackingConfig,
    *,
    run_dir: Path,
    run_root: Path,
    name: str,
    config_flat: Mapping[str, str],
    config_yaml: str,
    parent: str | None = None,
    resume: bool = False,
    first_step: int = 0,
) -> RunLog:
    """Open the record of a run; use the result as a context manager. Returns at once: MLflow is opened beside the caller.

    Args:
        tracking: the group's config. The run folder is written whatever it says.
        run_dir: folder of this run; created. Without `resume` it must not hold a run.
        run_root: folder of all runs: the embedded store lies in it.
        name: shown by MLflow.
        config_flat: resolved settings by dotted key; MLflow's parameters.
        config_yaml: the same as YAML; config.yaml in the run folder.
        parent: run folder or MLflow run id of the run (a sweep) that this one is a part of.
        resume: go on with the run in `run_dir`, and with the same MLflow run. Points it holds already are not logged again.
        first_step: optimizer steps that are done already: what is measured before the next point belongs to them.

    Raises:
        ConfigError: the address cannot be one of an MLflow store or its file cannot be written, or the folder holds a run. A server that
            is down is no error.
    """
    run_dir = run_dir.resolve()
    store = store_of(tracking, run_root)
    if not is_first_rank():
        return NullRunLog(run_dir)
    if store is not None:
        store.check_place(make=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume:
        _take_folder(run_dir)
    before = list(read_records(run_dir / EVENTS))
    log = FolderRunLog(run_dir, store=store, resume=resume)
    process = {"pid": os.getpid(), "host": socket.gethostname()}
    log.record("open", name=name, parent=parent, first_step=first_step, **process, **_copy_settings(tracking, store))
    _record_config(log, config_flat, config_yaml, before)
    if isinstance(tracking, MLflowConfig) and tracking.tags:
        log.set_tags(tracking.tags)
    log.start()
    return log


def _take_folder(run_dir: Path) -> None:
    """Make the file that marks the folder as a run's: of several that want it at once, one gets it."""
    try:
        os.close(os.open(run_dir / EVENTS, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        has_checkpoint = any((run_dir / "checkpoints").glob("step-*.ckpt"))
        instead = f"go on with it by resume={run_dir}" if has_checkpoint else "it has no checkpoint, take it away"
        raise ConfigError(f"{run_dir} holds a run already; {instead}, or choose another name: hydra.run.dir=FOLDER") from None


def check_nobody_trains(run_dir: Path) -> None:
    """Refuse to go on with a run while another process of this machine trains it.

    Raises:
        ConfigError: with the process.
    """
    opened: dict[str, Any] = {}
    for record in read_records(run_dir / EVENTS):
        opened = record if record.get("kind") == "open" else {} if record.get("kind") == "finish" else opened
    pid = opened.get("pid", os.getpid())
    if opened.get("host") == socket.gethostname() and pid != os.getpid() and is_there(pid, since=opened["time"]):
        raise ConfigError(f"{run_dir} is being trained by process {pid}; stop it first, which saves: kill {pid}")


def open_parent(tracking: TrackingConfig, *, sweep_dir: Path, run_root: Path, name: str, config_yaml: str = "") -> RunLog:
    """Open the run that the runs of a sweep are children of: they pass `parent=str(sweep_dir)`.

    The children may start before, after or in other processes: whoever comes first creates the parent in MLflow, once.
    """
    sweep_dir.mkdir(parents=True, exist_ok=True)
    resume = (sweep_dir / EVENTS).exists()
    log = open_run(tracking, run_dir=sweep_dir, run_root=run_root, name=name, config_flat={}, config_yaml=config_yaml, resume=resume)
    log.set_tags({"multirun": str(sweep_dir)})
    return log


def last_steps(run_dir: Path) -> dict[str, int]:
    """The newest step at which each metric of a run was recorded."""
    last: dict[str, int] = {}
    for point in read_metrics(run_dir):
        for name in point.values:
            last[name] = max(point.step, last.get(name, -1))
    return last


def _copy_settings(tracking: TrackingConfig, store: Store | None) -> dict[str, Any]:
    """What the sender needs to know, in the record that opens a run."""
    config = tracking if isinstance(tracking, MLflowConfig) else MLflowConfig()
    return {
        "uri": store.shown if store else None,
        "artifacts": store.artifacts if store else None,
        "experiment": config.experiment,
        "flush_seconds": config.flush_seconds,
        "exit_seconds": config.exit_seconds,
        "system_metrics": config.system_metrics,
    }


def _record_config(log: FolderRunLog, flat: Mapping[str, str], text: str, before: list[dict[str, Any]]) -> None:
    """Settings as parameters, the YAML as a file, its hash as a tag. MLflow never changes a parameter, so what a resumed run
    sets differently becomes tags `resume_N/KEY`."""
    flat = {str(k): str(v) for k, v in flat.items()}
    resumes = sum(record.get("kind") == "open" for record in before)
    tags = {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    stored = {k: v for record in before if record.get("kind") == "params" for k, v in record["params"].items()}
    if resumes:
        changed = {key: value for key, value in flat.items() if stored.get(key) != value}
        tags |= {f"resume_{resumes}/{key}": value for key, value in changed.items()} | {"resumes": str(resumes)}
        flat = {}
    log.set_tags(tags)
    for i in range(0, len(flat), 100):
        log.record("params", params=dict(list(flat.items())[i : i + 100]))
    path = log.run_dir / CONFIG
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path = log.run_dir / f"config_{resumes}.yaml"
    if text:
        path.write_text(text, encoding="utf-8")
        log.record("file", path=path.name, folder="")


__all__ = [
    "FolderRunLog", "NullRunLog", "RunLog", "Status", "find_run_dir", "is_first_rank", "last_steps", "open_ahead", "open_parent",
    "open_run", "read_metrics", "reap", "send_later", "status_of", "store_of",
]  # fmt: skip
