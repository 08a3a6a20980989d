"""The memory that a device needs for a step, for any layout, before anything is allocated.

The model is built of fake tensors, which have shapes and no storage; tensor parallelism shares it out over a process group that sends
nothing, as it would over the real one; the forward pass is run to see what autograd keeps. What FSDP2 gathers is arithmetic. Left out: the
allocator's own rounding, the framework (about 0.5 GiB on a CPU) and communication buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from heads_lightning.batch import Attention, Batch, Examples
from heads_lightning.configs.base import DType
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMHeadConfig, LMLossImplementation
from heads_lightning.configs.trainer import FULLY_SHARDED, TrainerConfig
from heads_lightning.experiment import build_head
from heads_lightning.losses.memory import loss_memory_bytes
from heads_lightning.training.optimizers import build_optimizer, parameter_kinds

PRECISION_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}
BLOCKS_AHEAD = 2
"""Blocks that FSDP2 has gathered at once: the one at work and the next."""


class Memory(NamedTuple):
    """Bytes on one device at the fullest moment of a step."""

    weights: int
    """Its share of them."""
    gradients: int
    optimizer: int
    gathered: int
    """Whole weights and gradients that FSDP2 holds for a while beside the shares: of the blocks at work, and of all that is no block."""
    activations: int
    """What the backbone's forward pass keeps for the backward pass of one micro-batch."""
    recomputed: int
    """What a block that is run again keeps (recompute_every), after the loss is over."""
    loss: int
    """Peak of the loss beyond hidden states and weight, and their gradients."""
    host: int
    """Of `weights`, `gradients` and `optimizer`, what trainer.offload keeps in the host's memory; not in the total."""

    @property
    def total(self) -> int:
        """The loss is over before the gradients of the backbone exist, unless those of an earlier micro-batch are held."""
        shares = self.weights + self.gradients + self.optimizer - self.host
        return shares + self.gathered + self.activations + max(self.recomputed, self.loss)


class Kept(NamedTuple):
    """Bytes that a forward pass leaves for the backward pass."""

    activations: int
    recomputed: int
    """The largest block among those whose inputs alone are kept."""


def meta_model(config: ExperimentConfig, vocab_size: int, precision: str) -> tuple[Any, Any]:
    """Backbone and head without storage, in the type of their parameters."""
    backbone = config.backbone.build(vocab_size=vocab_size, init_device="meta")
    head = build_head(config, backbone, vocab_size, init_device="meta")
    if precision.endswith("-true") and precision in PRECISION_DTYPES:
        backbone, head = backbone.to(PRECISION_DTYPES[precision]), head.to(PRECISION_DTYPES[precision])
    return backbone, head


def memory(
    config: ExperimentConfig, *, vocab_size: int, sample: Examples, attention: Attention, precision: str, target_share: float
) -> Memory:
    """See Memory. `precision` is a resolved one; `target_share` of the sample's positions have a target."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    trainer = config.trainer
    rows = min(trainer.micro_batch_size, trainer.global_batch_size // trainer.data_ranks)
    computed = "bf16-true" if _gathers_bfloat16(trainer) else precision
    dtype = PRECISION_DTYPES.get(computed, torch.float32)
    backbone, head = meta_model(config, vocab_size, precision)
    computing = meta_model(config, vocab_size, computed)
    with _tensor_mesh(trainer.tensor_ranks) as mesh, FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _share_out(backbone, head, mesh)
        _share_out(*computing, mesh)
        weights = sum(_bytes(p) for p in {id(p): p for p in (*backbone.parameters(), *head.parameters())}.values())
        optimizer = _optimizer_bytes(config, backbone, head)
        gathered = _gathered_bytes(trainer, *computing)
        batch = _batch(sample, rows, attention)
        batch = batch._replace(**{n: fake.from_tensor(v) for n, v in batch._asdict().items() if isinstance(v, Tensor)})
        kept = kept_bytes(computing[0], batch, dtype if computed.endswith("-mixed") else None, recompute_every=trainer.recompute_every)
    targets = max(1, round(target_share * rows * sample.tokens_BS.shape[1]))
    loss = _loss_bytes(config, targets=targets, d_model=backbone.d_model, classes=-(-vocab_size // trainer.tensor_ranks), dtype=dtype)
    weights, optimizer = weights // trainer.shards, optimizer // trainer.shards
    host = 2 * weights + optimizer if trainer.offload else 0
    return Memory(weights, weights, optimizer, gathered, kept.activations, kept.recomputed, loss, host)


def _share_out(backbone: Any, head: Any, mesh: Any) -> None:
    """Give meta modules fake storage, this device's share of it where several compute together."""
    for module in (backbone, head):
        module.to_empty(device="cpu")
    if mesh is not None:
        from heads_lightning.training.tensor_parallel import parallelize_backbone, parallelize_head

        parallelize_backbone(backbone, mesh)
        parallelize_head(head, mesh)


