"""The record of a run in real MLflow stores: embedded SQLite opened by many, every way in which a process ends, a server that dies."""

import logging
import os
import pwd
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from heads_lightning.configs.tracking import MLflowConfig, NoTrackingConfig
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps.warm import ONE_THREAD
from heads_lightning.tracking.mlflow_calls import Calls, NotSent
from heads_lightning.tracking.mlflow_opening import connect, experiment_id, short_timeouts
from heads_lightning.tracking.mlflow_run import MlflowRun
from heads_lightning.tracking.mlflow_store import Store, resolve_store
from heads_lightning.tracking.open_run import RunLog, find_run_dir, open_ahead, open_parent, open_run, reap, send_later
from heads_lightning.tracking.run_folder import EVENTS, METRICS, JsonLines, event, read_json, read_metrics

RUN = """
import sys, time
from pathlib import Path
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.open_run import open_ahead, open_run

root, name, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = MLflowConfig(flush_seconds=0.5)
if name.startswith("ahead"):
    open_ahead(config, run_root=root)
with open_run(config, run_dir=root / name, run_root=root, name=name, config_flat={"name": name}, config_yaml=f"name: {name}") as log:
    for step in range(1, 201):
        log.log_metrics({"loss": 1 / step, "b": 2.0}, step=step, tokens=step * 10)
    print("logged", flush=True)
    if ending == "exception":
        raise RuntimeError("before fit")
    while ending == "wait":
        time.sleep(0.05)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user who has never opened a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def start(root: Path, name: str, ending: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(root), name, ending]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def open_tracked(root: Path, name: str = "run", **options: Any) -> RunLog:
    config = options.pop("config", None) or MLflowConfig(flush_seconds=0.5, exit_seconds=1.0)
    arguments = {"run_dir": root / name, "config_flat": {"seed": "0"}, "config_yaml": "seed: 0\n"} | options
    return open_run(config, run_root=root, name=name, **arguments)


def client_of(root: Path) -> Any:
    return connect(resolve_store(MLflowConfig(), root, {}))


def runs(client: Any, experiment: str = "heads_lightning") -> dict[str, Any]:
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])} if found else {}


def steps(client: Any, run_id: str, name: str = "loss") -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def test_every_ending_gets_its_status_in_a_store_that_all_open_at_once(tmp_path: Path) -> None:
    signals = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL, "ahead-sigkill": signal.SIGKILL}
    processes = {name: start(tmp_path, name, "wait") for name in signals}
    processes |= {name: start(tmp_path, name, name) for name in ("ahead-normal", "exception")}
    for name, number in signals.items():
        stdout = processes[name].stdout
        assert stdout is not None
        assert stdout.readline() == "logged\n"
        os.kill(processes[name].pid, number)  # at once: the sender is still importing MLflow
    errors = {name: process.communicate(timeout=300)[1] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == {
        "ahead-normal": 0, "exception": 1, "ctrl-c": -2, "sigterm": -15, "sigkill": -9, "ahead-sigkill": -9,
    }, errors  # fmt: skip
    client = client_of(tmp_path)
    expected = {"ahead-normal": "FINISHED", "exception": "FAILED"} | dict.fromkeys(signals, "KILLED")
    # nobody waits for the senders of the two that died without a word
    wait_for(lambda: {name: run.info.status for name, run in runs(client).items()} == expected)
    for name, run in runs(client).items():
        assert steps(client, run.info.run_id) == list(range(1, 201)), name
        assert run.data.metrics["tokens"] == 2000
        assert run.data.params == {"name": name}
        assert len(run.data.tags["config_sha256"]) == 64
        assert "config.yaml" in {file.path for file in client.list_artifacts(run.info.run_id)}
        if name not in ("sigterm", "sigkill", "ahead-sigkill"):  # those were killed before git had answered and a sample was due
            assert run.data.tags["mlflow.source.name"] == f"-c {tmp_path} {name} {'wait' if name in signals else name}"
            assert "provenance.json" in {file.path for file in client.list_artifacts(run.info.run_id)}
            assert "system/cpu_utilization_percentage" in run.data.metrics
        assert find_run_dir(run.info.run_id, tmp_path) == tmp_path / name
    assert sqlite3.connect(tmp_path / "mlflow.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


FORKS = """
import os, sys
from pathlib import Path
import psutil
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.sender_process import import_to_fork
from heads_lightning.tracking.open_run import open_ahead, open_run, store_of

