"""Running a program that nobody has read, in a process of its own with limits: processor time, memory, file size, wall time, and no network
where the system lets an ordinary user take it away. This stops accidents and most mischief; it is no jail: a container is one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0
"""Wall time of a program, unless told otherwise; its processor time is limited to as much, rounded up."""
MEMORY_BYTES = 1 << 30
OUTPUT_BYTES = 1 << 20
"""Of everything that it writes to one file, its output included."""

# Run in the new process: limits first, then the program under the name __main__, its folder not on the path (-I).
_WRAPPER = """
import resource, runpy, sys
seconds, memory, size = map(int, sys.argv[1:4])
limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: size, resource.RLIMIT_CORE: 0}
for limit, value in limits.items():
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
sys.argv = [sys.argv[4]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Finished(NamedTuple):
    """What became of a program."""

    ok: bool
    """It ended by itself with status 0."""
    output: str
    """Standard output, cut at OUTPUT_BYTES."""
    reason: str
    """Why not: `time`, or the last line of its error output."""


def run_program(program: str, *, stdin: str = "", seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Finished:
    """Run Python source in an empty temporary folder with an empty environment."""
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        path, given = Path(folder) / "program.py", Path(folder) / "input"
        path.write_text(program, encoding="utf-8", errors="surrogateescape")
        given.write_text(stdin, encoding="utf-8", errors="surrogateescape")
        limits = [str(int(seconds) + 1), str(memory_bytes), str(OUTPUT_BYTES)]
        command = [*_without_network(), sys.executable, "-I", "-B", "-c", _WRAPPER, *limits, str(path)]
        with open(given, "rb") as read, open(Path(folder) / "out", "w+b") as out, open(Path(folder) / "err", "w+b") as err:
            process = subprocess.Popen(
                command, stdin=read, stdout=out, stderr=err, cwd=folder, env={"LANG": "C.UTF-8"}, start_new_session=True
            )
            try:
                status: int | None = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children too
                process.wait()
            out.seek(0)
            err.seek(0)
            output = out.read(OUTPUT_BYTES).decode("utf-8", "replace")
            last = (err.read(OUTPUT_BYTES).decode("utf-8", "replace").strip().splitlines() or [f"status {status}"])[-1]
    if status is None:
        return Finished(False, output, "time")
    return Finished(status == 0, output, "" if status == 0 else last)


@cache
def _without_network() -> tuple[str, ...]:
    """A command that starts another without network devices, where that is allowed (Linux user namespaces)."""
    tool = shutil.which("unshare")
    if tool is None:
        return ()
    command = (tool, "--map-root-user", "--net")
    allowed = subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True, timeout=30).returncode == 0
    return command if allowed else ()


def is_offline() -> bool:
    """Whether programs run without network."""
    return bool(_without_network())
