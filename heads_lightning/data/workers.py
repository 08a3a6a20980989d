"""A function over many jobs, in processes that import nothing but what the function needs.

Choice. Children are started as `python -c`, not through multiprocessing: a spawned child of multiprocessing runs the user's main script
again (which fails without a main guard, and imports torch in every child), a forked one inherits threads in unknown states. A child reads
pickled jobs from its input and ends when that closes, so none is left behind however the parent dies.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

R = TypeVar("R")

_CHILD = "from heads_lightning.data.workers import _serve; _serve()"


class WorkerError(RuntimeError):
    """A child died; its last words are in its error output."""


def run_jobs(function: Callable[..., R], setup: Any, jobs: Sequence[Any], *, processes: int) -> Iterator[R]:
    """`function(setup, job)` of every job, in the order in which they finish. With one process, in this one.

    Args:
        function: importable by name, as are the types of setup, jobs and results.
        setup: sent once to each process.
        jobs: sent one by one, to whichever process is free.
        processes: at most.
    """
    processes = min(processes, len(jobs))
    if processes <= 1:
        yield from (function(setup, job) for job in jobs)
        return
    children = [_Child(function, setup) for _ in range(processes)]
    idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)

    def run(job: Any) -> R:
        child = idle.get()
        try:
            return child.call(job)
        finally:
            idle.put(child)

    pool = ThreadPoolExecutor(processes, thread_name_prefix="prepare")
    try:
        pending: set[Future[R]] = set()
        for job in jobs:  # never more than two jobs a process in flight, so that a failure stops the rest
            pending.add(pool.submit(run, job))
            if len(pending) >= 2 * processes:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.close()


class _Child:
    """A process that serves one function."""

    def __init__(self, function: Callable[..., Any], setup: Any) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "TOKENIZERS_PARALLELISM": "false",  # one thread each: the processes are the parallelism
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._send((function, setup))

    def call(self, job: Any) -> Any:
        self._send(job)
        assert self._process.stdout is not None
        try:
            ok, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise WorkerError(f"a preparing process ended with status {self._process.wait()}; is there enough memory?") from None
        if not ok:
            raise value
        return value

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(value, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"a preparing process ended with status {self._process.wait()}; its error output says why") from None

    def close(self) -> None:
        self._process.kill()  # it holds nothing: results are sent, files are written under temporary names
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _serve() -> None:
    """What a child runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children
    jobs = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plugin prints must not fall among the results
    function, setup = pickle.load(jobs)
    while True:
        try:
            job = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer = True, function(setup, job)
        except Exception as error:
            answer = False, _portable(error)
        pickle.dump(answer, results)
        results.flush()


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return WorkerError(f"{type(error).__name__}: {error}")
