"""The ledger of a sweep: which cells there are, what became of each, and who is running it.

Two choices. The ledger is a file of JSON lines that is only ever appended to, under a file lock, so workers on several machines write it
and a killed one damages nothing; the newest record of a cell is its state. And a claim on a cell is a lock that its own process holds
while it lives: the kernel gives it back whatever ends the process, so two processes never run one cell and no claim is left behind.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.registry import ConfigError
from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.run_folder import JsonLines, read_records

FILE = "ledger.jsonl"
CELLS = "cells"
LOGS = "logs"


class State(StrEnum):
    """What became of a cell."""

    pending = "pending"
    """Not begun."""
    running = "running"
    """Begun; where nobody holds its claim, it was killed."""
    done = "done"
    """Trained to the end."""
    pruned = "pruned"
    """Ended early, since others were better at the same step."""
    failed = "failed"
    """An error of its own ended it."""
    stopped = "stopped"
    """A signal ended it; it goes on from its checkpoint."""


FINISHED = (State.done, State.pruned)
"""States that are not run again."""


class Entry(NamedTuple):
    """A cell and its newest state."""

    hash: str
    """Identity: `config_hash` of its resolved config."""
    number: int
    """Position in the sweep."""
    folder: str
    """Run folder, relative to the sweep's."""
    overrides: tuple[str, ...]
    """What tells it from the others, for people."""
    trial: int | None = None
    """Number of the trial in the study of `hydra/sweeper=optuna`."""
    state: State = State.pending
    reason: str = ""
    """Why it failed or stopped, in one line."""
    metrics: dict[str, float] = {}  # noqa: RUF012  never changed
    """Last value of every metric, once it is done."""
    seconds: float = 0.0
    """Time of its last process."""

    @property
    def label(self) -> str:
        """What tells it from the others, in one line."""
        return " ".join(self.overrides) or "(no overrides)"


class Ledger:
    """The ledger in the folder of a sweep."""

    def __init__(self, sweep_dir: Path) -> None:
        self.sweep_dir = sweep_dir
        self.path = sweep_dir / FILE

    @classmethod
    def of(cls, folder: Path) -> "Ledger":
        """The ledger of an existing sweep.

        Raises:
            ConfigError: the folder holds none.
        """
        if not (folder / FILE).is_file():
            raise ConfigError(f"{folder} is not the folder of a sweep: it holds no {FILE}")
        return cls(folder)

    def entries(self) -> dict[str, Entry]:
        """Every cell by its hash, in the order in which they were added."""
        found: dict[str, Entry] = {}
        for record in read_records(self.path):
            identity = record["cell"]
            if "number" in record:
                facts = {"number": record["number"], "folder": record["folder"], "overrides": tuple(record["overrides"])}
                found[identity] = Entry(identity, **facts, trial=record.get("trial"))
            else:
                news = {key: record[key] for key in ("reason", "metrics", "seconds") if key in record}
                found[identity] = found[identity]._replace(**{"reason": "", **news}, state=State(record["state"]))
        return found

    def __getitem__(self, identity: str) -> Entry:
        return self.entries()[identity]

    def add(self, cells: Sequence[tuple[str, str | None, Sequence[str], str]], *, trial: int | None = None) -> list[Entry]:
        """Add cells that are not there yet, each as (hash, folder or None for its number, overrides, config); returns all of them."""
        with self._writing() as lines:
            known = self.entries()
            for identity, folder, overrides, config in cells:
                if identity in known:
                    continue
                number = len(known)
                facts = {"number": number, "folder": folder or str(number), "overrides": list(overrides)}
                self._check_folder(facts["folder"], known)
                self._write_config(identity, config)
                lines.append({"cell": identity, **facts, "trial": trial, "time": round(time.time(), 3)})
                known[identity] = Entry(identity, number, facts["folder"], tuple(overrides), trial)
        return [known[identity] for identity, *_ in cells]

    def log_file(self, entry: Entry) -> Path:
        """What the processes of a cell printed, one after the other."""
        return self.sweep_dir / LOGS / f"{entry.folder.replace('/', '_')}.log"

    def _check_folder(self, folder: str, known: dict[str, Entry]) -> None:
        taken = next((entry for entry in known.values() if entry.folder == folder), None)
        if taken is not None:
            raise ConfigError(f"hydra.sweep.subdir gives {folder} to two cells, one of them {taken.label}; let it name every varied key")

    def config_file(self, identity: str) -> Path:
        """The resolved config of a cell."""
        return self.sweep_dir / CELLS / f"{identity}.yaml"

    def _write_config(self, identity: str, config: str) -> None:
        path = self.config_file(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(config, encoding="utf-8")
        os.replace(temporary, path)

    def record(self, identity: str, state: State, **facts: Any) -> None:
        """Say what became of a cell."""
        where = {"time": round(time.time(), 3), "host": socket.gethostname(), "pid": os.getpid()}
        with self._writing() as lines:
            lines.append({"cell": identity, "state": str(state), **facts, **where})

    @contextmanager
    def claim(self, identity: str) -> Iterator[bool]:
        """Hold the claim on a cell while the block runs; the value says whether it was free."""
        (self.sweep_dir / CELLS).mkdir(parents=True, exist_ok=True)
        claimed = file_lock(self._claim_file(identity), seconds=0.05)
        try:
            claimed.__enter__()
        except TimeoutError:
            yield False
            return
        try:
            yield True
        finally:
            claimed.__exit__(None, None, None)

    def is_claimed(self, identity: str) -> bool:
        """Whether a living process runs the cell now."""
        if not self._claim_file(identity).exists():
            return False
        with self.claim(identity) as free:
            return not free

    def _claim_file(self, identity: str) -> Path:
        return self.sweep_dir / CELLS / f"{identity}.claim"

    @contextmanager
    def _writing(self) -> Iterator[JsonLines]:
        self.sweep_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(self.sweep_dir / f".{FILE}.lock"):
            lines = JsonLines(self.path)
            try:
                yield lines
                lines.sync()
            finally:
                lines.close()
