"""A real SLURM of one node: jobs of two tasks are told to stop, give themselves back, start again, and finish as one run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm_cluster

from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.sweeps.ledger import Ledger
from heads_lightning.tracking.mlflow_opening import connect
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.run_folder import read_json, read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is one")]

STEPS = 600
LONG = [
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every_steps=20", "trainer.val_every_steps=300", "trainer.devices=2",
    "trainer.micro_batch_size=4", "tracking=mlflow", "tracking.flush_seconds=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a cluster."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield os.environ | environment | {"MLFLOW_TRACKING_URI": ""}


def wait_until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
    return found


def ask(slurm: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=slurm, capture_output=True, text=True, check=False).stdout.strip()


def preempt(slurm: dict[str, str], run_dir: Path, signal: str) -> int:
    """Signal the job that trains in `run_dir`, wait until it is queued again, let it start; returns the step that it had saved."""
    checkpoints = run_dir / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("step-*.ckpt")))
    job = ask(slurm, "squeue", "--noheader", "--format=%i").split()[0]
    ask(slurm, "scancel", f"--signal={signal}", job)
    wait_until(lambda: ask(slurm, "squeue", "--noheader", "--format=%T %r") in ("PENDING BeginTime", "PENDING None", "PENDING Dependency"))
    saved = max(int(path.stem.split("-")[1]) for path in checkpoints.glob("step-*.ckpt"))
    assert saved < STEPS
    ask(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would hold it for two minutes
    return saved


def check_one_run(run_dir: Path, run_root: Path, saved: int) -> None:
    """Every step is on record once, in the folder and in one MLflow run that is finished and was resumed once."""
    steps = [point.step for point in read_metrics(run_dir) if "train/loss" in point.values]
    assert steps == list(range(1, STEPS + 1))
    assert 0 < saved < STEPS
    client = connect(resolve_store(MLflowConfig(), run_root, {}))
    run_id = read_json(run_dir / "mlflow.json")["run_id"]
    run = wait_until(lambda: (found := client.get_run(run_id)).info.status == "FINISHED" and found)
    assert run.data.tags["resumes"] == "1"
    assert sorted(metric.step for metric in client.get_metric_history(run_id, "train/loss")) == steps


def test_a_cell_that_submitit_started_is_preempted_requeued_and_finished(slurm: dict[str, str], tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    folder = tmp_path / "s"
    launcher = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{setting}" for setting in (
        "partition=main", "mem_gb=1", "cpus_per_task=1", "tasks_per_node=2", "timeout_min=20"))]  # fmt: skip
    overrides = [*tiny, *LONG, f"run_root={tmp_path}", "seed=3,4", "sweep.filter=['seed==3']", *launcher, f"hydra.sweep.dir={folder}"]
    command = [sys.executable, "-m", "heads_lightning", "train", "-m", *overrides]
    process = subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        saved = preempt(slurm, folder / "0", "USR2")
        _, stderr = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    (entry,) = Ledger.of(folder).entries().values()
    assert str(entry.state) == "done"
    check_one_run(folder / "0", tmp_path, saved)


def test_a_job_under_srun_gives_itself_back_and_goes_on_in_its_folder(slurm: dict[str, str], tiny: list[str], tmp_path: Path) -> None:
    overrides = " ".join(f"'{override}'" for override in [*tiny, *LONG, f"run_root={tmp_path}", "name=x"])
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun {sys.executable} -m heads_lightning train {overrides}\n")
    options = ["--nodes=1", "--ntasks-per-node=2", "--mem=1000", "--requeue", "--open-mode=append", f"--output={tmp_path}/job.log"]
    submitted = ask(slurm, "sbatch", "--parsable", *options, str(script))
    run_dir = tmp_path / "x" / f"slurm-{submitted}"
    saved = preempt(slurm, run_dir, "USR1")
    wait_until(lambda: submitted not in ask(slurm, "squeue", "--noheader", "--format=%i"), seconds=200)
    assert "step" in (tmp_path / "job.log").read_text()
    check_one_run(run_dir, tmp_path, saved)
