"""The files of a run folder that record what happened: append-only JSON lines that outlive the process.

Two choices. Every record is one `write` of one whole line to a file opened for appending, so a process that is killed loses nothing
it has logged, and readers (the sender to MLflow, `tail -f`, a notebook) may read at any time: a line counts once it ends in a
newline. And the folder is the truth: a tracking store is a copy of it that can be brought up to date at any later time.

    metrics.jsonl      {"step": 10, "tokens": 40960, "time": 1760000000.1, "values": {"train/loss": 2.31}}
    system.jsonl       the same, for processor, memory and GPU use
    tracking.jsonl     everything else in order: opened, parameters, tags, files, finished
    config.yaml        the resolved configuration; provenance.json, git.diff: the code; artifacts/: texts, pictures, tables
    mlflow.json        which MLflow run is the copy; mlflow_sent.json: how far it goes; mlflow.log: what MLflow said

JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf" and read back as numbers.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
SYSTEM = "system.jsonl"
EVENTS = "tracking.jsonl"
CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
DIFF = "git.diff"
ARTIFACTS = "artifacts"
SIDECAR = "mlflow.json"
SENT = "mlflow_sent.json"
LOG = "mlflow.log"

logger = logging.getLogger(__name__)
_encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps would make an encoder for every record


class Point(NamedTuple):
    """Values logged together."""

    step: int
    """Optimizer step."""
    tokens: int | None
    """Positions trained on so far; None where the caller does not count them."""
    time: float
    """Unix time in seconds."""
    values: dict[str, float]
    """May hold NaN and infinity."""


class Dataset(NamedTuple):
    """Something that a run reads."""

    name: str
    digest: str
    """Equal for equal contents; 36 characters at most."""
    context: str
    """What it is read for: `train` or `validation`."""
    source_type: str
    """`local` or `hugging_face`."""
    source: dict[str, Any]
    """Where it comes from; of a local one, `uri` is its folder."""
    profile: dict[str, int]
    """Its sizes."""


class JsonLines:
    """Appends records to a file. A full disk costs the records that do not fit and one warning, never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        self._torn = _ends_in_a_torn_line(self._fd)
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        line = _encode(record).encode() + b"\n"
        if self._torn:  # what a full disk or a dead machine left behind must not swallow this record
            line = b"\n" + line
        try:
            self._torn = os.write(self._fd, line) != len(line)
        except OSError as error:
            self._torn = True
            if not self._warned:
                self._warned = True
                logger.warning("%s cannot be written (%s); the run goes on without its records", self.path, error)

    def sync(self) -> None:
        """Have the disk hold everything appended so far."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            logger.debug("fsync of %s: %s", self.path, error)

    def close(self) -> None:
        """No record can be appended after this."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _ends_in_a_torn_line(fd: int) -> bool:
    size = os.fstat(fd).st_size
    if size == 0:
        return False
    os.lseek(fd, size - 1, os.SEEK_SET)
    return os.read(fd, 1) != b"\n"


def point_record(point: Point) -> dict[str, Any]:
    """The JSON form of a point."""
    values = {k: v if math.isfinite(v) else str(v) for k, v in point.values.items()}
    return {"step": point.step, "tokens": point.tokens, "time": round(point.time, 3), "values": values}


def point_from_record(record: Mapping[str, Any]) -> Point:
    """Inverse of point_record."""
    values = {k: float(v) for k, v in record["values"].items()}
    return Point(step=record["step"], tokens=record["tokens"], time=record["time"], values=values)


class Lines(NamedTuple):
    """Whole records of a file from some offset on."""

    records: list[tuple[dict[str, Any], int]]
    """Each record with the offset in bytes at which the next one starts."""
    end: int
    """Offset behind the last whole line read, damaged ones included."""


def read_lines(path: Path, offset: int = 0, *, max_bytes: int = 1 << 16) -> Lines:
    """Whole lines from `offset` on, about `max_bytes` of them. A missing file is an empty one; damaged lines are left out."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(max_bytes)
            if data and not data.endswith(b"\n"):
                data += file.readline()
    except FileNotFoundError:
        return Lines(records=[], end=offset)
    records = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            if line.strip():
                logger.warning("%s: a damaged line before byte %d is left out", path, offset)
            continue
        if isinstance(record, dict):
            records.append((record, offset))
    return Lines(records=records, end=offset)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every record of a JSON-lines file."""
    offset = 0
    while True:
        lines = read_lines(path, offset, max_bytes=1 << 20)
        yield from (record for record, _ in lines.records)
        if lines.end == offset:
            return
        offset = lines.end


def read_metrics(run_dir: Path, file: str = METRICS) -> Iterator[Point]:
    """Every point of a run, in the order in which it was logged: what curves are drawn from."""
    for record in read_records(run_dir / file):
        yield point_from_record(record)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file at once: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def event(kind: str, **facts: Any) -> dict[str, Any]:
    """A record of tracking.jsonl."""
    return {"kind": kind, "time": round(time.time(), 3), **facts}