root, config = Path(sys.argv[1]), MLflowConfig(flush_seconds=0.5, system_metrics=False)
import_to_fork(store_of(config, root).uri)
for name in ("normal", "sigkill"):
    held = (root / f"{name}.held").open("w")  # what a fork must not keep open
    pid = os.fork()
    if pid == 0:
        open_ahead(config, run_root=root)
        (sender,) = psutil.Process().children()
        log = open_run(config, run_dir=root / name, run_root=root, name=name, config_flat={"name": name}, config_yaml="")
        assert log.wait_for_run_id(60)
        opened = {Path(file.path).name for file in sender.open_files()}
        print(sender.cmdline() == psutil.Process().cmdline(), ".mlflow.log.lock" in opened, f"{name}.held" in opened, flush=True)
        for step in range(1, 201):
            log.log_metrics({"loss": 1 / step}, step=step)
        if name == "sigkill":
            os.kill(os.getpid(), 9)
        log.finish()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux alone")
def test_a_process_that_has_imported_mlflow_forks_its_senders(tmp_path: Path) -> None:
    line = [sys.executable, "-c", FORKS, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | ONE_THREAD, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True", "False", "0", "True", "True", "False", "-9"], done
    client = client_of(tmp_path)
    wait_for(lambda: {name: run.info.status for name, run in runs(client).items()} == {"normal": "FINISHED", "sigkill": "KILLED"})
    assert all(steps(client, run.info.run_id) == list(range(1, 201)) for run in runs(client).values())


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


def test_resume_goes_on_with_the_same_run_below_the_same_parent(tmp_path: Path) -> None:
    config = MLflowConfig(flush_seconds=0.5, system_metrics=False)
    parent = open_parent(config, sweep_dir=tmp_path / "sweep", run_root=tmp_path, name="sweep")
    child = tmp_path / "sweep" / "0"
    options: dict[str, Any] = {"config": config, "run_dir": child, "parent": str(tmp_path / "sweep")}
    with open_tracked(tmp_path, "0", **options, config_flat={"seed": "0", "long": "x" * 7000, "a@b": "c"}) as log:
        for step in range(1, 11):
            log.log_metrics({"loss": step, "odd@name": 1.0, "bad": float("inf") if step in (3, 4) else 1.0}, step=step)
        log.log_text("samples/a.txt", "text")
        first = log.wait_for_run_id(60)
        check_manners(log.run_dir)
        client = client_of(tmp_path)
        assert client.get_run(first).info.status == "RUNNING"
    with open_tracked(tmp_path, "0", **options, config_flat={"seed": "1", "long": "x" * 7000, "a@b": "c"}, resume=True) as log:
        assert log.wait_for_run_id(60) == first
        assert client.get_run(first).info.status == "RUNNING"
        for step in range(6, 16):
            log.log_metrics({"loss": step}, step=step)
    parent.finish()
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert steps(client, run.info.run_id) == list(range(1, 16))
    assert steps(client, run.info.run_id, "odd_name") == list(range(1, 11))
    assert steps(client, run.info.run_id, "bad") == [1, 2, 5, 6, 7, 8, 9, 10]
    assert run.data.tags["nonfinite.bad"] == "2 values; the first at step 3: inf"
    assert (run.data.params["seed"], run.data.tags["resume_1/seed"], run.data.params["a_b"]) == ("0", "1", "c")
    assert len(run.data.params["long"]) == 6000
    assert "resume_1/long" not in run.data.tags
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert client.get_run(parent.run_id).info.status == "FINISHED"
    assert len(runs(client)) == 2
    # what is added after the end does not change how it ended
    JsonLines(child / EVENTS).append(event("tags", tags={"late": "yes"}))
    assert send_later(child) == (0, 0)
    run = client.get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["late"]) == ("FINISHED", "yes")
    # the folder is not needed to find it, and sending again changes nothing
    assert find_run_dir(first or "", tmp_path / "sweep" / "0" / "artifacts", uri=f"sqlite:///{tmp_path}/mlflow.db") == child
    (child / "mlflow_sent.json").unlink()
    assert send_later(child) == (0, 0)
    assert steps(client, run.info.run_id) == list(range(1, 16))


