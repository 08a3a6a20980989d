"""Heads: hidden states to a score. One file each, named like the option (`head=…`)."""

from heads_lightning.heads.base import Head, HeadLoss, LMHead, LMOutputWithLoss, LMOutputWithMetrics
from heads_lightning.heads.default import DefaultLMHead
from heads_lightning.heads.mlm import MLMHead
from heads_lightning.heads.normalized import NormalizedLMHead
from heads_lightning.heads.t5 import T5Head
from heads_lightning.heads.value import ValueHead

__all__ = [
    "DefaultLMHead",
    "Head",
    "HeadLoss",
    "LMHead",
    "LMOutputWithLoss",
    "LMOutputWithMetrics",
    "MLMHead",
    "NormalizedLMHead",
    "T5Head",
    "ValueHead",
]
