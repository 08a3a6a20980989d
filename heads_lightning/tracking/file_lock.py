"""A lock between processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_SECONDS = 300.0
"""Whoever wants a lock waits this long; each is held for a fraction of a second, the one of a user's very first store for some."""


@contextmanager
def file_lock(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """An exclusive lock between processes; where the file system has none, one that is made of the file's existence."""
    from filelock import FileLock, SoftFileLock

    try:
        lock = FileLock(path)
        lock.acquire(timeout=seconds)
    except (NotImplementedError, PermissionError):
        lock = SoftFileLock(f"{path}.soft")
        lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        lock.release()
