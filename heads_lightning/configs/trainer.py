"""The trainer: length, batch, devices, precision, checkpoints (`trainer=…`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from heads_lightning.configs.base import DType, Option
from heads_lightning.configs.batch_sizes import BatchSizes
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
    tensor = "tensor"
    """All devices compute every sequence together: each holds some heads, feed-forward columns and rows of the vocabulary, and between
    the matrices some of the positions. For models of which one layer is too large or too slow for one device."""
    fsdp_tensor = "fsdp_tensor"
    """tensor inside groups of tensor_size devices, fsdp between the groups: the traffic of activations stays inside a group."""


class LinearKernel(StrEnum):
    """What multiplies in linear layers, forward and backward. The numbers are the same but for rounding."""

    auto = "auto"
    """onednn where it multiplies fp32 clearly faster on this machine and can be had (see onednn), else torch."""
    torch = "torch"
    """What PyTorch takes by itself: MKL on x86."""
    onednn = "onednn"
    """oneDNN, which some AMD processors run at twice the rate of MKL. For fp32 on a CPU; small layers stay torch's."""


FULLY_SHARDED = (Parallel.fsdp, Parallel.hsdp, Parallel.fsdp_tensor)
"""Layouts that gather a block's weights just before it is used."""


class CheckpointFormat(StrEnum):
    """How a checkpoint lies on disk. Each reads what the other wrote, on any number of devices."""

    full = "full"
    """One file, written by the first rank while training waits."""
    distributed = "distributed"
    """A folder that every rank writes its share of, while training goes on (PyTorch's distributed checkpoints). One that is being written
    when a run is killed is lost; so one more is written half-way between two, and dropped after the next: no kill costs more than
    checkpoint_every_steps."""


