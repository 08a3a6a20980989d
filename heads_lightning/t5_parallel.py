"""Tensor parallelism of T5: which weights are split how, as PyTorch's DTensor styles."""

from __future__ import annotations

from typing import Any

from torch import nn

from heads_lightning.registry import ConfigError
from heads_lightning.t5_model import T5Model


def parallelize(model: T5Model, mesh: Any) -> T5Model:
    """Shard a model over a one-dimensional device mesh, in place: heads and feed-forward columns by tensor parallelism, the embedding and
    the projection over the vocabulary. Every rank gives the same inputs and has the same loss.

    Raises:
        ConfigError: heads or feed-forward columns do not divide by the ranks.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ranks, config = mesh.size(), model.config
    for field, value in (
        ("num_heads", config.num_heads),
        ("feed_forward_dim", config.ff_dim),
        ("decoder_feed_forward_dim", config.decoder_ff_dim),
    ):
        if value % ranks:
            raise ConfigError(f"backbone.{field}={value} cannot be shared by {ranks} ranks; use a multiple of {ranks}")
    plan: dict[str, Any] = {}
    for name, module in model.backbone.named_modules():
        last = name.rsplit(".", 1)[-1]
        if last in ("query", "key", "value", "gate", "up", "relative_bias") and module is not None:
            plan[name] = ColwiseParallel()
        elif last in ("output", "down"):
            plan[name] = RowwiseParallel()
    if model.backbone.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model.backbone, mesh, plan)
    for name in ("weight", "bias"):
        parameter = None if model.head is None else getattr(model.head.w_out, name)
        if parameter is not None:
            setattr(model.head.w_out, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))  # pyright: ignore
    return model
