"""One MLflow run as the copy of one run folder: creating or finding it, and sending what the folder holds and the run does not.

Each record of the folder is sent once: the offset behind the last record that the store took is kept in mlflow_sent.json. A store that
does not answer raises NotSent and nothing moves; a value that the store refuses for good is named, left out and does not block the rest.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.mlflow_calls import Calls
from heads_lightning.tracking.mlflow_events import send_event
from heads_lightning.tracking.mlflow_header import Header, read_header
from heads_lightning.tracking.mlflow_lookup import HEARTBEAT_TAG, RUN_DIR_TAG
from heads_lightning.tracking.mlflow_opening import experiment_id
from heads_lightning.tracking.mlflow_points import Points
from heads_lightning.tracking.mlflow_store import Store
from heads_lightning.tracking.run_folder import (
    EVENTS,
    METRICS,
    SENT,
    SIDECAR,
    SYSTEM,
    read_json,
    read_lines,
    read_records,
    write_json,
)


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
        self._calls = Calls(run_dir, store=store, say=say)
        self._points: Points | None = None
        self._sent: dict[str, Any] = {}

    @property
    def run_id(self) -> str:
        """MLflow run id; empty before `attach`."""
        return self._calls.run_id

    @property
    def experiment_id(self) -> str:
        """MLflow experiment id; empty before `attach`."""
        return self._calls.experiment_id

    @property
    def last_step(self) -> int:
        """Newest optimizer step seen, for values that are logged by time."""
        return max(self.header.first_step, self._points.last_step if self._points else 0)

    def attach(self, *, live: bool) -> None:
        """Connect and find or create the run; `live` says that training goes on, so that the run shows as RUNNING."""
        calls = self._calls
        calls.run_id, calls.experiment_id = calls.call(self._find_or_create, self.run_dir, self.header)
        self._sent = read_json(self.run_dir / SENT)
        if self._sent.get("run_id") != calls.run_id:
            self._sent = {"run_id": calls.run_id, "offsets": {}, "nonfinite": {}}
        self._points = Points(calls, self._sent["nonfinite"])
        if live:
            calls.call(calls.client.update_run, calls.run_id, status="RUNNING")
            calls.set_tags({RUN_DIR_TAG: str(self.run_dir)})
            self.heartbeat()

    def _find_or_create(self, run_dir: Path, header: Header) -> tuple[str, str]:
        """(run id, experiment id) of the copy of `run_dir`; one process at a time, so that there is one copy."""
        client = self._calls.client
        with file_lock(run_dir / f".{SIDECAR}.lock"):
            sidecar = read_json(run_dir / SIDECAR)
            found = _existing(client, sidecar.get("run_id"))
            if found is not None:
                return found
            experiment = experiment_id(client, self.store, header.experiment)
            tags = {RUN_DIR_TAG: str(run_dir)}
            if header.parent:
                tags["mlflow.parentRunId"] = self._parent_id(header.parent)
            run = client.create_run(experiment, start_time=int(header.started * 1000), tags=tags, run_name=header.name)
            facts = {"run_id": run.info.run_id, "experiment_id": experiment, "experiment": header.experiment}
            write_json(run_dir / SIDECAR, {**facts, "uri": self.store.shown})
            return run.info.run_id, experiment

    def _parent_id(self, parent: str) -> str:
        """A parent may be named by its folder: whichever of its children comes first creates its run."""
        folder = Path(parent)
        return self._find_or_create(folder, read_header(folder))[0] if (folder / EVENTS).exists() else parent

    def send(self, progress: Callable[[], None] = lambda: None) -> int:
        """Send everything new; returns the number of values. `progress` is called after every answer of the store."""
        self._send_events(progress)
        return self._send_points(METRICS, progress) + self._send_points(SYSTEM, progress)

    def _send_events(self, progress: Callable[[], None]) -> None:
        while True:
            offset = self._sent["offsets"].get(EVENTS, 0)
            lines = read_lines(self.run_dir / EVENTS, offset)
            if lines.end == offset:
                return
            for record, end in lines.records:
                send_event(self._calls, record)
                self._keep_offset(EVENTS, end)
                progress()
            self._keep_offset(EVENTS, lines.end)

    def _send_points(self, file: str, progress: Callable[[], None]) -> int:
        assert self._points is not None
        count = 0
        while True:
            offset = self._sent["offsets"].get(file, 0)
            lines = read_lines(self.run_dir / file, offset)
            if lines.end == offset:
                return count
            count += self._points.send((record for record, _ in lines.records), progress)
            self._keep_offset(file, lines.end)

    def _keep_offset(self, file: str, offset: int) -> None:
        self._sent["offsets"][file] = offset
        try:
            write_json(self.run_dir / SENT, self._sent)
        except OSError as error:  # a full disk: what is sent again is not stored twice
            self._calls.tell_once(f"{self.run_dir / SENT} cannot be written ({error})")

    def close(self, *, default: str) -> None:
        """Give the run the status that its folder records, or `default` where it does not say (training was killed)."""
        calls, ending = self._calls, self._ending()
        status, when = ending or (default, time.time())
        if ending is None:
            calls.set_tags({"ended": "the process disappeared without closing its run"})
        if status in ("RUNNING", "SCHEDULED"):  # handed to a scheduler that starts it again: not an end
            calls.call(calls.client.update_run, calls.run_id, status=status)
        else:
            calls.call(calls.client.set_terminated, calls.run_id, status, int(when * 1000))

    def _ending(self) -> tuple[str, float] | None:
        """(status, time) of the end that the folder records, by this process or an earlier one; a run that was resumed since has none."""
        ending = None
        for record in read_records(self.run_dir / EVENTS):
            if record.get("kind") in ("open", "finish"):
                ending = (record["status"], record["time"]) if record["kind"] == "finish" else None
        return ending

    def heartbeat(self) -> None:
        """A sign of life, for `reap`."""
        self._calls.set_tags({HEARTBEAT_TAG: f"{time.time():.0f}"})

    def unsent(self) -> Unsent:
        """Count what is left to send."""
        offsets = self._sent.get("offsets", read_json(self.run_dir / SENT).get("offsets", {}))
        values = sum(_count(self.run_dir / name, offsets.get(name, 0), lambda r: len(r["values"])) for name in (METRICS, SYSTEM))
        return Unsent(values=values, records=_count(self.run_dir / EVENTS, offsets.get(EVENTS, 0), lambda r: 1))


def _existing(client: Any, run_id: str | None) -> tuple[str, str] | None:
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
