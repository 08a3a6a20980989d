"""What this process is in its job (the first rank or another one), and what its ending says about the run."""

import os
import signal
from collections.abc import Mapping
from typing import Literal

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]
"""How a run ended. SCHEDULED: it was handed back to a scheduler that will start it again, and is not over."""


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals that ask training to save and stop."""
REQUEUE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Those by which a scheduler says that it will stop the job and start it again."""


def is_first_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is rank 0 of its job. RANK (torchrun) decides; else no launcher may call it anything but 0: a
    process that Lightning starts inside a SLURM job inherits SLURM_PROCID=0 and has its own LOCAL_RANK."""
    if "RANK" in environment:
        return environment["RANK"] == "0"
    return all(environment.get(name, "0") == "0" for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def status_of(error: BaseException | None) -> Status:
    """The status that an exception, or none, gives a run.

    Lightning turns Ctrl-C into SystemExit(1) and SIGTERM into its own kind of SystemExit: what stands behind an exit decides.
    """
    if error is None:
        return "FINISHED"
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, KeyboardInterrupt) or any(kind.__name__ == "SIGTERMException" for kind in type(cause).__mro__):
            return "KILLED"
        cause = (cause.__cause__ or cause.__context__) if isinstance(cause, SystemExit) else None
    if isinstance(error, SystemExit):
        code = error.code or 0
        # 128 + the number of the signal, the way a shell reports it
        if isinstance(code, int) and code - 128 in REQUEUE_SIGNALS:
            return "SCHEDULED"
        return "FINISHED" if code == 0 else "KILLED" if isinstance(code, int) and 128 < code < 160 else "FAILED"
    return "FAILED"


def ending(code: int) -> str:
    """How a process ended, in words.

    Args:
        code: its exit code; negative for a signal.
    """
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def is_there(pid: int, *, since: float) -> bool:
    """Whether a process of this machine lives that was there at the Unix time `since`; one that took over its number is younger."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1
    except psutil.NoSuchProcess:
        return False