def check_manners(run_dir: Path) -> None:
    """The sender gives way to training: of low priority where that counts, in its session, and out of reach of Ctrl-C."""
    with open(run_dir / ".mlflow.log.lock", "rb") as lock:
        found = [p for p in psutil.Process().children() if lock.name in {file.path for file in p.open_files()}]
    (sender,) = found
    assert sender.nice() == psutil.Process().nice() + 10
    assert os.getsid(sender.pid) == os.getsid(0)
    assert os.getpgid(sender.pid) == sender.pid


def test_a_store_that_is_down_from_start_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = MLflowConfig(uri=f"http://127.0.0.1:{free_port()}", exit_seconds=1.0)
    began = time.monotonic()
    with open_tracked(tmp_path, config=config) as log:
        assert time.monotonic() - began < 2
        log.log_metrics({"loss": 1.0}, step=1, tokens=5)
        wait_for(lambda: "does not take data (connection refused)" in caplog.text)
        closing = time.monotonic()
    assert time.monotonic() - closing < 10
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2, warnings
    assert "are not in MLflow; send them when it is back" in warnings[1]
    assert [point.values for point in read_metrics(tmp_path / "run")] == [{"loss": 1.0}]
    # the command that the message names works, here with another store
    command = [*warnings[1].rpartition(": ")[2].split(), f"--uri=sqlite:///{tmp_path}/later.db"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False)
    assert (done.returncode, "is in MLflow" in done.stdout) == (0, True), done
    client = connect(resolve_store(MLflowConfig(uri=f"sqlite:///{tmp_path}/later.db"), tmp_path))
    run = runs(client)["run"]
    assert (run.info.status, run.data.metrics["loss"], run.data.metrics["tokens"]) == ("FINISHED", 1.0, 5.0)
    assert run.info.artifact_uri.startswith(f"{tmp_path}/mlartifacts/")
    assert "config.yaml" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_runs_of_dead_machines_are_reaped(tmp_path: Path) -> None:
    client = client_of(tmp_path)
    experiment = experiment_id(client, resolve_store(MLflowConfig(), tmp_path, {}), "heads_lightning")
    beats = {"dead": f"{time.time() - 1000:.0f}", "alive": f"{time.time():.0f}"}
    ids = {name: client.create_run(experiment, run_name=name, tags={"heartbeat": beat}).info.run_id for name, beat in beats.items()}
    ids["foreign"] = client.create_run(experiment, run_name="foreign").info.run_id
    assert reap(tmp_path) == [ids["dead"]]
    assert {name: client.get_run(i).info.status for name, i in ids.items()} == {"dead": "KILLED", "alive": "RUNNING", "foreign": "RUNNING"}


