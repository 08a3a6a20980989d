"""The trainer: length, batch, devices, precision, checkpoints (`trainer=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from heads_lightning.configs.base import Option
from heads_lightning.registry import ConfigError, Registry, nearest

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed")


class Parallel(StrEnum):
    """How several devices share the work."""

    auto = "auto"
    """One device: none. Several: data."""
    data = "data"
    """Every device holds the model and takes a share of the batch (DDP)."""


@dataclass
class TrainerConfig(Option):
    """How long, on what and how carefully to train. Batch sizes are in sequences."""

    group: ClassVar[str] = "trainer"

    name: str = "default"
    max_steps: int | None = None
    """Optimizer steps. Give this or max_tokens."""
    max_tokens: int | None = None
    """Positions to train on (global_batch_size * sequence_length a step); rounded up to whole steps."""
    global_batch_size: int = 32
    """Sequences of one optimizer step, over all devices and accumulation steps. The result does not depend on how it is cut."""
    micro_batch_size: int = 32
    """Sequences of one forward pass on one device."""
    accelerator: str = "auto"
    """auto, cpu, gpu or mps."""
    devices: int = 1
    """Devices (processes) on each node."""
    num_nodes: int = 1
    """Machines."""
    parallel: Parallel = Parallel.auto
    """How several devices share the work."""
    precision: str = "auto"
    """auto (bf16-mixed where the processor multiplies bf16 faster than fp32, else 32-true), 32-true, bf16-mixed, bf16-true, 16-mixed."""
    compile: bool = False
    """torch.compile the backbone: a minute at the start, faster steps after it."""
    val_every_steps: int = 100
    """Optimizer steps between validations; there is always one at the end."""
    checkpoint_every_steps: int = 100
    """Optimizer steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_every_steps: int = 10
    """Optimizer steps between logged points; values in between are summed, not lost."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite (each is skipped and counted) before the run stops."""
    progress_bar: bool = True
    """Live progress on a terminal, plain lines elsewhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in (
            "global_batch_size", "micro_batch_size", "devices", "num_nodes",
            "val_every_steps", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps", "max_bad_steps",
        ):  # fmt: skip
            self.require(getattr(self, field) >= 1, field, "1 or more")
        for field in ("max_steps", "max_tokens"):
            self.require(getattr(self, field) is None or getattr(self, field) >= 1, field, "1 or more, or null")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={self.precision} does not exist.{nearest(self.precision, PRECISIONS)} "
                f"Available: {', '.join(PRECISIONS)}"
            )
        if self.accelerator not in ("auto", "cpu", "gpu", "mps"):
            raise ConfigError(f"trainer.accelerator={self.accelerator} does not exist; available: auto, cpu, gpu, mps")
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ConfigError(
                f"trainer.max_steps={self.max_steps} and trainer.max_tokens={self.max_tokens}: give one of them, "
                f"e.g. trainer.max_steps=1000 trainer.max_tokens=null"
            )
        if self.global_batch_size % self.world_size:
            raise ConfigError(
                f"trainer.global_batch_size={self.global_batch_size} sequences cannot be shared evenly by "
                f"{self.world_size} devices; use a multiple of {self.world_size}"
            )

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.devices * self.num_nodes

    @property
    def micro_batches(self) -> int:
        """Forward passes of one device in one optimizer step; the last one may be smaller."""
        return -(-(self.global_batch_size // self.world_size) // self.micro_batch_size)

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // (self.global_batch_size * sequence_length))


trainers: Registry[TrainerConfig] = Registry("trainer", TrainerConfig)
trainers.register("default")(TrainerConfig)