@contextmanager
def _tensor_mesh(ranks: int) -> Iterator[Any]:
    """The mesh of devices that compute together, this process the first of them, and nothing is sent. None for one device."""
    if ranks == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def _own(tensor: Tensor) -> Tensor:
    """What this device holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _bytes(tensor: Tensor) -> int:
    own = _own(tensor)
    return own.numel() * own.element_size()


def _gathered_bytes(trainer: TrainerConfig, backbone: Any, head: Any) -> int:
    """Of a model in the type of what is gathered. Blocks are gathered ahead, or kept (reshard=False); what is no block is whole from its
    first use to its gradient."""
    if trainer.parallel not in FULLY_SHARDED:
        return 0
    blocks = [sum(map(_bytes, block.parameters())) for block in backbone.blocks_in_order]
    ends = sum(map(_bytes, {id(p): p for p in (*backbone.parameters(), *head.parameters())}.values())) - sum(blocks)
    largest = max(blocks, default=0)
    held = min(BLOCKS_AHEAD, len(blocks)) * largest if trainer.reshard else sum(blocks)
    return held + ends + ends + largest  # weights, then gradients


def _gathers_bfloat16(trainer: TrainerConfig) -> bool:
    return trainer.parallel in FULLY_SHARDED and trainer.gather_dtype == DType.bfloat16


def _optimizer_bytes(config: ExperimentConfig, backbone: Any, head: Any) -> int:
    """State after the first step: two moments for AdamW's parameters, one for Muon's, in the type of the parameter."""
    optimizer = build_optimizer(config.optimizer, backbone, head)
    parts = getattr(optimizer, "parts", [optimizer])
    of = {id(p): _bytes(p) for kind in parameter_kinds(backbone, head).values() for p in kind}
    total = 0
    for part in parts:
        moments = 1 if isinstance(part, torch.optim.Muon | torch.optim.SGD) else 2
        total += moments * sum(of[id(p)] for group in part.param_groups for p in group["params"])
    return total


def _loss_bytes(config: ExperimentConfig, *, targets: int, d_model: int, classes: int, dtype: torch.dtype) -> int:
    if not isinstance(config.head, LMHeadConfig):
        return 0
    chosen = config.head.loss_implementation
    known = (LMLossImplementation.default, LMLossImplementation.chunked, LMLossImplementation.auto)
    return loss_memory_bytes(
        chosen if chosen in known else LMLossImplementation.chunked,  # the fused ones hold about as much as chunked
        targets=targets,
        d_model=d_model,
        vocab_size=classes,
        dtype=dtype,
    )


def _batch(sample: Examples, rows: int, attention: Attention) -> Batch:
    """`rows` rows like those of the sample, repeated where it has fewer."""
    repeated = {name: array[np.arange(rows) % len(array)] for name, array in sample._asdict().items() if array is not None}
    return Batch.from_examples(sample._replace(**repeated), attention)


class _Keeping:
    """The storages that autograd holds, weights left out (casts of them are counted)."""

    def __init__(self, weights: set[int]) -> None:
        self.weights = weights
        self.tensors: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor."""
        own = _own(tensor)
        if _storage(own) not in self.weights:
            self.tensors[_storage(own)] = own
        return tensor

    @property
    def bytes(self) -> int:
        """Of all storages."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def kept_bytes(backbone: Any, batch: Batch, autocast: torch.dtype | None, *, recompute_every: int = 0) -> Kept:
    """What the backward pass of `backbone` on `batch` needs from its forward pass.

    Args:
        backbone: of fake tensors.
        batch: its values do not matter, its shapes do.
        autocast: the type of matrix products under autocast; None: no autocast.
        recompute_every: see TrainerConfig.
    """
    weights = {_storage(_own(value)) for value in (*backbone.parameters(), *backbone.buffers())}
    kept, again = _Keeping(weights), 0

    def run_again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def block(*inputs: Any, **named: Any) -> Any:
            nonlocal again
            for value in tree_leaves((inputs, named)):
                if isinstance(value, Tensor):
                    kept.keep(value)
            inner = _Keeping(weights | kept.tensors.keys())
            with torch.autograd.graph.saved_tensors_hooks(inner.keep, lambda tensor: tensor):
                output = forward(*inputs, **named)
            again = max(again, inner.bytes)
            return output

        return block

    for i, block in enumerate(backbone.blocks_in_order):
        if recompute_every and i % recompute_every == 0:
            block.forward = run_again(block.forward)
    mixed = autocast is not None and autocast != torch.float32
    with (
        torch.autocast("cpu", autocast) if mixed else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor),
    ):
        hidden = backbone(batch)
    kept.keep(hidden)
    return Kept(kept.bytes, again)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def recomputed_share(backbone: nn.Module, every: int) -> float:
    """Share of the blocks' weights that are multiplied once more in the backward pass."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in backbone.blocks_in_order]  # pyright: ignore
    return sum(blocks[::every]) / max(sum(blocks), 1) if every else 0.0
