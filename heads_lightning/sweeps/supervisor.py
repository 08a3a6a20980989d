"""Runs one cell and waits for it: what a launcher's worker does, in whatever process and on whatever machine the launcher put it.

The cell is a process of its own (cell.py), fresh or forked from a warm parent; signals are passed on to it, so that it saves and stops.
What it was killed by before it could say is written to the ledger here; a warm parent that was killed is replaced. A cell that fails is
told at once and is no error of the worker: the other cells go on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from heads_lightning.composition.saved import from_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.sweeps.cell import CLAIMED, PROGRAM
from heads_lightning.sweeps.ledger import FINISHED, Entry, Ledger, State
from heads_lightning.sweeps.slots import own_gpus
from heads_lightning.sweeps.warm import ParentEnded, WarmParent
from heads_lightning.tracking.process import REQUEUE_SIGNALS, STOP_SIGNALS, ending, is_first_rank, is_there
from heads_lightning.tracking.stopping import Stopped

STOP_FILE = ".stop"
"""In a sweep's folder: start no further cell."""
POLL_SECONDS = 0.1


def run_cell(sweep_dir: Path, identity: str, *, warm: bool, fail_fast: bool) -> None:
    """Run a cell to its end, unless it is finished, taken by another process, or the sweep is stopping.

    Raises:
        SystemExit: a signal asked to stop.
    """
    ledger = Ledger.of(sweep_dir)
    entry = ledger[identity]
    if entry.state in FINISHED or (sweep_dir / STOP_FILE).exists():
        return
    log = ledger.log_file(entry)
    log.parent.mkdir(parents=True, exist_ok=True)
    _say(f"cell {entry.number} {entry.label}\n    log: {log}")
    config = from_yaml(ledger.config_file(identity))
    with own_gpus(config) as own:
        parent = _warm_parent(config) if warm else None
        process = _started(parent, [str(sweep_dir), identity], log=log, environment={**os.environ, **own})
        with _signals_passed_on(process) as received:
            end = process.wait()
    if is_first_rank() and end.code != CLAIMED:
        # a cell that lost its parent was asked to stop by the kernel: nobody else wanted that
        _conclude(ledger, identity, end.reason, lost=end.code is None and not received, fail_fast=fail_fast)
    if received:
        _obey(received[0])


def _conclude(ledger: Ledger, identity: str, reason: str, *, lost: bool, fail_fast: bool) -> None:
    """Tell how the cell ended; write it where the cell itself could not, or does not know what happened (`lost`)."""
    entry = ledger[identity]
    if entry.state == State.running or (lost and entry.state not in FINISHED):
        ledger.record(identity, State.failed, reason=reason)
        entry = ledger[identity]
    _say(outcome_line(entry))
    if entry.state == State.failed:
        _say(f"    log: {ledger.log_file(entry)}")
        if fail_fast:
            (ledger.sweep_dir / STOP_FILE).touch()


def outcome_line(entry: Entry) -> str:
    """How a cell ended, in one line."""
    losses = "  ".join(f"{key} {value:.4g}" for key, value in entry.metrics.items() if key in ("train/loss", "val/loss"))
    what = {State.failed: f"FAILED: {entry.reason}", State.stopped: f"stopped: {entry.reason}"}.get(entry.state, f"{entry.state}  {losses}")
    return f"cell {entry.number} {what.rstrip()}  ({entry.seconds:.1f} s)"


def _say(text: str) -> None:
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------ processes


class Ending(NamedTuple):
    """How a cell's process ended."""

    code: int | None
    """Negative for a signal; None where nobody was left to tell."""
    reason: str
    """In words, for a cell that could not say it itself."""

    @classmethod
    def of(cls, code: int) -> "Ending":
        """Of a process with this exit code."""
        return cls(code, ending(code) + " before it was done" * (code >= 0))


class FreshProcess:
    """A cell in a new interpreter."""

    def __init__(self, arguments: list[str], *, log: Path, environment: Mapping[str, str]) -> None:
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(environment),
                start_new_session=True,  # Ctrl-C comes once, from here
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self) -> Ending:
        """How it ended."""
        return Ending.of(self._process.wait())


class ForkedProcess:
    """A cell forked from the warm parent."""

    def __init__(self, parent: WarmParent, arguments: list[str], *, log: Path, environment: Mapping[str, str]) -> None:
        self._parent = parent
        self.pid = parent.fork(arguments, log=log, environment=environment)
        self._began = time.time()

    def wait(self) -> Ending:
        """How it ended. One whose parent is gone saves and stops, and is waited for, so that nothing runs beside the next cell."""
        try:
            return Ending.of(self._parent.wait())
        except ParentEnded as ended:
            while is_there(self.pid, since=self._began):
                time.sleep(POLL_SECONDS)
            return Ending(None, f"its warm parent was lost ({ended}), so it was stopped")


_warm: WarmParent | None = None
"""The warm parent of this process, which serves every cell that runs in it."""


def _warm_parent(config: ExperimentConfig) -> WarmParent | None:
    """The parent of this process's cells; None where they cannot be forked."""
    from heads_lightning.tracking.open_run import store_of

    global _warm
    if _warm is not None and not _warm.refusal and _warm.ending:
        _say(f"the warm parent of the cells was lost ({_warm.ending}); another one is started")
        _warm = None
    if _warm is None:
        store = store_of(config.tracking, Path(config.run_root))
        _warm = WarmParent(uri=store.uri if store else None)
        if _warm.refusal:
            _say(f"every cell starts an interpreter of its own: {_warm.refusal}")
    return None if _warm.refusal else _warm


def _started(parent: WarmParent | None, arguments: list[str], *, log: Path, environment: Mapping[str, str]) -> FreshProcess | ForkedProcess:
    if parent is not None:
        with suppress(ParentEnded):  # since it was looked at, a moment ago
            return ForkedProcess(parent, arguments, log=log, environment=environment)
    return FreshProcess(arguments, log=log, environment=environment)


def close_warm_parent() -> None:
    """End the warm parent of this process, if it has one."""
    global _warm
    if _warm is not None:
        _warm.close()
        _warm = None


# -------------------------------------------------------------------------------------------------------------- signals


@contextmanager
def _signals_passed_on(process: FreshProcess | ForkedProcess) -> Iterator[list[tuple[int, Any]]]:
    """Inside, signals go to the cell, which saves and stops; the value lists (signal, the handler it had)."""
    received: list[tuple[int, Any]] = []
    previous: dict[int, Any] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append((number, previous[number]))
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(process.pid, number)

    try:
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, pass_on)
    except ValueError:  # not the main thread: whoever owns it handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _obey(received: tuple[int, Any]) -> None:
    """Do what the signal asked for, now that the cell has saved: the handler of a launcher requeues its job."""
    number, handler = received
    if number in REQUEUE_SIGNALS and callable(handler):
        if is_first_rank():
            handler(number, None)
        else:
            time.sleep(60)  # the first rank requeues; whoever leaves earlier makes the scheduler call the job failed
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)
