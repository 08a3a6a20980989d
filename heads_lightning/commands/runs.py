"""`runs`: the runs below a folder, newest first; `--reap` ends the records of those whose process is gone."""

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.commands.arguments import read
from heads_lightning.commands.show import table
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.registry import ConfigError
from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.process import is_there
from heads_lightning.tracking.run_folder import EVENTS, LOG, METRICS, JsonLines, event, read_json, read_metrics, read_records

FLAGS = ("--reap", "--json")
SILENT_SECONDS = 120.0
"""A run of another machine counts as gone when its folder has not changed for so long."""


@dataclass
class Arguments:
    """Which runs, and how to show them."""

    run_root: str = "runs"
    """Folder that holds runs."""
    limit: int = 30
    """Runs to show, the newest first."""


class Run(NamedTuple):
    """A run folder in the list."""

    folder: Path
    name: str
    status: str
    """FINISHED, FAILED, KILLED, SCHEDULED, RUNNING, or GONE: not closed, and its process is not there."""
    started: float
    step: int
    loss: float | None
    """Newest val/loss, nats per target."""
    mlflow: str | None


def main(arguments: Sequence[str]) -> int:
    """`heads-lightning runs [run_root=FOLDER] [limit=N] [--reap] [--json]`."""
    flags = {word for word in arguments if word in FLAGS}
    options, _ = read(Arguments, [word for word in arguments if word not in flags], flags=FLAGS)
    root = Path(options.run_root)
    if not root.is_dir():
        raise ConfigError(f"run_root={root} is not a folder; runs lie in the folder that run_root named when they were trained")
    found = sorted((describe(path.parent) for path in root.rglob(EVENTS)), key=lambda run: -run.started)
    if "--reap" in flags:
        return _reap(root, found)
    shown = found[: options.limit]
    if "--json" in flags:
        print(json.dumps([{**run._asdict(), "folder": str(run.folder)} for run in shown], indent=1))
    else:
        rows = [
            (run.status, str(run.step), "" if run.loss is None else f"{run.loss:.4f}", _ago(run.started), str(run.folder)) for run in shown
        ]
        table(rows, ("status", "step", "val/loss", "started", "folder"))
    return 0


def describe(folder: Path) -> Run:
    """A run folder in one line."""
    opened: dict[str, Any] = {}
    started, status = 0.0, ""
    for record in read_records(folder / EVENTS):
        if record.get("kind") == "open":
            opened, status, started = record, "", started or record["time"]
        elif record.get("kind") == "finish":
            status = record["status"]
    step, loss = 0, None
    for point in read_metrics(folder):
        step, loss = max(step, point.step), point.values.get("val/loss", loss)
    status = status or ("RUNNING" if _alive(folder, opened) else "GONE")
    return Run(folder, str(opened.get("name", "")), status, started, step, loss, read_json(folder / "mlflow.json").get("run_id"))


def _alive(folder: Path, opened: dict[str, Any]) -> bool:
    """Whether the process that opened the run is there; that of another machine by the age of its newest record."""
    if opened.get("host") == socket.gethostname() and "pid" in opened:
        return is_there(opened["pid"], since=opened["time"])
    newest = max(
        (path.stat().st_mtime for path in (folder / METRICS, folder / EVENTS, folder / "system.jsonl") if path.exists()), default=0
    )
    return time.time() - newest < SILENT_SECONDS


def _reap(root: Path, found: Sequence[Run]) -> int:
    """Write KILLED where a process is gone, in the folder and, for runs with one, in MLflow."""
    gone = [run for run in found if run.status == "GONE"]
    for run in gone:
        lines = JsonLines(run.folder / EVENTS)
        lines.append(event("finish", status="KILLED", reason="its process is gone"))
        lines.close()
        print(f"KILLED  {run.folder}{_sent(run)}")
    print(f"{len(gone)} of {len(found)} runs below {root} were open without a process")
    _reap_store(root)
    return 0


def _reap_store(root: Path) -> None:
    """Runs of the MLflow store that show no sign of life: those of machines that are gone, whose folders may not be here."""
    from heads_lightning.tracking.mlflow_lookup import reap
    from heads_lightning.tracking.mlflow_opening import short_timeouts

    store = resolve_store(MLflowConfig(), root)
    if store.database is not None and not store.database.exists():
        return
    try:
        with short_timeouts():
            reaped = reap(root)
    except Exception as error:  # clients of databases and of HTTP each raise their own
        print(f"the store {store.shown} was not looked through: {store.hide_password(str(error)).splitlines()[0]}")
        return
    print(f"{len(reaped)} more in {store.shown}", *reaped)


def _sent(run: Run) -> str:
    """Bring MLflow up to date where the folder says that there is a run; what came of it, for the line."""
    from heads_lightning.tracking.mlflow_header import read_header
    from heads_lightning.tracking.open_run import send_later

    if read_header(run.folder).uri is None:
        return ""
    try:
        with file_lock(run.folder / f".{LOG}.lock", seconds=5.0):
            pass  # the run's own sender has ended
        left = send_later(run.folder)
    except (ConfigError, TimeoutError) as error:
        return f"  (not in MLflow: {error})"
    return "  (not in MLflow: the store does not answer)" if any(left) else ""


def _ago(when: float) -> str:
    seconds = max(0.0, time.time() - when)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
