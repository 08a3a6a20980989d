"""GPUs handed out one to a job: cells that run side by side on one machine never share one.

A slot is a file lock in the machine's temporary folder, held by the job's supervisor while the cell runs, so two sweeps of one user respect
each other and a killed one leaves no slot taken. Inside a SLURM job the scheduler has handed out the devices already.
"""

import getpass
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from heads_lightning.composition.validation import available_gpus
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.tracking.file_lock import file_lock

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs that this process may use."""
    named = environment.get(VISIBLE)
    return [str(i) for i in range(available_gpus())] if named is None else [name.strip() for name in named.split(",") if name.strip()]


@contextmanager
def own_gpus(config: ExperimentConfig, environment: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
    """Variables for a cell's environment that leave it as many GPUs as it asks for, waiting until so many are free.

    Nothing is set for a cell on the CPU, under SLURM, or where the machine has fewer GPUs than it asks for (it will say so itself).
    """
    names = [] if config.trainer.accelerator in ("cpu", "mps") or "SLURM_JOB_ID" in environment else visible_gpus(environment)
    if not config.trainer.devices <= len(names):
        yield {}
        return
    with slots(names, config.trainer.devices) as mine:
        yield {VISIBLE: ",".join(mine)}


@contextmanager
def slots(names: Sequence[str], count: int, *, folder: Path | None = None) -> Iterator[list[str]]:
    """Hold `count` of the slots `names`; waits. Several are taken at once or not at all, so waiting jobs cannot block each other."""
    folder = folder or Path(tempfile.gettempdir()) / f"heads_lightning-{getpass.getuser()}-gpus"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with ExitStack() as held:
            mine = []
            with file_lock(folder / "all.lock"):
                for name in names:
                    if len(mine) < count and _try(held, folder / f"{name.replace('/', '_')}.lock"):
                        mine.append(name)
            if len(mine) == count:
                yield mine
                return
        time.sleep(POLL_SECONDS)


def _try(held: ExitStack, lock: Path) -> bool:
    try:
        held.enter_context(file_lock(lock, seconds=0))
    except TimeoutError:
        return False
    return True
