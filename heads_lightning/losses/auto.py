"""`auto`: the best implementation for the device, dtype, shape and features at hand. The log says which and why, once for each answer.

It never changes what is computed. `torch` (PyTorch's own operator) is not picked: its loss in bf16 is summed and returned in bf16, up to
11 % off (measured at V = 8192, torch 2.13).
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from heads_lightning.losses import chunked, default
from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection

log = logging.getLogger(__name__)

FEATURES = frozenset(Feature)
SMALL = 2**20
"""Logits below which forming them all is as fast: the bookkeeping of chunks outweighs what they save."""


def unavailable() -> str | None:
    """None: there is always one that runs."""
    return None


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    name, why = choose(hidden_ND.shape[0], projection.classes)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # what scores a few rows after training is nobody's choice
        _report(name, why)
    compute = default.linear_cross_entropy_sum if name == "default" else chunked.linear_cross_entropy_sum
    return compute(hidden_ND, projection, labels_N, options, weights_N)


def choose(rows: int, classes: int) -> tuple[str, str]:
    """(implementation, reason)."""
    if rows * classes < SMALL:
        return "default", f"fewer than {SMALL} logits cost less at once than in chunks"
    return "chunked", "never holds the logits and forms gradients in the forward pass"


@cache
def _report(name: str, why: str) -> None:
    log.info("head.loss_implementation=auto takes %s: %s", name, why)
