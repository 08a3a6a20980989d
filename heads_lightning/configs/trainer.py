"""The trainer: length, batch, devices, precision, checkpoints (`trainer=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from heads_lightning.configs.base import DType, Option
from heads_lightning.registry import ConfigError, Registry, nearest

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed")


class Parallel(StrEnum):
    """How several devices share the work."""

    auto = "auto"
    """One device: none. Several: data."""
    data = "data"
    """Every device holds the model and takes a share of the batch (DDP)."""
    fsdp = "fsdp"
    """Every device holds a share of the weights, gradients and optimizer state, and takes a share of the batch (FSDP2)."""
    hsdp = "hsdp"
    """fsdp inside groups of shard_size devices, data between the groups: the traffic of weights stays inside a group."""


class CheckpointFormat(StrEnum):
    """How a checkpoint lies on disk. Each reads what the other wrote, on any number of devices."""

    full = "full"
    """One file, written by the first rank while training waits."""
    distributed = "distributed"
    """A folder that every rank writes its share of, while training goes on (PyTorch's distributed checkpoints). One that is being written
    when a run is killed is lost: the run goes on from the one before it."""


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
    shard_size: int | None = None
    """Devices that share one copy of the model (hsdp only). None: those of one node."""
    reshard: bool = True
    """fsdp, hsdp: free a block's gathered weights after the forward pass and gather them again for the backward pass. False: a third
    less traffic for the memory of all weights."""
    gather_dtype: DType = DType.float32
    """fsdp, hsdp: type of gathered weights. float32 gives the numbers of data parallelism; bfloat16 halves the traffic, and the residual
    stream is bfloat16 too. Gradients are reduced, and weights kept, in float32."""
    precision: str = "auto"
    """auto (bf16-mixed where the processor multiplies bf16 faster than fp32, else 32-true), 32-true, bf16-mixed, bf16-true, 16-mixed."""
    compile: bool = False
    """torch.compile the backbone: a minute at the start, faster steps after it."""
    compile_blocks: bool = False
    """Compile each block by itself: the time at the start does not grow with depth. Always so with parallel=fsdp or hsdp."""
    recompute_every: int = 0
    """Blocks whose inputs alone are kept for the backward pass, which runs them again: 0 none, 1 all, 2 every second, … All: memory of
    activations falls to about that of one block plus one hidden state a block, for a third more compute."""
    val_every_steps: int = 100
    """Optimizer steps between validations; there is always one at the end."""
    checkpoint_every_steps: int = 100
    """Optimizer steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 0
    """Checkpoints to keep beside the newest, whatever their age: those with the best keep_best_metric. Only a step that is both saved and
    validated has one."""
    keep_best_metric: str = "val/loss"
    """Metric of validation, lower is better, that keep_best goes by."""
    checkpoint_format: CheckpointFormat = CheckpointFormat.full
    """How a checkpoint lies on disk."""
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
        self.require(self.recompute_every >= 0, "recompute_every", "0 or more")
        self.require(self.keep_best >= 0, "keep_best", "0 or more")
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
        self._check_layout()

    def _check_layout(self) -> None:
        """Refuse sizes that do not fit the number of devices."""
        if self.shard_size is not None and self.parallel != Parallel.hsdp:
            raise ConfigError(f"trainer.shard_size={self.shard_size} belongs to trainer.parallel=hsdp, not {self.parallel}; leave it out")
        if not self.is_sharded:
            return
        if self.world_size == 1:
            raise ConfigError(
                f"trainer.parallel={self.parallel} needs several devices, not 1; use trainer.devices=2 or trainer.parallel=auto"
            )
        if self.precision == "16-mixed":
            raise ConfigError(
                f"trainer.precision=16-mixed does not go with trainer.parallel={self.parallel}; use trainer.precision=bf16-mixed"
            )
        if self.parallel == Parallel.hsdp and (self.world_size % self.shards or not 1 < self.shards < self.world_size):
            fitting = [str(n) for n in range(2, self.world_size) if self.world_size % n == 0]
            instead = f"use trainer.shard_size={' or '.join(fitting)}" if fitting else "use trainer.parallel=fsdp"
            raise ConfigError(
                f"trainer.parallel=hsdp cannot make groups of {self.shards} of {self.world_size} devices (each group shards one copy of "
                f"the model, and there are several groups); {instead}"
            )

    @property
    def is_sharded(self) -> bool:
        """A device holds a share of the weights."""
        return self.parallel in (Parallel.fsdp, Parallel.hsdp)

    @property
    def shards(self) -> int:
        """Devices that share one copy of the model."""
        if self.parallel == Parallel.hsdp:
            return self.shard_size or self.devices
        return self.world_size if self.is_sharded else 1

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
