"""The record of a run without MLflow: files, statuses, addresses, provenance."""

import errno
import fcntl
import inspect
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_ten_mistakes import check

from heads_lightning.configs.tracking import MLflowConfig, NoTrackingConfig
from heads_lightning.registry import ConfigError
from heads_lightning.tracking import provenance
from heads_lightning.tracking.file_lock import file_lock
from heads_lightning.tracking.mlflow_header import read_header
from heads_lightning.tracking.mlflow_limits import allowed_name, cut
from heads_lightning.tracking.mlflow_lookup import find_run_dir
from heads_lightning.tracking.mlflow_opening import on_local_disk
from heads_lightning.tracking.mlflow_store import Store, resolve_store, ui_command
from heads_lightning.tracking.open_run import FolderRunLog, NullRunLog, RunLog, check_nobody_trains, is_first_rank, open_run, status_of
from heads_lightning.tracking.process import REQUEUE_SIGNALS
from heads_lightning.tracking.run_folder import METRICS, JsonLines, Point, point_record, read_lines, read_metrics, read_records, write_json
from heads_lightning.tracking.stopping import Stopped
from heads_lightning.tracking.system_metrics import SystemMetrics, parse_nvidia_smi


def open_untracked(folder: Path, **options: object) -> RunLog:
    arguments: dict = {"config_flat": {"seed": "0"}, "config_yaml": "seed: 0\n"} | options
    return open_run(NoTrackingConfig(), run_dir=folder / "run", run_root=folder, name="run", **arguments)


# Records


def test_points_come_back_as_they_were_logged(tmp_path: Path) -> None:
    with open_untracked(tmp_path) as log:
        log.log_metrics({"loss": 2.5, "grad_norm": math.inf}, step=1, tokens=64)
        log.log_metrics({"loss": math.nan, "low": -math.inf}, step=2)
        # a reader sees a point once it is logged: a killed run loses none
        first, second = read_metrics(log.run_dir)
    assert (first.step, first.tokens, first.values) == (1, 64, {"loss": 2.5, "grad_norm": math.inf})
    assert (second.step, second.tokens, second.values["low"]) == (2, None, -math.inf)
    assert math.isnan(second.values["loss"])
    assert abs(first.time - os.path.getmtime(log.run_dir / METRICS)) < 60


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')  # the machine died here
    assert [r for r, _ in read_lines(path).records] == [{"a": 1}]
    lines = JsonLines(path)
    lines.append({"a": 3})
    lines.close()
    assert list(read_records(path)) == [{"a": 1}, {"a": 3}]


def test_reading_goes_on_at_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path)
    for i in range(100):
        lines.append({"i": i, "text": "x" * 50})
    found, offset = [], 0
    while (part := read_lines(path, offset, max_bytes=300)).end != offset:
        found += [r["i"] for r, _ in part.records]
        offset = part.end
    assert found == list(range(100))
    assert read_lines(tmp_path / "missing.jsonl").records == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_warns_once_and_does_not_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(Path("/dev/full"))
    for i in range(5):
        lines.append({"i": i})
    assert [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()][1:] == []
    assert "No space left" in caplog.text


def test_resume_repeats_no_point_and_loses_none(tmp_path: Path) -> None:
    with open_untracked(tmp_path) as log:
        for step in range(1, 11):
            log.log_metrics({"train/loss": step}, step=step)
        log.log_metrics({"validation/loss": 5}, step=5)  # killed in the validation of step 10
    with open_untracked(tmp_path, resume=True) as log:
        for step in range(6, 16):  # the checkpoint was at step 5
            log.log_metrics({"train/loss": step}, step=step)
            if step % 5 == 0:
                log.log_metrics({"validation/loss": step}, step=step)
    points = list(read_metrics(log.run_dir))
    assert [p.step for p in points if "train/loss" in p.values] == list(range(1, 16))
    assert [p.step for p in points if "validation/loss" in p.values] == [5, 10, 15]


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    open_untracked(tmp_path).finish()
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/step-00000001.ckpt").touch()
    with pytest.raises(ConfigError, match=r"holds a run already; go on with it by resume="):
        open_untracked(tmp_path)


