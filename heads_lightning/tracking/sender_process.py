"""The training process's end of the process that copies a run folder to MLflow (`mlflow_sync.py`).

The sender's imports take longer than many a first step. So the command starts it ahead, before its own imports, and opens the run with
the sender that is ready by then; a cell of a sweep, whose warm parent has imported MLflow, forks it.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

import heads_lightning
from heads_lightning.tracking.mlflow_opening import import_client
from heads_lightning.tracking.mlflow_sync import ADDRESS_VARIABLE, LOOK, OVER, follow
from heads_lightning.tracking.run_folder import LOG

LONGEST_WAIT_SECONDS = 300.0
"""At the end of a run, for a store that takes data but slowly; the sender then goes on by itself."""
START_SECONDS = 30.0
"""Importing MLflow and creating a store takes seconds, on a crowded machine some more."""
PROGRAM = "heads_lightning.tracking.mlflow_sync"

logger = logging.getLogger(__name__)


class Forked:
    """A sender forked from this process, with what is used of a `subprocess.Popen`."""

    def __init__(self, uri: str) -> None:
        (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become_sender(uri, parent, their_in, their_out)
        os.close(their_in)
        os.close(their_out)
        self.stdin: IO[bytes] = os.fdopen(our_out, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(our_in, "rb")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _become_sender(uri: str, parent: int, stdin: int, stdout: int) -> NoReturn:
    """In the forked process: keep nothing of the other one but its imports."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdout = os.fdopen(1, "w")
        code = follow(uri, parent)
    except BaseException:
        traceback.print_exc()  # mlflow.log has it, as from an interpreter of its own
    finally:
        os._exit(code)


_may_fork = False


def import_to_fork(uri: str) -> None:
    """Import MLflow here, so that the senders of this process and of those forked from it start at once."""
    global _may_fork
    import_client(uri)
    _may_fork = True


def _can_fork() -> bool:
    """Whether a fork of this process is a sender: MLflow is imported, and no thread runs that a fork would lose."""
    return _may_fork and len(os.listdir("/proc/self/task")) == 1


def _start(uri: str, log: Path) -> "Forked | subprocess.Popen[bytes]":
    if _can_fork():
        return Forked(uri)
    with open(log, "ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", PROGRAM, "--follow", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=_environment(uri),
            # Ctrl-C in a terminal is for training alone. A group and not a session: Linux shares processors between sessions
            # first, where a low priority counts for nothing
            process_group=0,
        )  # fmt: skip


_ahead: "tuple[str, Forked | subprocess.Popen[bytes]] | None" = None
"""A sender that waits for its run folder, and the store that it was started for."""


def start_ahead(uri: str) -> None:
    """Start the sender of the run that this process will open in a moment. It ends with this process if none is opened."""
    global _ahead
    _ahead = uri, _start(uri, Path(os.devnull))


def _take_ahead(uri: str) -> "Forked | subprocess.Popen[bytes] | None":
    global _ahead
    found, _ahead = _ahead, None
    if found is None:
        return None
    known, process = found
    if known == uri and process.poll() is None:
        return process
    assert process.stdin is not None
    process.stdin.close()
    return None


class SenderProcess:
    """Starts the sender, wakes it, shows what it has to say, and waits for it at the end."""

    def __init__(self, run_dir: Path, *, uri: str) -> None:
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.attached = threading.Event()
        self._run_dir = run_dir
        self._last_sign = time.monotonic()
        self._process = _take_ahead(uri) or _start(uri, run_dir / LOG)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: `close` says so
            os.write(self._process.stdin.fileno(), os.fsencode(run_dir) + b"\n")
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wake(self) -> None:
        """Ask for an immediate look at the folder. Never waits: a full pipe holds enough wakes already."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), LOOK)

    def close(self) -> None:
        """Say that training is over, and wait while the sender gets on."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), OVER)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._last_sign = started = time.monotonic()
        while self._process.poll() is None:
            now = time.monotonic()
            if now - self._last_sign > START_SECONDS or now - started > LONGEST_WAIT_SECONDS:
                logger.warning("MLflow is still taking the data of %s; process %d goes on with it", self._run_dir, self._process.pid)
                return
            time.sleep(0.02)
        self._listener.join(timeout=5)
        if self._process.returncode not in (0, 3):
            logger.warning("the process that sends to MLflow failed (see %s); send later with: %s", self._run_dir / LOG, self._later())

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # something that a library printed
                continue
            self._last_sign = time.monotonic()
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.get("message")
        if kind == "attached":
            self.run_id, self.experiment_id = message["run_id"], message["experiment_id"]
            self.attached.set()
        elif kind == "warning":
            logger.warning("%s", message["text"])
        elif kind == "info":
            logger.info("%s", message["text"])
        elif kind == "end" and not message["done"]:
            text = "%d values and %d other records of %s are not in MLflow; send them when it is back: %s"
            logger.warning(text, message["values"], message["records"], self._run_dir, self._later())

    def _later(self) -> str:
        return f"{sys.executable} -m heads_lightning.tracking.mlflow_sync {self._run_dir}"


def _environment(uri: str) -> dict[str, str]:
    """The caller's, with the address (it may hold a password), one thread for numerics, and this package on the path."""
    environment = {**os.environ, ADDRESS_VARIABLE: uri, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    root = Path(heads_lightning.__file__).resolve().parent.parent
    if "site-packages" not in root.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return environment
