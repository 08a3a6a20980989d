"""A process that has done the imports and forks a cell when asked: seconds of start-up become a fraction of one.

Forking is safe while no thread runs and no device is open; the server counts its threads after the imports and refuses where there is
more than one, and the caller does not ask on a machine with a GPU or off Linux. Each request is a JSON line on standard input, each
answer one on standard output.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from heads_lightning.composition.store import prepare_store
from heads_lightning.composition.validation import available_gpus
from heads_lightning.sweeps.cell import PROGRAM, end_with_parent, main
from heads_lightning.tracking.mlflow_sync import ADDRESS_VARIABLE
from heads_lightning.tracking.process import ending
from heads_lightning.tracking.sender_process import import_to_fork

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Environment in which imports start no thread: OpenBLAS (numpy) has a pool, the allocator of Arrow (pandas, for MLflow) a helper."""


class ParentEnded(Exception):
    """The warm parent is gone, by what the message says: somebody killed it, or the machine ran out of memory."""


class WarmParent:
    """The caller's end. `refusal` says why cells cannot be forked here; empty where they can."""

    def __init__(self, *, uri: str | None) -> None:
        """Args:
        uri: MLflow store that the cells are copied to; None where they are not.
        """
        self.refusal = _refusal_of_machine()
        self._process: subprocess.Popen[str] | None = None
        if not self.refusal:
            self._start({} if uri is None else {ADDRESS_VARIABLE: uri})

    def _start(self, address: Mapping[str, str]) -> None:
        environment = {**os.environ, **ONE_THREAD, **address}
        command = [sys.executable, "-m", PROGRAM, "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.refusal = self._answer().get("refusal", "the warm process ended while it was importing")

    def fork(self, arguments: list[str], *, log: Path, environment: Mapping[str, str]) -> int:
        """Start a cell; returns its process id.

        Raises:
            ParentEnded: there is none that could start it.
        """
        with suppress(BrokenPipeError):
            self._ask({"arguments": arguments, "log": str(log), "environment": dict(environment), "folder": os.getcwd()})
        return self._told("pid")

    def wait(self) -> int:
        """Exit code of the cell that was started last; negative for a signal.

        Raises:
            ParentEnded: nobody will tell. The kernel asks the cell to stop, too.
        """
        return self._told("code")

    @property
    def ending(self) -> str:
        """What ended the process; empty while it runs."""
        code = None if self._process is None else self._process.poll()
        return "" if code is None else ending(code)

    def close(self) -> None:
        """End the process; a cell that runs still is asked to stop by the kernel."""
        if self._process is not None and self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.terminate()
            self._process.wait()

    def _told(self, fact: str) -> int:
        answer = self._answer()
        if fact not in answer:
            assert self._process is not None
            raise ParentEnded(ending(self._process.wait()))
        return answer[fact]

    def _ask(self, request: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}


def _refusal_of_machine() -> str:
    if sys.platform != "linux":
        return f"forking after imports is not safe on {sys.platform}"
    if available_gpus():
        return "this machine has a GPU, whose driver does not survive a fork"
    return ""


# ----------------------------------------------------------------------------------------------------------- the server


def serve() -> None:
    """Import everything that training needs, then fork a cell for each request until standard input ends."""
    end_with_parent(signal.SIGKILL)  # its cell is asked to stop by the same means
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to pass on
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print while importing is no answer
    _import_all()
    _tell(answers, refusal=_refusal_of_process())
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        request = json.loads(line)
        cell = context.Process(target=_cell, args=(request, answers))
        cell.start()
        _tell(answers, pid=cell.pid)
        cell.join()
        _tell(answers, code=cell.exitcode)


USUAL = ("heads_lightning.backbones.transformer", "heads_lightning.losses.chunked", "heads_lightning.sweeps.pruning", "psutil")
"""Imported on the way to the first steps where a cell needs them, as most do."""


def _import_all() -> None:
    import heads_lightning.run  # noqa: F401

    for name in USUAL:
        importlib.import_module(name)
    prepare_store()
    if ADDRESS_VARIABLE in os.environ:
        import_to_fork(os.environ[ADDRESS_VARIABLE])
    gc.freeze()  # what is here is never garbage: a cell would look through it, and copy its pages by doing so


def _refusal_of_process() -> str:
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"the imports left {threads - 1} thread(s) running, which a fork would lose"
    torch = sys.modules.get("torch")
    return "a device was opened by the imports" if torch is not None and torch.cuda.is_initialized() else ""


def _tell(answers: Any, **facts: Any) -> None:
    answers.write(json.dumps(facts) + "\n")
    answers.flush()


def _cell(request: Mapping[str, Any], answers: Any) -> None:
    """In the forked process: become what `python -m heads_lightning.sweeps.cell ARGUMENTS` would be."""
    answers.close()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [sys.argv[0], *request["arguments"]]
    sys.exit(main(request["arguments"]))
