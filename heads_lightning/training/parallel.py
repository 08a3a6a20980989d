"""Sharded weights (`trainer.parallel=fsdp`, `hsdp`, `tensor`, `fsdp_tensor`) through Lightning's ModelParallelStrategy: PyTorch's FSDP2 per
block, and tensor parallelism (tensor_parallel.py).

Choices. Each block of the backbone is a unit that is gathered just before it is used; everything else (embedding, final norm, head) is one
unit with the whole module, because a tied embedding is used at both ends. A checkpoint holds whole tensors under the same names, whatever
the layout, so that every layout reads what any other wrote; optimizers are asked through `state_dict` alone, so that Muon and AdamW in
one optimizer need nothing special. Gradients are reduced with each micro-batch: sums are exact either way, and the memory of
whole gradients is what sharding is there to avoid.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from heads_lightning.backbones.base import Backbone
from heads_lightning.configs.base import DType
from heads_lightning.configs.trainer import CheckpointFormat, Parallel, TrainerConfig
from heads_lightning.training.distributed_checkpoints import read_folder

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # how many messages a checkpoint takes is no news
REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
"""Dimensions of the device mesh."""
SCORE = "score"
"""Method of the module that runs backbone and head: inside it, the weights that belong to no block are whole."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or (hsdp) inside groups of `trainer.shards` devices that hold one copy each; tensor parallelism over all
    devices, or (fsdp_tensor) inside groups of neighbouring ones, between which FSDP2 shards once more.

    Args:
        config: sizes (checked against the devices by TrainerConfig) and choices.
    """

    def __init__(self, config: TrainerConfig) -> None:
        super().__init__(data_parallel_size=config.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.config = config
        self.mesh: DeviceMesh | None = None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        layout = mesh_layout(self.config)
        self.mesh = init_device_mesh(self.root_device.type, tuple(layout.values()), mesh_dim_names=tuple(layout))

    @property
    @override
    def process_group_backend(self) -> str | None:
        # what is offloaded is clipped, updated and saved on the host
        return "cpu:gloo,cuda:nccl" if self.config.offload and self.root_device.type == "cuda" else None

    def sum_over_data_ranks(self, values: Tensor) -> None:
        """Sum, in place, over the processes with different sequences: one of each group that computes together."""
        assert self.mesh is not None
        if self.config.data_ranks > 1:
            dist.all_reduce(values, group=self.mesh[SHARD].get_group() if self.config.parallel == Parallel.fsdp_tensor else None)

    def lay_out(self, module: nn.Module, backbone: Backbone, head: nn.Module) -> None:
        """Shard a module in place, once: over the devices that compute together, then over the others. It has the method `score`."""
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            return
        assert self.mesh is not None
        module.to(self.root_device)
        if self.config.tensor_ranks > 1:
            from heads_lightning.training.tensor_parallel import parallelize_backbone, parallelize_head

            parallelize_backbone(backbone, self.mesh[TENSOR])
            parallelize_head(head, self.mesh[TENSOR])
        if self.config.parallel != Parallel.tensor:
            self._shard(module, backbone)

    def _shard(self, module: nn.Module, backbone: Backbone) -> None:
        """FSDP2: each block, then what is left; before them, what must not be rounded when it is gathered."""
        assert self.mesh is not None
        kind = torch.bfloat16 if self.config.gather_dtype == DType.bfloat16 else None
        # inputs are never cast: a batch holds weights and target values, which are not the model's
        policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32 if kind else None, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        pinned = self.root_device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.config.offload else OffloadPolicy()
        mesh = self.mesh[SHARD] if self.config.parallel == Parallel.fsdp_tensor else self.mesh
        apart = backbone.exact_modules if kind or self.config.precision == "bf16-true" else []  # a unit has weights of one type
        units = [(part, exact) for part in apart] + [(block, policy) for block in backbone.blocks_in_order]
        for unit, of_unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=of_unit, offload_policy=offload, reshard_after_forward=self.config.reshard)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
        register_fsdp_forward_method(module, SCORE)

    @override
    def model_to_device(self) -> None:
        if not self.config.offload:  # FSDP2 brings to the device what it needs there
            super().model_to_device()
        if self.config.parallel == Parallel.tensor:  # FSDP2 does it for its own
            from heads_lightning.training.tensor_parallel import settle_gradients

            assert self.lightning_module is not None
            settle_gradients(self.lightning_module)  # now: moving a DTensor to a device, even its own, loses its hooks

    # -- checkpoints: whole tensors on the first rank, or (distributed) every rank's own ------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True  # from the same entries as every other strategy

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: self.kept(value) for name, value in self.lightning_module.state_dict().items()}

    @override
    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return mapped(getattr(optimizer, "optimizer", optimizer).state_dict(), self.kept)

    def kept(self, value: Tensor) -> Tensor:
        """The whole tensor on the CPU of the first rank; the other ranks only take part in gathering it. Distributed: the share."""
        if self.config.checkpoint_format == CheckpointFormat.distributed:
            return value
        gathered = whole(value)
        return gathered.cpu() if self.is_global_zero else gathered.new_empty(0)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(checkpoint_path).is_dir():
            places = self._places()
            return read_folder(
                Path(checkpoint_path), lambda name, size: _place(places.get(name.rpartition(".")[0], places.get(name)), size)
            )
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def _places(self) -> dict[str, Tensor]:
        """Parameters and buffers by the name of their tensor in a checkpoint, and by the name of their entry in the optimizer's state."""
        assert self.lightning_module is not None
        places = {f"state_dict.{name}": value for name, value in self.lightning_module.state_dict().items()}
        places |= {f"average.{name}": value for name, value in self.lightning_module.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            several = hasattr(optimizer, "parts")
            for j, part in enumerate(getattr(optimizer, "parts", [optimizer])):
                path = f"optimizer_states.{i}.parts.{j}" if several else f"optimizer_states.{i}"
                parameters = [p for group in part.param_groups for p in group["params"]]
                places |= {f"{path}.state.{number}": parameter for number, parameter in enumerate(parameters)}
        return places

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        held = self.lightning_module.state_dict()
        saved = checkpoint["state_dict"]
        self.lightning_module.load_state_dict({k: like(v, held.get(k)) for k, v in saved.items()}, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(laid_out(state, optimizer))


def mesh_layout(config: TrainerConfig) -> dict[str, int]:
    """Sizes of the device mesh by name, the dimension of neighbouring devices last."""
    sizes = {REPLICATE: config.data_ranks // config.shards, SHARD: config.shards, TENSOR: config.tensor_ranks}
    if config.parallel == Parallel.tensor:
        return {TENSOR: config.tensor_ranks}
    return {name: size for name, size in sizes.items() if size > 1}


def _place(held: Tensor | None, size: torch.Size) -> Tensor | None:
    """An empty tensor for this rank's share of one that is laid out as `held`."""
    return torch.empty_like(held, requires_grad=False) if isinstance(held, DTensor) and held.shape == size else None


def whole(value: Tensor) -> Tensor:
    """The tensor that a DTensor is a part of (every rank must ask); any other tensor itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, held: Tensor | None) -> Tensor:
    """A whole tensor laid out as `held` is; every rank has the value, so nothing is sent."""
    if not isinstance(held, DTensor) or isinstance(value, DTensor) or value.shape != held.shape:
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def mapped(state: Any, function: Any) -> Any:
    """A nested state with `function` applied to its tensors."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: mapped(value, function) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(mapped(value, function) for value in state)
    return state


def optimizer_parts(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """(state by parameter number and by name, parameters in the order of their numbers) of each optimizer in one."""
    parts = getattr(optimizer, "parts", [optimizer])
    for part, entry in zip(parts, state.get("parts", [state]), strict=True):
        yield entry["state"], [p for group in part.param_groups for p in group["params"]]


def laid_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with each tensor laid out as its parameter is."""
    state = mapped(state, lambda value: value)
    for by_number, parameters in optimizer_parts(optimizer, state):
        for number, values in by_number.items():
            by_number[number] = mapped(values, lambda value, p=parameters[int(number)]: like(value, p))
    return state
