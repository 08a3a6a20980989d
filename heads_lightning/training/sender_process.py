"""The training process's end of the process that copies a run folder to MLflow (`mlflow_sync.py`)."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import heads_lightning
from heads_lightning.training.mlflow_sync import ADDRESS_VARIABLE
from heads_lightning.training.run_folder import LOG

LONGEST_WAIT_SECONDS = 300.0
"""At the end of a run, for a store that takes data but slowly; the sender then goes on by itself."""
START_SECONDS = 30.0
"""Importing MLflow and creating a store takes seconds, on a crowded machine some more."""

logger = logging.getLogger(__name__)


class SenderProcess:
    """Starts the sender, wakes it, shows what it has to say, and waits for it at the end."""

    def __init__(self, run_dir: Path, *, uri: str) -> None:
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.attached = threading.Event()
        self._run_dir = run_dir
        self._last_sign = time.monotonic()
        with open(run_dir / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "heads_lightning.training.mlflow_sync", str(run_dir), "--follow", str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=_environment(uri),
                start_new_session=True,  # Ctrl-C in a terminal is for training alone
            )  # fmt: skip
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wake(self) -> None:
        """Ask for an immediate look at the folder. Never waits: a full pipe holds enough wakes already."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), b".")

    def close(self) -> None:
        """Say that training is over, and wait while the sender gets on."""
        assert self._process.stdin is not None
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
        return f"{sys.executable} -m heads_lightning.training.mlflow_sync {self._run_dir}"


def _environment(uri: str) -> dict[str, str]:
    """The caller's, with the address (it may hold a password), one thread for numerics, and this package on the path."""
    environment = {**os.environ, ADDRESS_VARIABLE: uri, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    root = Path(heads_lightning.__file__).resolve().parent.parent
    if "site-packages" not in root.parts:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return environment
