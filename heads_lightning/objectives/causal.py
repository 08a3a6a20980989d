"""Next-token prediction on packed windows of the stream.

The stream's end-of-document id opens a document: it is the input that says "a document begins" and the target that says "the document
before has ended". Every position therefore has a target, and the attention of packed documents is kept apart by their segments.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import Attention, Examples
from heads_lightning.configs.objective import CausalConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments


class Causal(Objective):
    """Predict each next token of the stream."""

    attention: ClassVar[Attention] = Attention.causal

    def __init__(self, config: CausalConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        tokens_BS = tokens_BR[:, :-1].astype(np.int64)
        return Examples(
            tokens_BS=tokens_BS,
            labels_BS=tokens_BR[:, 1:].astype(np.int64),
            segments_BS=document_segments(tokens_BS, self.vocabulary.end_of_document),
        )
