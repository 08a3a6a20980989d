"""The processes that copy runs to MLflow: started ahead, forked, and their manners."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tracked_runs import client_of, open_tracked, runs, steps, wait_for

from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.sweeps.warm import ONE_THREAD
from heads_lightning.tracking.open_run import open_ahead

pytestmark = pytest.mark.usefixtures("no_stores_yet")

FORKS = """
import os, sys, threading, time
from pathlib import Path
import psutil
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.open_run import open_ahead, open_run, store_of
from heads_lightning.tracking.sender_process import SenderProcess, import_to_fork

root, config = Path(sys.argv[1]), MLflowConfig(flush_seconds=0.5, system_metrics=False)
uri = store_of(config, root).uri
import_to_fork(uri)


def cell(name):
    if name == "threaded":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    open_ahead(config, run_root=root)
    (sender,) = psutil.Process().children()
    print(name, sender.cmdline() == psutil.Process().cmdline(), flush=True)
    if name == "threaded":
        return
    if name == "broken":
        (root / name).mkdir()
        return SenderProcess(root / name, uri=uri).close()
    log = open_run(config, run_dir=root / name, run_root=root, name=name, config_flat={"name": name}, config_yaml="")
    assert log.wait_for_run_id(60)
    opened = {Path(file.path).name for file in sender.open_files()}
    print(".mlflow.log.lock" in opened, f"{name}.held" in opened, os.getpgid(sender.pid) == sender.pid, flush=True)
    for step in range(1, 201):
        log.log_metrics({"loss": 1 / step}, step=step)
    if name == "sigkill":
        os.kill(os.getpid(), 9)
    log.finish()


for name in ("normal", "sigkill", "threaded", "broken"):
    held = (root / f"{name}.held").open("w")  # what a fork must not keep open
    pid = os.fork()
    if pid == 0:
        cell(name)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux alone")
def test_a_process_that_has_imported_mlflow_forks_its_senders(tmp_path: Path) -> None:
    """Not beside a thread, which a fork would lose; and one that fails says why, as one with an interpreter of its own does."""
    line = [sys.executable, "-c", FORKS, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=120, check=True)
    alive = "True False True"  # its log is its own, the parent's file is closed, Ctrl-C does not reach it
    expected = f"normal True {alive} 0 sigkill True {alive} -9 threaded False 0 broken True 0"
    assert done.stdout.split() == expected.split(), done
    assert "the process that sends to MLflow failed" in done.stderr
    assert "broken is not the folder of a run" in (tmp_path / "broken" / "mlflow.log").read_text()
    client = client_of(tmp_path)
    wait_for(lambda: {name: run.info.status for name, run in runs(client).items()} == {"normal": "FINISHED", "sigkill": "KILLED"})
    assert all(steps(client, run.info.run_id) == list(range(1, 201)) for run in runs(client).values())


def test_a_sender_that_waits_for_another_store_or_died_waiting_is_not_used(tmp_path: Path) -> None:
    config = MLflowConfig(flush_seconds=0.5, system_metrics=False)

    def started_ahead(run_root: Path) -> psutil.Process:
        before = set(psutil.Process().children())
        open_ahead(config, run_root=run_root)
        (sender,) = set(psutil.Process().children()) - before
        return sender

    elsewhere = started_ahead(tmp_path / "elsewhere")
    with open_tracked(tmp_path, "first", config=config) as log:
        log.log_metrics({"loss": 1}, step=1)
        assert log.wait_for_run_id(60)
        check_manners(log.run_dir)
    dead = started_ahead(tmp_path)
    dead.kill()
    wait_for(lambda: dead.status() == psutil.STATUS_ZOMBIE)
    with open_tracked(tmp_path, "second", config=config) as log:
        log.log_metrics({"loss": 1}, step=1)
    client = client_of(tmp_path)
    assert {name: steps(client, run.info.run_id) for name, run in runs(client).items()} == {"first": [1], "second": [1]}
    wait_for(lambda: not elsewhere.is_running() or elsewhere.status() == psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "elsewhere").exists()


def test_a_sender_whose_run_is_never_opened_ends_with_its_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import psutil
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.open_run import open_ahead
open_ahead(MLflowConfig(), run_root=Path(sys.argv[1]))
print(psutil.Process().children()[0].pid)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    wait_for(lambda: not psutil.pid_exists(int(done.stdout)))
    assert list(tmp_path.iterdir()) == []
    assert done.stderr == ""


def check_manners(run_dir: Path) -> None:
    """The sender gives way to training: of low priority where that counts, in its session, and out of reach of Ctrl-C."""
    with open(run_dir / ".mlflow.log.lock", "rb") as lock:
        alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
        found = [p for p in alive if lock.name in {file.path for file in p.open_files()}]
    (sender,) = found
    assert sender.nice() == psutil.Process().nice() + 10
    assert os.getsid(sender.pid) == os.getsid(0)
    assert os.getpgid(sender.pid) == sender.pid
