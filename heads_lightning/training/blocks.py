"""What is done to the blocks of a backbone one by one: recomputation in the backward pass, compilation.

Both replace a block's `forward` and nothing else: names of weights, hooks of sharded strategies and `reset_parameters` stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from heads_lightning.backbones.base import Backbone
from heads_lightning.configs.trainer import TrainerConfig


def prepare_blocks(backbone: Backbone, config: TrainerConfig) -> None:
    """Recompute every n-th block (`recompute_every`) and compile (`compile`): block by block, or the backbone as one."""
    by_block = config.compile and (config.compile_blocks or config.is_sharded)
    for i, block in enumerate(backbone.blocks_in_order):
        if by_block:
            block.forward = torch.compile(block.forward)
        if config.recompute_every and i % config.recompute_every == 0:
            block.forward = _recomputed(block.forward)
    if config.compile and not by_block:
        backbone.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps its inputs alone for the backward pass and runs again there, with the same dropout."""

    def recomputed(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return recomputed
