"""All ranks of a job run one experiment in one folder: what a launcher could get wrong is seen before the first step.

A launcher that lets every process parse the command line for itself can train each rank with other settings, without an error: in a
sweep, or where a default depends on the clock or on the machine. So the resolved config is hashed on every rank and gathered.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from heads_lightning.configs.trainer import LinearKernel, TrainerConfig
from heads_lightning.registry import RunError
from heads_lightning.training.trainer import check_linear_kernel, faster_linear_kernel, resolve_precision, why_not_onednn

MEASURED = "HEADS_LIGHTNING_{}"
"""Environment variables that hand what the first rank measured for `trainer.FIELD=auto` down to the ranks that Lightning starts from it."""
log = logging.getLogger(__name__)


def settled(trainer: TrainerConfig) -> TrainerConfig:
    """The same with `auto` replaced by what it means on this machine. It is measured: so one rank measures for those that it starts, and a
    run that is resumed finds the answer in its config.

    Raises:
        ConfigError: this machine cannot do what the config asks for.
    """
    if trainer.precision == "auto":
        trainer = replace(trainer, precision=_measured("PRECISION", lambda: resolve_precision("auto", trainer.accelerator)))
    if trainer.linear_kernel == LinearKernel.auto:
        reason = why_not_onednn(trainer)
        kernel = LinearKernel.torch if reason else LinearKernel(_measured("LINEAR_KERNEL", faster_linear_kernel))
        log.debug("trainer.linear_kernel=auto takes %s: %s", kernel, reason or "an fp32 product by each was timed")
        trainer = replace(trainer, linear_kernel=kernel)
    check_linear_kernel(trainer)
    return trainer


def _measured(field: str, measure: Callable[[], str]) -> str:
    """What `measure` gives, or gave on the first rank of those that were started together."""
    variable = MEASURED.format(field)
    handed_down = os.environ.get(variable) if os.environ.get("LOCAL_RANK", "0") != "0" else None
    os.environ[variable] = value = handed_down or measure()
    return value


class SameConfig(Callback):
    """Compares the resolved config and the run folder of all ranks once, before training.

    Args:
        config_yaml: the resolved config, as it is saved.
        run_dir: folder of the run.
    """

    def __init__(self, config_yaml: str, run_dir: Path) -> None:
        self._lines = [*config_yaml.splitlines(), f"run folder: {run_dir.resolve()}"]

    @override
    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            RunError: on every rank, where any two differ.
        """
        if trainer.world_size == 1 or stage != "fit":
            return
        hashes = gathered(hashlib.sha256("\n".join(self._lines).encode()).hexdigest(), trainer.world_size)
        if len(set(hashes)) > 1:
            other = next(rank for rank, found in enumerate(hashes) if found != hashes[0])
            texts = gathered(self._lines, trainer.world_size)
            raise RunError(_difference(texts[0], texts[other], other))


def gathered(value: Any, world_size: int) -> list[Any]:
    """The values of all ranks, by rank."""
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, value)
    return found


def _difference(first: list[str], other: list[str], rank: int) -> str:
    lines = [(a.strip(), b.strip()) for a, b in zip(first, other, strict=False) if a != b] or [("", "")]
    shown = "; ".join(f"{a!r} and {b!r}" for a, b in lines[:3])
    return (
        f"rank 0 and rank {rank} were started with different configurations ({shown}): nothing was trained. "
        f"Give every setting on the command line a fixed value, or start the ranks from one saved config"
    )
