"""A real model that can be computed by hand: logits of the next token are a row of a table, whatever stands before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heads_lightning.composition import compose
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.data.prepare import prepare
from heads_lightning.data.shards import PreparedData
from heads_lightning.experiment import TrainedModel


class Bigram(nn.Module):
    """Hidden states are the tokens themselves, one of V numbers set."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.eye(size))
        self.d_model = size

    def new_cache(self, rows: int, positions: int) -> None:
        """It remembers nothing."""

    def forward(self, batch: Any, cache: Any = None) -> Tensor:
        return self.embedding(batch.tokens_BS)


def bigram_model(overrides: list[str], *, table_VV: Tensor | None = None) -> tuple[TrainedModel, PreparedData]:
    """A model with logits table_VV[token, next] (None: all 0), and prepared data to ask it about."""
    config = compose(overrides)
    prepared = prepare(config.data, config.tokenizer)
    size = prepared.vocabulary.size
    head = DefaultLMHeadConfig(bias=False).build(d_model=size, vocab_size=size)
    with torch.no_grad():
        head.w_out.weight.copy_(torch.zeros(size, size) if table_VV is None else table_VV.T)
    return TrainedModel(config, prepared.tokenizer, Bigram(size), head, 0, Path("nowhere/checkpoints/step")), prepared  # pyright: ignore[reportArgumentType]
