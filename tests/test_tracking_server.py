"""The record of a run where the store is a server: one that dies and comes back, one that is never there."""

import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tracked_runs import open_tracked, runs, steps, wait_for

from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.mlflow_calls import Calls, NotSent
from heads_lightning.tracking.mlflow_opening import connect, short_timeouts
from heads_lightning.tracking.mlflow_store import Store, resolve_store
from heads_lightning.tracking.open_run import RunLog
from heads_lightning.tracking.run_folder import METRICS, read_json, read_metrics

pytestmark = pytest.mark.usefixtures("no_stores_yet")


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