@dataclass
class TrainerConfig(Option):
    """How long, on what and how carefully to train. Batch sizes are in sequences."""

    group: ClassVar[str] = "trainer"

    name: str = "default"
    max_steps: int | None = None
    """Optimizer steps. Give this or max_tokens."""
    max_tokens: int | None = None
    """Positions to train on (global_batch_size * sequence_length a step, fewer in a batch warm-up); rounded up to whole steps."""
    global_batch_size: int = 32
    """Sequences of one optimizer step, over all devices and accumulation steps. The result does not depend on how it is cut."""
    batch_start: int | None = None
    """Sequences of an optimizer step at the beginning of training: global_batch_size divided by a power of two. Batches double up to
    global_batch_size, each size for as many steps; the learning rate is left to the schedule. None: no warm-up of the batch."""
    batch_warmup_steps: int | None = None
    """Optimizer steps until global_batch_size is reached. Give this or batch_warmup_tokens with batch_start."""
    batch_warmup_tokens: int | None = None
    """The same in positions, rounded up to whole steps."""
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
    tensor_size: int | None = None
    """Devices that compute a sequence together (fsdp_tensor; with tensor it is all of them). None: those of one node."""
    offload: bool = False
    """fsdp, hsdp, fsdp_tensor: keep weights, gradients and optimizer state in the host's memory, and update them there: a device holds a
    block at a time. Much slower; for a model that fits in no other way."""
    reshard: bool = True
    """fsdp, hsdp, fsdp_tensor: free a block's gathered weights after the forward pass and gather them again for the backward pass.
    False: a third less traffic for the memory of all weights."""
    gather_dtype: DType = DType.float32
    """fsdp, hsdp, fsdp_tensor: type of gathered weights. float32 gives the numbers of data parallelism; bfloat16 halves the traffic, and
    the residual stream is bfloat16 too. Gradients are reduced, and weights kept, in float32."""
    precision: str = "auto"
    """auto (bf16-mixed where the processor multiplies bf16 faster than fp32, else 32-true), 32-true, bf16-mixed, bf16-true, 16-mixed."""
    linear_kernel: LinearKernel = LinearKernel.auto
    """What multiplies in linear layers."""
    compile: bool = False
    """torch.compile the backbone: a minute at the start, faster steps after it."""
    compile_blocks: bool = False
    """Compile each block by itself: the time at the start does not grow with depth. Always so where weights are
    sharded."""
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
    profile_step: int | None = None
    """Optimizer step (from 1) with which PyTorch's profiler records three steps into the run folder: profile.txt, profile.json.gz. Not the
    first ones, which warm up."""
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
        for field in ("max_steps", "max_tokens", "shard_size", "tensor_size", "profile_step"):
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
        self._check_layout()
        self._check_linear_kernel()
        self._check_batch_warmup()
        for field in ("global_batch_size", "batch_start"):
            if (getattr(self, field) or 0) % self.data_ranks:
                sharing = "devices" if self.tensor_ranks == 1 else f"groups of {self.tensor_ranks} devices"
                raise ConfigError(
                    f"trainer.{field}={getattr(self, field)} sequences cannot be shared evenly by "
                    f"{self.data_ranks} {sharing}; use a multiple of {self.data_ranks}"
                )

    def _check_batch_warmup(self) -> None:
        """Refuse half a warm-up, and sizes that do not double up to the full one."""
        lengths = [value for value in (self.batch_warmup_steps, self.batch_warmup_tokens) if value is not None]
        if len(lengths) != (self.batch_start is not None):
            raise ConfigError(
                f"trainer.batch_start={self.batch_start} with trainer.batch_warmup_steps={self.batch_warmup_steps} and "
                f"trainer.batch_warmup_tokens={self.batch_warmup_tokens} is no warm-up; give batch_start and one of the others, "
                f"e.g. trainer.batch_start={max(self.global_batch_size // 4, 1)} trainer.batch_warmup_steps=1000, or none"
            )
        self.require(not lengths or lengths[0] >= 1, "batch_warmup_tokens" if self.batch_warmup_steps is None else "batch_warmup_steps",
                     "1 or more, or null")  # fmt: skip
        halvings = [self.global_batch_size >> k for k in range(1, 40) if self.global_batch_size % (1 << k) == 0]
        allowed = f"{', '.join(map(str, halvings)) or 'none'} (half, a quarter, … of global_batch_size)"
        self.require(self.batch_start in (None, *halvings), "batch_start", allowed)

    def _check_layout(self) -> None:
        """Refuse sizes that do not fit the number of devices."""
        self._check_owner("shard_size", self.shard_size is not None, (Parallel.hsdp,))
        self._check_owner("tensor_size", self.tensor_size is not None, (Parallel.tensor, Parallel.fsdp_tensor))
        self._check_owner("offload", self.offload, FULLY_SHARDED)
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
        if self.parallel == Parallel.tensor and self.tensor_ranks != self.world_size:
            raise ConfigError(
                f"trainer.tensor_size={self.tensor_size}, but trainer.parallel=tensor makes one group of all {self.world_size} devices; "
                f"leave it out, or use trainer.parallel=fsdp_tensor for several groups"
            )
        if self.parallel == Parallel.hsdp:
            self._check_groups("shard_size", self.shards, "each group shards one copy of the model", Parallel.fsdp)
        if self.parallel == Parallel.fsdp_tensor:
            self._check_groups("tensor_size", self.tensor_ranks, "each group computes a sequence together", Parallel.tensor)

    def _check_linear_kernel(self) -> None:
        """Refuse oneDNN where no layer would ask it."""
        if self.linear_kernel != LinearKernel.onednn:
            return
        instead = {
            "precision": ("32-true", self.precision in ("auto", "32-true")),
            "accelerator": ("cpu", self.accelerator in ("auto", "cpu")),
            "compile": ("false", not self.compile),
            "parallel": ("fsdp", self.tensor_ranks == 1),
        }
        for field, (able, fits) in instead.items():
            if not fits:
                raise ConfigError(
                    f"trainer.linear_kernel=onednn has no part in trainer.{field}={getattr(self, field)}; "
                    f"use trainer.linear_kernel=torch, or trainer.{field}={able}"
                )

    def _check_owner(self, field: str, given: bool, owners: tuple[Parallel, ...]) -> None:
        """Refuse a field that the layout would ignore."""
        if given and self.parallel not in owners:
            able = " or ".join(owners)
            raise ConfigError(
                f"trainer.{field}={getattr(self, field)} belongs to trainer.parallel={able}, not {self.parallel}; leave it out"
            )

    def _check_groups(self, field: str, size: int, what: str, single: Parallel) -> None:
        """Refuse groups that are not several equal ones of several devices."""
        if self.world_size % size == 0 and 1 < size < self.world_size:
            return
        fitting = [str(n) for n in range(2, self.world_size) if self.world_size % n == 0]
        instead = f"use trainer.{field}={' or '.join(fitting)}" if fitting else f"use trainer.parallel={single}"
        raise ConfigError(
            f"trainer.parallel={self.parallel} cannot make groups of {size} of {self.world_size} devices ({what}, and there are several "
            f"groups); {instead}"
        )

    @property
    def arithmetic(self) -> str:
        """Precision and, where it is not PyTorch's own choice, what multiplies; in words."""
        return f"{self.precision}, linear layers by oneDNN" if self.linear_kernel == LinearKernel.onednn else self.precision

    @property
    def is_sharded(self) -> bool:
        """A device holds a share of the weights."""
        return self.parallel in (*FULLY_SHARDED, Parallel.tensor)

    @property
    def shards(self) -> int:
        """Devices that share the weights of one copy of the model by fsdp."""
        if self.parallel == Parallel.hsdp:
            return self.shard_size or self.devices
        return self.data_ranks if self.parallel in FULLY_SHARDED else 1

    @property
    def tensor_ranks(self) -> int:
        """Devices that compute a sequence together."""
        if self.parallel == Parallel.tensor:
            return self.tensor_size or self.world_size
        return self.tensor_size or self.devices if self.parallel == Parallel.fsdp_tensor else 1

    @property
    def data_ranks(self) -> int:
        """Shares that a global batch is cut into: devices, or groups of those that compute together."""
        return self.world_size // self.tensor_ranks

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.devices * self.num_nodes

    @property
    def micro_batches(self) -> int:
        """Forward passes of one device in one optimizer step; the last one may be smaller."""
        return -(-(self.global_batch_size // self.data_ranks) // self.micro_batch_size)

    def batch_sizes(self, sequence_length: int) -> BatchSizes:
        """Sequences of every optimizer step."""
        start, steps = self.batch_start or self.global_batch_size, self.batch_warmup_steps or 0
        if self.batch_warmup_tokens is not None:
            doublings = (self.global_batch_size // start).bit_length() - 1
            # one step of every size on the way reads so many positions
            once = (self.global_batch_size - start) * sequence_length
            steps = -(-self.batch_warmup_tokens * doublings // once)
        return BatchSizes(self.global_batch_size, start, steps, sequence_length)

    def steps(self, sequence_length: int) -> int:
        """Optimizer steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return self.batch_sizes(sequence_length).steps(self.max_tokens)

    def tokens(self, sequence_length: int) -> int:
        """Positions that the run reads."""
        return self.batch_sizes(sequence_length).tokens(self.steps(sequence_length))


trainers: Registry[TrainerConfig] = Registry("trainer", TrainerConfig)
trainers.register("default")(TrainerConfig)
