"""Tiny models of the `transformers` library with a value head."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn
from value_data import CAUSAL, SEQ2SEQ, tiny_model

from heads_lightning import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

ALL = [*CAUSAL, *SEQ2SEQ]


def wrapped(kind: str = "gpt2", **head: Any) -> Any:
    parent = AutoModelForCausalLMWithValueHead if kind in CAUSAL else AutoModelForSeq2SeqLMWithValueHead
    torch.manual_seed(5)
    return parent(tiny_model(kind), **head)


def head_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("v_head.")}


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


# -- state (V8 to V11) ----------------------------------------------------------------------------------------------------


class Critic(lightning.LightningModule):
    """A user's module around a wrapper."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"critic": model})
