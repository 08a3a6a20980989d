"""Heads, hidden states and labels that the tests of heads share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heads_lightning import LMHeadConfig, LMLossImplementation
from heads_lightning.configs.head import LMHeadConfig as AnyConfig
from heads_lightning.configs.head import heads
from heads_lightning.losses import unavailable

HEADS = [name for name, config in heads.items() if issubclass(config, AnyConfig)]
LOSSES = [name.value for name in LMLossImplementation if unavailable(name) is None]
B, S, D, V = 2, 12, 16, 53


def build(name: str, implementation: str = "default", *, d_model: int = D, vocab_size: int = V, **options: Any) -> Any:
    torch.manual_seed(0)
    head = LMHeadConfig(name=name, loss_implementation=implementation, **options).build(d_model=d_model, vocab_size=vocab_size)
    with torch.no_grad():
        for parameter in head.parameters():  # away from the zeros and ones of a new head
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return head


def inputs(masked: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(B, S, D, generator=g), torch.randint(0, V, (B, S), generator=g)
    labels[torch.rand(B, S, generator=g) < masked] = -100
    return x, labels
