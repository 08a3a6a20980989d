"""Tensor parallelism of a T5Model that is used as a library. Runs have it by `trainer.parallel=tensor`, with weights shared out alike."""

from __future__ import annotations

from typing import Any

from heads_lightning.models.t5 import T5Model
from heads_lightning.registry import ConfigError


def parallelize(model: T5Model, mesh: Any) -> T5Model:
    """Shard a model over a one-dimensional device mesh, in place: heads and feed-forward columns by tensor parallelism, the embedding and
    the projection over the vocabulary. Every rank gives the same inputs and has the same loss.

    Raises:
        ConfigError: heads or feed-forward columns do not divide by the ranks.
    """
    from heads_lightning.training.tensor_parallel import parallelize_backbone, parallelize_head

    ranks = mesh.size()
    for field, value in model.config.tensor_sizes().items():
        if value % ranks:
            raise ConfigError(f"backbone.{field}={value} cannot be shared by {ranks} ranks; use a multiple of {ranks}")
    parallelize_backbone(model.backbone, mesh)
    if model.head is not None:
        parallelize_head(model.head, mesh)
    return model
