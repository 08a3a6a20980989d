"""A lock between processes."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_SECONDS = 300.0
"""Whoever wants a lock waits this long; each is held for a fraction of a second, the one of a user's very first store for some."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without locks answer."""


@contextmanager
def file_lock(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """An exclusive lock between processes; where the file system has none, one that is made of the file's existence.

    Raises:
        TimeoutError: another process holds it for longer than `seconds`.
        OSError: nothing can be written there, which no waiting would change.
    """
    from filelock import FileLock, SoftFileLock

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            if not path.exists():  # a folder that takes no files looks like a lock that is held
                tempfile.TemporaryFile(dir=path.parent).close()
            lock.acquire(timeout=seconds)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        lock = SoftFileLock(f"{path}.soft")
        lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        lock.release()
