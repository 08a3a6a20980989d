"""The record of a run in embedded MLflow stores that many open at once, and every way in which a run ends.

test_tracking_senders.py has the processes that send, test_tracking_server.py a server that dies.
"""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tracked_runs import client_of, open_tracked, runs, steps, wait_for

from heads_lightning.configs.tracking import MLflowConfig, NoTrackingConfig
from heads_lightning.registry import ConfigError
from heads_lightning.tracking.mlflow_calls import NotSent
from heads_lightning.tracking.mlflow_opening import connect, experiment_id
from heads_lightning.tracking.mlflow_run import MlflowRun
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.open_run import RunLog, find_run_dir, open_ahead, open_parent, open_run, reap, send_later
from heads_lightning.tracking.run_folder import EVENTS, JsonLines, event

pytestmark = pytest.mark.usefixtures("no_stores_yet")

RUN = """
import os, sys, time
from pathlib import Path
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.tracking.open_run import open_ahead, open_run

root, name, ending = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = MLflowConfig(flush_seconds=0.5)
if name.startswith("ahead"):
    open_ahead(config, run_root=root)
with open_run(config, run_dir=root / name, run_root=root, name=name, config_flat={"name": name}, config_yaml=f"name: {name}") as log:
    if name in ("ahead-normal", "sigkill") and os.fork() == 0:  # a data worker that outlives the run and holds open what it was handed
        os.closerange(0, 3)
        end = time.monotonic() + 200
        while not (root / "ended").exists() and time.monotonic() < end:
            time.sleep(0.2)
        os._exit(0)
    for step in range(1, 201):
        log.log_metrics({"loss": 1 / step, "b": 2.0}, step=step, tokens=step * 10)
    print("logged", flush=True)
    if ending == "exception":
        raise RuntimeError("before fit")
    while ending == "wait":
        time.sleep(0.05)
"""


def start(root: Path, name: str, ending: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(root), name, ending]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_ending_gets_its_status_in_a_store_that_all_open_at_once(tmp_path: Path) -> None:
    began = int(time.time())
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
    assert "still taking" not in errors["ahead-normal"]  # the sender ended at once, though its stream is held open
    client = client_of(tmp_path)
    expected = {"ahead-normal": "FINISHED", "exception": "FAILED"} | dict.fromkeys(signals, "KILLED")
    # nobody waits for the senders of the two that died without a word
    wait_for(lambda: {name: run.info.status for name, run in runs(client).items()} == expected)
    (tmp_path / "ended").touch()
    for name, run in runs(client).items():
        assert steps(client, run.info.run_id) == list(range(1, 201)), name
        logged = {metric.timestamp for metric in client.get_metric_history(run.info.run_id, "loss")}
        times = [run.info.start_time, min(logged), max(logged), run.info.end_time]
        assert times == sorted(times), name
        assert began * 1000 <= times[0] <= times[-1] <= time.time() * 1000
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


def test_resume_goes_on_with_the_same_run_below_the_same_parent(tmp_path: Path) -> None:
    config = MLflowConfig(flush_seconds=0.5, system_metrics=False)
    parent = open_parent(config, sweep_dir=tmp_path / "sweep", run_root=tmp_path, name="sweep")
    child = tmp_path / "sweep" / "0"
    options: dict[str, Any] = {"config": config, "run_dir": child, "parent": str(tmp_path / "sweep")}
    with open_tracked(tmp_path, "0", **options, config_flat={"seed": "0", "long": "x" * 7000, "a@b": "c"}) as log:
        for step in range(1, 11):
            log.log_metrics({"loss": step, "odd@name": 1.0, "odd_name": 2.0, "bad": float("inf") if step in (3, 4) else 1.0}, step=step)
        log.log_text("samples/a.txt", "text")
        first = log.wait_for_run_id(60)
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
    odd = {name: value for name, value in run.data.metrics.items() if name.startswith("odd")}
    assert sorted(odd.values()) == [1.0, 2.0]  # MLflow has one name for both
    assert all(steps(client, run.info.run_id, name) == list(range(1, 11)) for name in odd)
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
    """What was not taken is tried again, and counted once."""
    with open_run(NoTrackingConfig(), run_dir=tmp_path / "run", run_root=tmp_path, name="run", config_flat={}, config_yaml="") as log:
        copy = MlflowRun(tmp_path / "run", store=resolve_store(MLflowConfig(), tmp_path, {}), say=print)
        copy.attach(live=True)
        log.log_metrics({"loss": 1}, step=1)
        copy.send()
        client = client_of(tmp_path)
        client.delete_run(copy.run_id)
        for values in ({"bad": float("nan")}, {"loss": 2}):  # a tag is refused, then a value
            log.log_metrics(values, step=2)
            with pytest.raises(NotSent, match="deleted"):
                copy.send()
        client.restore_run(copy.run_id)
        copy.send()
    assert steps(client, copy.run_id) == [1, 2]
    assert client.get_run(copy.run_id).data.tags["nonfinite.bad"] == "1 values; the first at step 2: nan"
    # another store gets all of it
    other = f"sqlite:///{tmp_path}/other.db"
    assert send_later(tmp_path / "run", uri=other) == (0, 0)
    client = connect(resolve_store(MLflowConfig(uri=other), tmp_path))
    assert steps(client, runs(client)["run"].info.run_id) == [1, 2]


def test_a_run_that_was_given_back_goes_on_and_ends_as_it_ends_now(tmp_path: Path) -> None:
    def opened(*, resume: bool) -> RunLog:
        settings: dict[str, Any] = {"config_flat": {}, "config_yaml": "", "resume": resume, "first_step": 8 * resume}
        return open_run(NoTrackingConfig(), run_dir=tmp_path / "run", run_root=tmp_path, name="run", **settings)

    opened(resume=False).finish("SCHEDULED")
    copy, client = MlflowRun(tmp_path / "run", store=resolve_store(MLflowConfig(), tmp_path, {}), say=print), client_of(tmp_path)
    copy.attach(live=False)
    copy.close(default="KILLED")
    given_back = client.get_run(copy.run_id).info
    assert (given_back.status, given_back.end_time) == ("SCHEDULED", None)  # it will go on: that is no end
    log = opened(resume=True)
    copy = MlflowRun(tmp_path / "run", store=resolve_store(MLflowConfig(), tmp_path, {}), say=print)
    copy.attach(live=True)
    assert copy.last_step == 8  # until there is a point, the machine is measured at the step that training goes on from
    log.log_metrics({"loss": 1.0}, step=9)
    copy.send()
    assert copy.last_step == 9
    statuses = []
    for finish in (lambda: None, lambda: log.finish("FAILED")):
        finish()
        copy.close(default="KILLED")
        statuses.append(client.get_run(copy.run_id).info.status)
    assert statuses == ["KILLED", "FAILED"]


def test_a_fresh_store_starts_from_finished_tables(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client_of(tmp_path / "first")
    capfd.readouterr()
    client = client_of(tmp_path / "second")
    assert "Creating initial MLflow database tables" not in capfd.readouterr().err
    assert client.get_experiment_by_name("Default").artifact_location == f"{tmp_path}/second/mlartifacts/Default"


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