def test_the_folder_explains_the_run(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with open_untracked(tmp_path) as log:
        log.log_text("samples/step_1.txt", "def f():")
        log.log_figure("loss.png", Figure())
        log.log_table("scores.json", columns=["metric", "value"], rows=[["bits", 1.5]])
        log.log_file(Path(__file__), folder="code")
        log.set_tags({"team": "speech"})
    run = log.run_dir
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    assert (run / "artifacts/samples/step_1.txt").read_text() == "def f():"
    assert (run / "artifacts/loss.png").read_bytes().startswith(b"\x89PNG")
    assert {"command", "git", "platform", "packages"} <= set(next(read_records_of_json(run / "provenance.json")))
    events = list(read_records(run / "tracking.jsonl"))
    files = {(e["path"], e["folder"]) for e in events if e["kind"] == "file"}
    assert {("artifacts/samples/step_1.txt", "samples"), ("artifacts/loss.png", ""), (str(Path(__file__)), "code")} <= files
    assert events[0]["kind"] == "open"
    assert events[-1]["kind"] == "finish"
    assert events[-1]["status"] == "FINISHED"


def read_records_of_json(path: Path):
    import json

    yield json.loads(path.read_text())


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_an_artifact_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with open_untracked(tmp_path) as log, pytest.raises(ValueError, match="no name for an artifact"):
        log.log_text(name, "")


def test_a_resumed_run_began_when_it_first_did_and_is_copied_as_it_now_asks(tmp_path: Path) -> None:
    open_untracked(tmp_path, parent="one").finish()
    open_untracked(tmp_path, parent="another", resume=True).finish()
    first, last = (record for record in read_records(tmp_path / "run" / "tracking.jsonl") if record["kind"] == "open")
    header = read_header(tmp_path / "run")
    assert header.started == first["time"] < last["time"]
    assert header.parent == "another"


def test_resuming_with_another_config_keeps_both(tmp_path: Path) -> None:
    open_untracked(tmp_path).finish()
    open_untracked(tmp_path, resume=True, config_flat={"seed": "1"}, config_yaml="seed: 1\n").finish()
    events = list(read_records(tmp_path / "run/tracking.jsonl"))
    tags = {k: v for e in events if e["kind"] == "tags" for k, v in e["tags"].items()}
    assert [e["params"] for e in events if e["kind"] == "params"] == [{"seed": "0"}]
    assert tags["resume_1/seed"] == "1"
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 0\n"
    assert (tmp_path / "run/config_1.yaml").read_text() == "seed: 1\n"


# How a run ends


class SIGTERMException(SystemExit):
    """Stands in for Lightning's class of this name."""


def exit_after(error: BaseException, code: int) -> SystemExit:
    try:
        try:
            raise error
        except BaseException:
            sys.exit(code)
    except SystemExit as final:
        return final


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (ValueError(), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(None), "FINISHED"),
        (SystemExit(1), "FAILED"),
        (SystemExit("message"), "FAILED"),
        (SystemExit(130), "KILLED"),
        (SystemExit(143), "KILLED"),
        (Stopped(signal.SIGTERM), "KILLED"),
        *((Stopped(number), "SCHEDULED") for number in REQUEUE_SIGNALS),  # the job gave itself back
        (SIGTERMException(), "KILLED"),
        (exit_after(KeyboardInterrupt(), 1), "KILLED"),  # what Lightning makes of Ctrl-C
        (exit_after(ValueError(), 1), "FAILED"),
    ],
)
def test_status(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status


def test_the_first_status_stays(tmp_path: Path) -> None:
    with open_untracked(tmp_path) as log:
        log.finish("KILLED")
    log.finish("FAILED")
    assert [e["status"] for e in read_records(log.run_dir / "tracking.jsonl") if e["kind"] == "finish"] == ["KILLED"]


# Ranks


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun under srun numbers nodes its own way
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_first_rank(environment: dict[str, str], first: bool) -> None:
    assert is_first_rank(environment) is first


def test_other_ranks_record_nothing_with_the_same_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with open_untracked(tmp_path) as log:
        assert type(log) is NullRunLog
        log.log_metrics({"a": 1}, step=1)
        log.log_text("a", "b")
        log.log_file(Path("missing"))
        log.log_table("t", columns=[], rows=[])
        log.flush()
        assert log.wait_for_run_id(0) is None
        assert log.describe()
        assert log.ui_command() is None
    assert not (tmp_path / "run").exists()


def test_leaves_take_the_same_calls() -> None:
    for name, function in inspect.getmembers(RunLog, inspect.isfunction):
        for leaf in (FolderRunLog, NullRunLog):
            assert inspect.signature(getattr(leaf, name)) == inspect.signature(function), f"{leaf.__name__}.{name}"


# Addresses


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "sqlite:///a.db", "postgresql+psycopg://u:p@h/db", "databricks", "databricks://profile"]
)
def test_addresses_that_can_be_stores(uri: str) -> None:
    assert MLflowConfig(uri=uri).uri == uri


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("./mlruns", r"tracking\.uri=sqlite:///\./mlruns/mlflow\.db"),
        ("file:///data/mlruns", r"tracking\.uri=sqlite:////data/mlruns/mlflow\.db"),
        ("htp://host:5000", r"Did you mean 'http'\?.*tracking\.uri=http://localhost:5000"),
        ("localhost:5000", r"tracking\.uri=http://localhost:5000"),
    ],
)
def test_addresses_that_cannot(uri: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice) as caught:
        MLflowConfig(uri=uri)
    assert "\n" not in str(caught.value)