def test_a_store_that_can_never_be_written_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = MLflowConfig(uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(ConfigError, match=r"cannot be written \(.*: .*/file.*tracking=none"):
        open_ahead(config, run_root=tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"), open_tracked(tmp_path, config=config):
        pass
    assert not (tmp_path / "run").exists()
    open_ahead(MLflowConfig(uri=f"sqlite:///{tmp_path}/new/mlflow.db"), run_root=tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_run_that_was_deleted_goes_on_when_it_is_restored(tmp_path: Path) -> None:
    with open_run(NoTrackingConfig(), run_dir=tmp_path / "run", run_root=tmp_path, name="run", config_flat={}, config_yaml="") as log:
        copy = MlflowRun(tmp_path / "run", store=resolve_store(MLflowConfig(), tmp_path, {}), say=print)
        copy.attach(live=True)
        log.log_metrics({"loss": 1}, step=1)
        copy.send()
        client = client_of(tmp_path)
        client.delete_run(copy.run_id)
        log.log_metrics({"loss": 2}, step=2)
        with pytest.raises(NotSent, match="deleted"):
            copy.send()
        client.restore_run(copy.run_id)
        copy.send()
    assert steps(client, copy.run_id) == [1, 2]


def test_a_fresh_store_starts_from_finished_tables(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client_of(tmp_path / "first")
    capfd.readouterr()
    client = client_of(tmp_path / "second")
    assert "Creating initial MLflow database tables" not in capfd.readouterr().err
    assert client.get_experiment_by_name("Default").artifact_location == f"{tmp_path}/second/mlartifacts/Default"


# A real server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder: Path, port: int, backend: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real tracking server on the database `backend`, in a process group of its own, so that its workers die with it."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "served")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        wait_for(lambda: healthy(port) or process.poll() is not None, 120)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def log_steps(log: RunLog, first: int, last: int) -> float:
    """Log and return the longest single call in seconds."""
    longest = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        log.log_metrics({"loss": float(step)}, step=step, tokens=step)
        longest = max(longest, time.perf_counter() - began)
    return longest


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """Address of a fresh database: a file, or a PostgreSQL of its own on loopback."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/server.db"
        return
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    data, port = folder / "postgresql", free_port()
    data.mkdir()
    owner = _postgres_owner(data)
    subprocess.run([*owner, programs[-1] / "initdb", "-D", data, "-A", "trust", "-U", "tests"], check=True, capture_output=True)
    options = ["-p", str(port), "-k", data, "-c", "listen_addresses=127.0.0.1"]
    process = subprocess.Popen([*owner, programs[-1] / "postgres", "-D", data, *options], stderr=subprocess.DEVNULL)
    try:
        ready = [programs[-1] / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0)
        yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.wait(timeout=60)


def _postgres_owner(data: Path) -> list[str]:
    """Command that gives up root, as which PostgreSQL refuses to run; its folder is made reachable."""
    if os.getuid() != 0:
        return []
    user = pwd.getpwnam("postgres")
    os.chown(data, user.pw_uid, user.pw_gid)
    for parent in data.parents:  # pytest's folders are for their owner alone
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o711)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_a_server_that_dies_mid_run_costs_a_warning_and_no_value(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with database(kind, tmp_path) as backend:
        check_a_server_that_dies(backend, tmp_path, caplog)


def check_a_server_that_dies(backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="heads_lightning")
    port = free_port()
    connect(resolve_store(MLflowConfig(uri=backend), tmp_path))  # the tables; of SQLite from the template
    config = MLflowConfig(uri=f"http://127.0.0.1:{port}", flush_seconds=0.2, system_metrics=False)
    with open_tracked(tmp_path, config=config) as log:
        with server(tmp_path, port, backend) as process:
            log_steps(log, 1, 100)
            assert log.wait_for_run_id(60)
            wait_for(lambda: sent_all(log))
            kill(process)
            log.log_text("while_down.txt", "text")
            for part in range(100, 400, 10):  # a little over a second of training against a dead server
                log_steps(log, part + 1, part + 10)
                log.flush()
                time.sleep(0.05)
            wait_for(lambda: "does not take data" in caplog.text)
        with server(tmp_path, port, backend):
            log_steps(log, 401, 500)
            wait_for(lambda: "answers again" in caplog.text)
            wait_for(lambda: sent_all(log))
            log.finish()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, warnings
    assert [point.step for point in read_metrics(log.run_dir)] == list(range(1, 501))
    client = connect(Store(uri=backend, artifacts=None))
    run = runs(client)["run"]
    assert run.info.status == "FINISHED"
    assert steps(client, run.info.run_id) == list(range(1, 501))
    assert list((tmp_path / "served").rglob("while_down.txt"))


def sent_all(log: RunLog) -> bool:
    return read_json(log.run_dir / "mlflow_sent.json").get("offsets", {}).get(METRICS) == (log.run_dir / METRICS).stat().st_size


@pytest.mark.slow
def test_sixteen_first_openers(tmp_path: Path) -> None:
    processes = [start(tmp_path, f"run{i}", "normal") for i in range(16)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, errors
    client = client_of(tmp_path)
    wait_for(lambda: {run.info.status for run in runs(client).values()} == {"FINISHED"})
    found = runs(client)
    assert len(found) == 16
    assert all(steps(client, run.info.run_id) == list(range(1, 201)) for run in found.values())
    assert not any("not in MLflow" in error for error in errors)


CHILDREN = """
import sys
from pathlib import Path
from heads_lightning.configs.tracking import MLflowConfig, NoTrackingConfig
from heads_lightning.tracking.mlflow_sync import Sender, tell_person
from heads_lightning.tracking.mlflow_run import MlflowRun
from heads_lightning.tracking.mlflow_store import Store, resolve_store
from heads_lightning.tracking.open_run import open_run

root, sweep, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = resolve_store(MLflowConfig(), root, {})
for i in range(first, first + 100):
    # the record of a cell, sent by what its sender process runs: a process for each would only import MLflow two hundred times
    run = sweep / str(i)
    with open_run(NoTrackingConfig(), run_dir=run, run_root=root, name=f"cell {i}", config_flat={"seed": str(i)}, config_yaml=f"seed: {i}",
                  parent=str(sweep)) as log:
        for step in range(1, 21):
            log.log_metrics({"loss": i + 1 / step}, step=step)
    assert Sender(MlflowRun(run, store=store, say=print), parent=None, tell=tell_person).follow(None)
"""


@pytest.mark.slow
def test_two_hundred_children_of_a_sweep_written_by_two_processes(tmp_path: Path) -> None:
    """One store, one parent, two writers at once: no run, no value and no parent is lost or there twice."""
    config = MLflowConfig(flush_seconds=0.5, system_metrics=False)
    parent = open_parent(config, sweep_dir=tmp_path / "sweep", run_root=tmp_path, name="sweep")
    line = [sys.executable, "-c", CHILDREN, str(tmp_path), str(tmp_path / "sweep")]
    processes = [subprocess.Popen([*line, str(first)], stderr=subprocess.PIPE, text=True) for first in (0, 100)]
    errors = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    parent.finish()
    client = client_of(tmp_path)
    experiment = client.get_experiment_by_name("heads_lightning").experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.run_id}'", max_results=1000)
    assert sorted(int(run.data.params["seed"]) for run in children) == list(range(200))
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len(client.search_runs([experiment], max_results=1000)) == 201
    for run in children[::20]:
        history = client.get_metric_history(run.info.run_id, "loss")
        seed = int(run.data.params["seed"])
        assert sorted((metric.step, metric.value) for metric in history) == [(step, seed + 1 / step) for step in range(1, 21)]


@contextmanager
def answering(code: int) -> Iterator[str]:
    """A server that is not MLflow's: it answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "said"),
    [(200, "what answers there is not MLflow"), (401, "set MLFLOW_TRACKING_USERNAME"), (403, "forbids"), (500, "errors of its own")],
)
def test_a_server_that_is_not_mlflow_is_called_so(code: int, said: str, tmp_path: Path) -> None:
    with answering(code) as uri, short_timeouts():
        calls = Calls(tmp_path, store=Store(uri=uri, artifacts=None), say=print)
        with pytest.raises(NotSent, match=said):
            calls.call(calls.client.get_experiment_by_name, "x")


def test_a_port_of_another_server_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with answering(404) as uri, open_tracked(tmp_path, config=MLflowConfig(uri=uri, exit_seconds=0.2)):
        wait_for(lambda: "does not take data (what answers there is not MLflow (404))" in caplog.text)
    assert "the process that sends to MLflow failed" not in caplog.text
