"""Keeps an MLflow run equal to a run folder. Runs as a process of its own: `python -m heads_lightning.tracking.mlflow_sync RUN_DIR`.

Why a process and not a thread: MLflow costs 0.06 to 0.2 ms of Python for every value and seconds to import, which a thread takes from
the training loop through the interpreter lock; a slow, hung or dead server cannot hold up a loop that never talks to it; and when
training is killed (out of memory, `kill -9`), somebody is left to send its last values and to mark the run KILLED.

How: it reads the folder's JSON lines from where it stopped, sends them with `log_batch`, and remembers the offset. Metrics carry their own
time stamps and a store keeps one copy of an equal point, so sending again after a crash repeats nothing. What cannot be sent stays where
it is, in the folder; the same command sends it later.

It follows the training process through its standard input: the first line names the run folder, then a byte means "look now" or, as the
end of the stream does, "training is over". On its standard output it tells, one JSON object a line, what the training process should show.
"""

import argparse
import gc
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from heads_lightning.registry import ConfigError
from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.mlflow_calls import NotSent, Refused
from heads_lightning.tracking.mlflow_header import read_header
from heads_lightning.tracking.mlflow_opening import import_client, short_timeouts
from heads_lightning.tracking.mlflow_run import MlflowRun, Unsent
from heads_lightning.tracking.mlflow_store import Store, store_at
from heads_lightning.tracking.run_folder import LOG, SYSTEM, JsonLines, Point, point_record

if TYPE_CHECKING:
    from heads_lightning.tracking.system_metrics import SystemMetrics

ADDRESS_VARIABLE = "HEADS_LIGHTNING_TRACKING_URI"
"""Environment variable that hands over the full address of the store: it may hold a password, which no file and no argument may."""
LOOK, OVER = b".", b"!"
"""What the training process says: there is something to send now; it has ended. The second one because a child of its own that it forked
and that lives on holds the stream open."""
SYSTEM_SECONDS = 10.0
HEARTBEAT_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 30.0
ORPHAN_CHECK_SECONDS = 2.0
"""A data worker that outlives its killed parent holds the stream open, so the parent is also looked for."""


class HidingStream(io.TextIOBase):
    """Standard error (the file mlflow.log) without the password of the store, which libraries quote in their errors."""

    def __init__(self, stream: TextIO, store: Store) -> None:
        self._stream = stream
        self._store = store

    def write(self, text: str, /) -> int:
        self._stream.write(self._store.hide_password(text))
        self._stream.flush()
        return len(text)


def tell_process(message: str, **facts: Any) -> None:
    """A message to the training process; it may be gone."""
    with suppress(OSError, ValueError):
        print(json.dumps({"message": message, **facts}), flush=True)


def tell_person(message: str, **facts: Any) -> None:
    """The same for somebody who sends a folder later."""
    if message in ("warning", "info"):
        logging.getLogger(__name__).warning(facts["text"])


class Sender:
    """Sends the records of one run folder until training is over and all is sent, or nothing more can be done."""

    def __init__(self, run: MlflowRun, *, parent: int | None, tell: Callable[..., None]) -> None:
        self.run = run
        self._tell = tell
        self._parent = parent
        self._wake = threading.Event()
        self._closed = parent is None
        self._attached = False
        self._failures = 0
        self._warned = False
        self._system: SystemMetrics | None = None
        self._system_lines = JsonLines(run.run_dir / SYSTEM) if parent is not None and run.header.system_metrics else None
        self._next_sample = self._next_heartbeat = 0.0

    def follow(self, signals: IO[bytes] | None) -> bool:
        """Work until the end; returns whether everything was sent. `signals` is the stream from the training process."""
        if signals is not None:
            threading.Thread(target=self._listen, args=(signals,), daemon=True).start()
        give_up = math.inf
        next_try = 0.0
        while True:
            over = self._over()
            if over and give_up == math.inf:
                give_up = time.monotonic() + self.run.header.exit_seconds
                next_try = 0.0
            self._sample(last=over)
            if time.monotonic() >= next_try:
                done = self._try(over)
                if over and (done or time.monotonic() >= give_up):
                    return done
                next_try = time.monotonic() + self._pause(done, over)
            if self._woken(next_try) and not self._failures:
                next_try = 0.0

    def _listen(self, signals: IO[bytes]) -> None:
        while signals.read(1) == LOOK:
            self._wake.set()
        self._closed = True
        self._wake.set()

    def _over(self) -> bool:
        orphan = self._parent is not None and os.name == "posix" and os.getppid() != self._parent
        return self._closed or orphan

    def _woken(self, until: float) -> bool:
        """Sleep until then at most; returns whether training asked for a flush or ended."""
        due = min(until, self._next_sample if self._system_lines else until)
        woken = self._wake.wait(min(ORPHAN_CHECK_SECONDS, max(0.05, due - time.monotonic())))
        self._wake.clear()
        return woken

    def _pause(self, done: bool, over: bool) -> float:
        if done:
            return self.run.header.flush_seconds
        return 0.5 if over else min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** min(self._failures, 10))

    def _try(self, over: bool) -> bool:
        """One round of sending; a store that does not answer costs one warning in the whole run."""
        try:
            self._attach(live=not over)
            count = self.run.send(self._alive)
            if over:
                self.run.close(default="KILLED")
            elif time.monotonic() >= self._next_heartbeat:
                self.run.heartbeat()
                self._next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        except (NotSent, Refused) as error:
            self._failures += 1
            logging.warning("not sent: %s", error, exc_info=error.__cause__)
            self._warn(str(error))
            return False
        if self._failures:
            self._tell("info", text=f"MLflow at {self.run.store.shown} answers again: {count} values sent")
        self._failures = 0
        return True

    def _attach(self, *, live: bool) -> None:
        if not self._attached:
            self.run.attach(live=live)
            self._attached = True
            if self._parent is not None:
                # from here on training comes first where processors are short; the imports before it would starve at this priority
                with suppress(OSError, AttributeError):
                    os.nice(10)
            self._tell("attached", run_id=self.run.run_id, experiment_id=self.run.experiment_id)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            text = f"MLflow at {self.run.store.shown} does not take data ({reason}). The run goes on; everything is in {self.run.run_dir}"
            self._tell("warning", text=f"{text} and is sent when the store is back", reason=reason)

    def _alive(self) -> None:
        if self._over():
            self._tell("alive")

    def _sample(self, *, last: bool) -> None:
        """System metrics are dated by the newest optimizer step, so that they share the axis of the curves."""
        if self._system_lines is None or (time.monotonic() < self._next_sample and not last):
            return
        self._next_sample = time.monotonic() + SYSTEM_SECONDS
        try:
            if self._system is None:
                from heads_lightning.tracking.system_metrics import SystemMetrics

                assert self._parent is not None
                self._system = SystemMetrics(self._parent, self.run.run_dir)
                if not last:
                    return  # rates need an interval: the first sample comes with the next round
                time.sleep(0.1)  # a run that ended before this process was there has no next round
            values = self._system.sample()
            self._system_lines.append(point_record(Point(step=self.run.last_step, tokens=None, time=time.time(), values=values)))
            self._system_lines = None if last else self._system_lines
        except Exception as error:  # every platform lacks some counter; a run does not depend on any
            logging.warning("system metrics end: %r", error)
            self._system_lines = None