def test_which_store(tmp_path: Path) -> None:
    embedded = resolve_store(MLflowConfig(), tmp_path, {})
    assert embedded == Store(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=f"{tmp_path}/mlartifacts")
    assert resolve_store(MLflowConfig(), tmp_path, {"MLFLOW_TRACKING_URI": "http://h"}).uri == "http://h"
    assert resolve_store(MLflowConfig(uri="http://own"), tmp_path, {"MLFLOW_TRACKING_URI": "http://h"}).uri == "http://own"
    with pytest.raises(ConfigError, match=r"\$MLFLOW_TRACKING_URI=mlruns is a folder"):
        resolve_store(MLflowConfig(), tmp_path, {"MLFLOW_TRACKING_URI": "mlruns"})
    with pytest.raises(ConfigError, match="names no database file"):
        resolve_store(MLflowConfig(uri=f"sqlite:///{tmp_path}"), tmp_path, {})


def test_passwords_are_not_written(tmp_path: Path) -> None:
    secret = os.urandom(8).hex()  # not a word of this file, which the recorded git diff may quote
    config = MLflowConfig(uri=f"http://me:{secret}@127.0.0.1:9", exit_seconds=0)
    run = open_run(config, run_dir=tmp_path / "run", run_root=tmp_path, name="a", config_flat={}, config_yaml="")
    run.finish()
    assert run.uri == "http://me:***@127.0.0.1:9"
    assert secret not in f"{run.ui_command()} {run.describe()}"
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []


