"""Where a run comes from: commit and uncommitted changes, package versions, machine, command line.

Everything here is best effort and quick: a run outside a git repository, without git, or in a repository that git refuses to read
(another owner) records that fact and goes on. Nothing is imported to learn its version.
"""

import getpass
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

GIT_SECONDS = 10.0
"""A git that is slower than this (a cold network file system) is given up: a run does not wait for its own description."""
MAX_DIFF_BYTES = 10_000_000
"""Longer diffs are cut, visibly: data that was never committed is not a diff worth keeping with every run."""


class GitState(NamedTuple):
    """What git says about the code."""

    commit: str | None
    """Full hash of HEAD; None outside a repository or before the first commit."""
    branch: str | None
    diff: str
    """Uncommitted changes of tracked files as a patch (`git apply` takes it); then untracked files, one comment line each."""
    remote: str | None

    @property
    def dirty(self) -> bool:
        """Whether the commit alone does not describe the code."""
        return bool(self.diff)


class Provenance(NamedTuple):
    """All that a reader needs to find the code and the machine again."""

    git: GitState
    packages: dict[str, str]
    """Every installed distribution and its version."""
    platform: dict[str, str]
    command: str

    def tags(self) -> dict[str, str]:
        """The facts worth searching for. MLflow shows the `mlflow.` ones in its own columns."""
        tags = {
            "mlflow.user": self.platform["user"],
            "mlflow.source.name": self.command,
            "mlflow.source.type": "LOCAL",
            "hostname": self.platform["hostname"],
            "python": self.platform["python"],
            "git_dirty": str(self.git.dirty).lower(),
        }
        optional = {
            "mlflow.source.git.commit": self.git.commit,
            "mlflow.source.git.branch": self.git.branch,
            "mlflow.source.git.repoURL": self.git.remote,
        }
        versions = {f"version.{name}": self.packages[name] for name in ("torch", "lightning", "heads-lightning") if name in self.packages}
        return tags | {k: v for k, v in optional.items() if v} | versions

    def as_dict(self) -> dict[str, object]:
        """For provenance.json; the diff is a file of its own."""
        git = {"commit": self.git.commit, "branch": self.git.branch, "remote": self.git.remote, "dirty": self.git.dirty}
        return {"command": self.command, "git": git, "platform": self.platform, "packages": self.packages}


def collect() -> Provenance:
    """Provenance of this process: of the repository of the working folder, else of the one that this package is run from."""
    git = git_state(Path.cwd())
    if git.commit is None:
        git = git_state(Path(__file__).parent)
    return Provenance(git=git, packages=package_versions(), platform=platform_facts(), command=command_line())


def git_state(folder: Path) -> GitState:
    """State of the repository around `folder`; empty where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return GitState(commit=None, branch=None, diff="", remote=None)
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", strip=False) or ""
    if len(diff) > MAX_DIFF_BYTES:
        diff = f"{diff[:MAX_DIFF_BYTES]}\n# cut: the diff has {len(diff)} characters\n"
    untracked = (_git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or "").splitlines()
    diff += "".join(f"# untracked: {name}\n" for name in untracked[:1000])
    branch = _git(folder, "symbolic-ref", "--short", "HEAD")
    return GitState(commit=commit, branch=branch, diff=diff, remote=_without_password(_git(folder, "remote", "get-url", "origin")))


def package_versions() -> dict[str, str]:
    """Installed distributions in alphabetical order."""
    found = {}
    for distribution in distributions():
        # `distribution.metadata` parses long descriptions too: a tenth of a second for all packages, beside the first steps
        headers = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
        facts = dict(line.split(": ", 1) for line in headers.splitlines() if line.startswith(("Name: ", "Version: ")))
        if len(facts) == 2:  # half-removed packages leave folders without metadata
            found.setdefault(facts["Name"].lower(), facts["Version"])
    return dict(sorted(found.items()))


def platform_facts(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The machine and, under a scheduler, the job."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # containers run under ids that have no name
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    facts = {
        "hostname": socket.gethostname(),
        "user": user,
        "system": "-".join((platform.system(), platform.release(), platform.machine())),  # platform.platform() asks a process
        "python": platform.python_version(),
        "executable": sys.executable,
        "processors": str(os.cpu_count()),
        "folder": str(Path.cwd()),
        "pid": str(os.getpid()),
    }
    jobs = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES")
    return facts | {key.lower(): environment[key] for key in jobs if key in environment}


def command_line() -> str:
    """The command as a shell would take it."""
    return shlex.join([Path(sys.argv[0]).name if sys.argv else "python", *sys.argv[1:]])


def _git(folder: Path, *arguments: str, strip: bool = True) -> str | None:
    """Output of git, or None when it has no answer."""
    # GIT_OPTIONAL_LOCKS: a run must not take the index lock away from the person at work in that repository
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    git = shutil.which("git")
    if git is None:
        return None
    # a thread does this while training forks workers. One that inherits a pipe of ours keeps it from ending, so: a file, and what lets
    # Python start git without a pipe (posix_spawn: a whole path, no cwd, nothing to close)
    command = [git, "-C", str(folder), *arguments]
    try:
        with tempfile.TemporaryFile() as output:
            subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL,
                close_fds=False, timeout=GIT_SECONDS, check=True,
            )  # fmt: skip
            output.seek(0)
            text = output.read().decode("utf-8", errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip() if strip else text


def _without_password(url: str | None) -> str | None:
    """A remote such as https://user:token@host/… without what stands before the @."""
    if url is None or "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