def send_later(run_dir: Path, *, uri: str | None = None) -> Unsent:
    """Send what a run folder holds and its MLflow store does not; returns what is still left. Safe to repeat.

    Args:
        uri: another store, or the full address of one whose password the folder does not keep.
    """
    with short_timeouts():
        run = open_folder(run_dir.resolve(), uri, tell_person)
        try:
            with file_lock(run.run_dir / f".{LOG}.lock", seconds=1.0):
                Sender(run, parent=None, tell=tell_person).follow(None)
        except TimeoutError:
            raise ConfigError(f"{run_dir} is being sent by a process that still runs; wait for it to end") from None
    return run.unsent()


def open_folder(run_dir: Path, uri: str | None, tell: Callable[..., None]) -> MlflowRun:
    """The copy of a run folder, in its own store or in `uri`."""
    header = read_header(run_dir)
    store = store_at(uri, run_dir.parent) if uri else header.store
    if header.artifacts is not None and not store.on_server:
        store = store._replace(artifacts=header.artifacts)
    return MlflowRun(run_dir, store=store, say=lambda text: tell("warning", text=text))


def follow(uri: str, parent: int) -> int:
    """Be the sender of the training process `parent`, which talks on standard input; returns the exit code."""
    # Schedulers and terminals signal every process of a job; this one ends when training has, and not before its last values
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    with short_timeouts(), os.fdopen(0, "rb") as signals:
        gc.disable()
        with suppress(Exception):  # what cannot be imported is told when the store is opened
            import_client(uri)
        # a third of a value's cost was looking for garbage among what was imported, and after every few rows of a batch
        gc.freeze()
        gc.set_threshold(50_000)
        gc.enable()
        run_dir = os.fsdecode(signals.readline().removesuffix(b"\n"))
        return _follow_run(Path(run_dir), uri, parent, signals) if run_dir else 0


def _follow_run(run_dir: Path, uri: str, parent: int, signals: IO[bytes]) -> int:
    os.dup2(os.open(run_dir / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    run = open_folder(run_dir, uri, tell_process)
    sys.stderr = HidingStream(sys.stderr, run.store)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    with file_lock(run_dir / f".{LOG}.lock"):
        done = Sender(run, parent=parent, tell=tell_process).follow(signals)
    tell_process("end", done=done, **run.unsent()._asdict())
    return 0 if done else 3


def main() -> int:
    """Command line of the process."""
    parser = argparse.ArgumentParser(prog="python -m heads_lightning.tracking.mlflow_sync", description="Send a run folder to MLflow.")
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--uri", help="another store than the run's own")
    parser.add_argument("--follow", type=int, metavar="PID", help="follow the training process PID, which talks on standard input")
    options = parser.parse_args()
    if options.follow is not None:
        return follow(os.environ[ADDRESS_VARIABLE], options.follow)
    if options.run_dir is None:
        parser.error("name the folder of a run")
    return _main_later(options.run_dir, options.uri)


def _main_later(run_dir: Path, uri: str | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        left = send_later(run_dir, uri=uri)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"not sent: {left.values} values and {left.records} other records" if any(left) else f"everything in {run_dir} is in MLflow")
    return 3 if any(left) else 0


if __name__ == "__main__":
    sys.exit(main())