def test_the_command_that_shows_a_run(tmp_path: Path) -> None:
    command = ui_command(resolve_store(MLflowConfig(), tmp_path, {}))
    assert command.endswith(f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db")
    page = ui_command(Store(uri="http://h:5000", artifacts=None), experiment_id="1", run_id="abc")
    assert page == "python -m webbrowser http://h:5000/#/experiments/1/runs/abc"


def test_a_run_folder_is_found_by_its_sidecar(tmp_path: Path) -> None:
    folder = tmp_path / "2026" / "a"
    folder.mkdir(parents=True)
    write_json(folder / "mlflow.json", {"run_id": "abc"})
    assert find_run_dir("abc", tmp_path) == folder
    assert find_run_dir("other", tmp_path) is None


def test_names_and_values_that_mlflow_takes() -> None:
    assert allowed_name("train/loss") == "train/loss"
    assert allowed_name("loss@5 (é)") == "loss_5 ___"
    assert allowed_name("/a//b/") == "a/b"
    assert allowed_name("../x") == "_x"
    assert len(allowed_name("x" * 300)) == 250
    assert cut("x" * 300, 100).endswith("(cut)")
    assert len(cut("x" * 300, 100)) == 100


def test_a_disk_of_this_machine_is_local() -> None:
    assert on_local_disk(Path("/proc"))


# Where a run comes from


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_and_changes(tmp_path: Path) -> None:
    git(tmp_path, "init", "-b", "work")
    (tmp_path / "a.py").write_text("old\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = provenance.git_state(tmp_path)
    assert clean.commit is not None
    assert (len(clean.commit), clean.branch, clean.dirty) == (40, "work", False)
    git(tmp_path, "remote", "add", "origin", "https://me:token@host/r.git")
    (tmp_path / "a.py").write_text("new\n")
    (tmp_path / "b.py").write_text("")
    dirty = provenance.git_state(tmp_path)
    assert "-old\n+new\n" in dirty.diff
    assert "# untracked: b.py" in dirty.diff
    assert dirty.remote == "https://host/r.git"
    # the recorded file is a patch that git takes back
    git(tmp_path, "stash")
    (tmp_path / "saved.diff").write_text(dirty.diff)
    git(tmp_path, "apply", "saved.diff")
    assert (tmp_path / "a.py").read_text() == "new\n"


COLLECT_WHILE_FORKING = """
import os, signal, threading, time
from heads_lightning.tracking import provenance

children, done = [], threading.Event()

def fork():
    while not done.is_set():
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        children.append(pid)
        time.sleep(0.001)

thread = threading.Thread(target=fork)
thread.start()
provenance.collect()
done.set()
thread.join()
print(len(children), [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]])
for pid in children:
    os.kill(pid, signal.SIGKILL)
"""


def test_workers_that_are_forked_meanwhile_hold_nothing_up() -> None:
    """Each inherits what is open; none has ended when the description of the run is there."""
    done = subprocess.run([sys.executable, "-c", COLLECT_WHILE_FORKING], capture_output=True, text=True, timeout=50, check=True)
    count, ended = done.stdout.split(maxsplit=1)
    assert int(count) > 5
    assert ended.strip() == "[]"


def test_outside_a_repository_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_state(tmp_path) == provenance.GitState(commit=None, branch=None, diff="", remote=None)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(tmp_path).commit is None
    assert provenance.collect().packages["torch"]


# The machine


def test_system_metrics_of_this_process(tmp_path: Path) -> None:
    values = SystemMetrics(os.getpid(), tmp_path).sample()
    assert values["system/process_memory_megabytes"] > 10
    assert 0 <= values["system/disk_usage_percentage"] <= 100
    assert all(math.isfinite(v) for v in values.values())


def test_nvidia_smi_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    values = parse_nvidia_smi("0, 10, 100, 5, 50.0\n1, 1000, 2000, 75, [N/A]\nnonsense\n")
    assert values["system/gpu_1_utilization_percentage"] == 75
    assert values["system/gpu_1_memory_usage_percentage"] == 50
    assert "system/gpu_1_power_usage_watts" not in values
    assert not any("gpu_0" in name for name in values)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, heads_lightning.tracking.open_run; print([m for m in ('torch', 'lightning', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_point_is_plain_json() -> None:
    record = point_record(Point(step=1, tokens=None, time=1.23456, values={"a": math.nan}))
    assert record == {"step": 1, "tokens": None, "time": 1.235, "values": {"a": "nan"}}


def test_lightning_logs_into_the_record_and_does_not_end_the_run(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    import torch

    from heads_lightning.training.run_logger import RunLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.log("train/loss", float(batch_idx))
            self.log("tokens", 10.0 * (batch_idx + 1))
            if batch_idx == 3:
                raise KeyboardInterrupt
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    log = open_untracked(tmp_path)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(logger=RunLogger(log), log_every_n_steps=1, max_epochs=1, **options)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit), log:
        trainer.fit(Module(), torch.utils.data.DataLoader(list(torch.ones(8, 2)), batch_size=1))
    signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored
    assert [(p.step, p.tokens, p.values) for p in read_metrics(log.run_dir)] == [
        (0, 10, {"train/loss": 0.0}),
        (1, 20, {"train/loss": 1.0}),
        (2, 30, {"train/loss": 2.0}),
    ]
    assert list(read_records(log.run_dir / "tracking.jsonl"))[-1]["status"] == "KILLED"


def test_a_folder_without_a_checkpoint_is_not_to_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracking.jsonl").touch()  # of a run that another process opens at this moment
    with pytest.raises(ConfigError, match=r"holds a run already; it has no checkpoint, take it away, or choose another name"):
        open_untracked(tmp_path)


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path: Path) -> None:
    log = open_untracked(tmp_path)
    check_nobody_trains(log.run_dir)  # this process itself
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        log.record("open", pid=other.pid, host=socket.gethostname())
        with pytest.raises(ConfigError) as error:
            check_nobody_trains(log.run_dir)
        line = str(error.value).replace(str(log.run_dir), "runs/mine").replace(str(other.pid), "PID")
        check("run in use", f"heads-lightning: {line}")
        other.kill()
        while other.pid in psutil.pids() and psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        check_nobody_trains(log.run_dir)  # killed, and not yet waited for
    log.finish()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files, whoever asks")
def test_a_lock_where_nothing_can_be_written_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(FileNotFoundError), file_lock(Path("/proc/heads_lightning.lock")):
        pass
    assert time.monotonic() - began < 5


def test_a_lock_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))  # what such a file system answers

    monkeypatch.setattr(fcntl, "flock", flock)
    with file_lock(tmp_path / "a.lock"), pytest.raises(TimeoutError), file_lock(tmp_path / "a.lock", seconds=0.2):
        pass
    assert not (tmp_path / "a.lock.soft").exists()
