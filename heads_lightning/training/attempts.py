"""One run over several attempts, started by a scheduler: the folder that all ranks agree on, and how the next attempt goes on in it.

A date in a folder's name is another one on every rank and after every restart, so under SLURM the job's number names the folder, and
under torchrun the first rank names it through the store that torchrun keeps for its workers. Nothing heavy is imported for a process
that was started alone.
"""

import logging
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.tracking.run_folder import EVENTS

CHECKPOINTS = "checkpoints"
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")

logger = logging.getLogger(__name__)


def agreed_name(environment: Mapping[str, str]) -> str | None:
    """Name of the run's folder, the same on every rank and after a restart; None for a process that was started alone."""
    if "SLURM_JOB_ID" in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        # several steps of one job are several runs; steps are counted from 0 again after a requeue
        step = environment["SLURM_STEP_ID"]
        return f"slurm-{slurm_job(environment)}" + (f"-{step}" if step != "0" else "")
    if "TORCHELASTIC_RUN_ID" in environment and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _from_torchrun(environment)
    return None


def slurm_job(environment: Mapping[str, str]) -> str:
    """The job as SLURM's commands take it; a task of an array has its own."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _from_torchrun(environment: Mapping[str, str]) -> str:
    """The first rank's clock, handed round by torchrun's own store, which outlives a restart of its workers."""
    from torch.distributed import TCPStore

    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    key = "heads_lightning/run"
    if environment["RANK"] == "0" and not store.check([key]):
        store.set(key, time.strftime("%Y-%m-%d_%H-%M-%S"))
    return store.get(key).decode()


def is_restart(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler has started this job before."""
    return any(environment.get(name, "0") not in ("", "0") for name in RESTARTS)


def continued(config: ExperimentConfig, run_dir: Path) -> ExperimentConfig:
    """The config with `resume` set to the newest checkpoint of `run_dir`, where there is one."""
    saved = sorted((run_dir / CHECKPOINTS).glob("step-*.ckpt"))
    return replace(config, resume=str(saved[-1]) if saved else None)


def set_aside(run_dir: Path) -> None:
    """Rename the folder of an attempt that left no checkpoint, so that the next one starts clean and overwrites nothing."""
    if not (run_dir / EVENTS).exists() or any((run_dir / CHECKPOINTS).glob("step-*.ckpt")):
        return
    number = 1
    while (run_dir.parent / f"{run_dir.name}-attempt{number}").exists():
        number += 1
    run_dir.rename(run_dir.parent / f"{run_dir.name}-attempt{number}")


def requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Ask SLURM to start this job again. Not under submitit, which does it by itself."""
    if "SLURM_JOB_ID" not in environment or "SUBMITIT_EXECUTOR" in environment:
        return
    done = subprocess.run(["scontrol", "requeue", slurm_job(environment)], capture_output=True, text=True, check=False)
    if done.returncode:
        logger.warning("SLURM does not take the job back (%s); start it again by hand", done.stderr.strip())
