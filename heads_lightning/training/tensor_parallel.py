"""Tensor parallelism (`trainer.parallel=tensor`, `fsdp_tensor`): several devices compute one sequence together (arXiv 1909.08053).

Choices. A backbone says what each of its modules does (`Backbone.tensor_roles`); here that becomes weights that are DTensors and layouts at
a module's ends, by PyTorch's own styles where there is one. Every weight becomes a DTensor, those that stay whole too, so that norms,
clipping, optimizers and checkpoints see one kind. Outside of modules there are plain tensors. A backbone whose norms share the positions
(arXiv 2205.05198) hands them on so from its embedding to its last norm; a head is given all of them, and shares the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement
from typing_extensions import override

from heads_lightning.backbones.base import Backbone, TensorRole

POSITIONS, HEADS = 1, 2
"""Dimensions: of hidden states [B, S, D], and of queries or keys [B, S, H, E]."""
VOCABULARY = "w_out"
"""Module of a head whose parameters, and the head's own, have a row for each class."""


def parallelize_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Share out a backbone's weights over a one-dimensional mesh, in place. Each device is given the same batch and has the same result.

    Args:
        backbone: with tensor_roles, weights whole and the same on every device.
        mesh: of the devices that compute together.
    """
    positions_shared = TensorRole.positions in backbone.tensor_roles.values()
    between: Placement = Shard(POSITIONS) if positions_shared else Replicate()
    # every rank has made the same weights already: nothing is sent
    styles: dict[TensorRole, Callable[[], ParallelStyle]] = {
        TensorRole.columns: ColwiseParallel,
        TensorRole.rows: lambda: RowwiseParallel(output_layouts=between),
        TensorRole.vocabulary: lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        TensorRole.positions: lambda: WholeWeights(POSITIONS),
        TensorRole.heads: lambda: WholeWeights(HEADS),
        TensorRole.reads_all: Gathered,
    }
    plan = {name: styles[role]() for name, role in _roles(backbone)}
    parallelize_module(backbone, mesh, plan, src_data_rank=None)
    _keep_whole(backbone, mesh)
    if positions_shared:
        backbone.register_forward_hook(lambda module, inputs, hidden: _gather_positions(hidden, mesh).to_local())


def _roles(backbone: Backbone) -> Iterator[tuple[str, TensorRole]]:
    for name, module in backbone.named_modules():
        role = next((role for pattern, role in backbone.tensor_roles.items() if fnmatchcase(name, pattern)), None)
        if role is not None and not isinstance(module, nn.Identity):
            yield name, role


def parallelize_head(head: nn.Module, mesh: DeviceMesh) -> None:
    """Share out a head's projection by rows; its other parts are whole. Each device is given all hidden states and has the same loss."""
    for module in (head, getattr(head, VOCABULARY, None)):
        if module is not None:
            _distribute(module, mesh, Shard(0))
    _keep_whole(head, mesh)


def _keep_whole(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give the modules whose weights are plain tensors yet the same weights on every device."""
    for part in module.modules():
        if any(not isinstance(parameter, DTensor) for parameter in part.parameters(recurse=False)):
            WholeWeights(None)._apply(part, mesh)


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Lay out a module's own parameters."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not isinstance(parameter, DTensor):
            value = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _gather_positions(x_BSD: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x_BSD, mesh, [Shard(POSITIONS)], run_check=False).redistribute(placements=[Replicate()])


class Gathered(ParallelStyle):
    """The first input arrives as a share of the positions and is read as a whole, once for all matrices that multiply it."""

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            # stays a DTensor: gradients of several matrices are summed before they are sent back
            return (_gather_positions(inputs[0], device_mesh), *inputs[1:])

        module.register_forward_pre_hook(gather)
        return module


class WholeWeights(ParallelStyle):
    """Every device has all weights and applies them to its part of the input.

    Args:
        dim: dimension of the input of which a device has a part. None: it has all of it. Indices of an embedding arrive whole, and a device
            looks its positions up.
    """

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._replicate, self._take, self._give)  # pyright: ignore[reportArgumentType]

    def _replicate(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        _distribute(module, mesh, Replicate())

    def _take(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
        x: Tensor = inputs[0]
        if self.dim is not None and isinstance(module, nn.Embedding):
            whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            return whole.redistribute(placements=[Shard(x.ndim - 1)])
        return DTensor.from_local(x, mesh, [Replicate() if self.dim is None else Shard(self.dim)], run_check=False)

    def _give(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


def settle_gradients(module: nn.Module) -> None:
    """From now on a gradient is laid out as its weight is when it has been accumulated: those of whole weights arise as parts of a sum."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_settle)


def _settle(parameter: Tensor) -> None:
    assert isinstance(parameter, DTensor)
    assert isinstance(parameter.grad, DTensor)
    if parameter.grad.placements != parameter.placements:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
