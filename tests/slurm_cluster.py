"""A real SLURM of one node for the tests: its own configuration, ports and folders, no accounting.

Needs slurmctld, slurmd and munge (on Debian: `apt-get install slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins`) and root, since
slurmd starts jobs as their owners.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# plain process tracking: no cgroups, which a container may not have
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# more processors than there are, so that jobs of two tasks fit
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    return "" if os.getuid() == 0 else "starting slurmd needs root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run a cluster in `folder`; the value is what its commands need in their environment."""
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, controller=_port(), daemon=_port()))
    everything = os.environ | environment
    processes = [_munged(folder, everything)]
    try:
        for program in ("slurmctld", "slurmd"):
            processes.append(subprocess.Popen([program, "-D", "-f", environment["SLURM_CONF"]], env=everything, stderr=subprocess.DEVNULL))
        _wait_until_idle(everything, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=everything, check=False, capture_output=True)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def _munged(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The daemon that proves who asks, with a key and a socket of its own."""
    own = folder / "munge"
    key = own / "munge.key"
    key.write_bytes(os.urandom(1024))
    owner = pwd.getpwnam("munge")
    for path in (own, key):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    key.chmod(0o600)
    own.chmod(0o755)
    for parent in own.parents:  # pytest's folders are for their owner alone; the daemon must reach its own
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o711)
    paths = {"key-file": key, "socket": own / "munge.socket", "pid-file": own / "pid", "log-file": own / "log", "seed-file": own / "seed"}
    options = [f"--{name}={path}" for name, path in paths.items()]
    command = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "munged", "--foreground", "--force"]
    process = subprocess.Popen([*command, *options], env=environment, stderr=subprocess.DEVNULL)
    _wait(lambda: (own / "munge.socket").exists(), "munged gives no socket")
    return process


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    def idle() -> bool:
        done = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() == "idle"

    _wait(idle, f"the node does not become idle; see the logs in {folder}")


def _wait(condition, message: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(message)
        time.sleep(0.1)


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
