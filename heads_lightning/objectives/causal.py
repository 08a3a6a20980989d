"""Next-token prediction on packed windows of the stream, or on rows of whole documents.

The stream's end-of-document id opens a document: it is the input that says "a document begins" and the target that says "the document
before has ended". Every position but padding therefore has a target, and the attention of packed documents is kept apart by their
segments. Where a document is cut (a window ends; with `level=document`, it is longer than a row), its last position before the cut
predicts the first token after it, and that token begins the next row without a marker and sees nothing before it.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import CausalConfig, CausalLevel
from heads_lightning.objectives.base import Objective, Rows, SampleRandom, Vocabulary, Window, document_segments


class Causal(Objective):
    """Predict each next token of the stream."""

    attention: ClassVar[Attention] = Attention.causal

    def __init__(self, config: CausalConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.whole_documents = config.level is CausalLevel.document

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        return Examples(
            tokens_BS=tokens_BR[:, :-1].astype(np.int64),
            labels_BS=tokens_BR[:, 1:].astype(np.int64),
            segments_BS=document_segments(tokens_BR[:, :-1], self.vocabulary.end_of_document),
        )

    def examples_of_documents(self, rows: Rows, rng: SampleRandom) -> Examples:
        padded_BS = rows.segments_BS == PADDING
        return Examples(
            tokens_BS=np.where(padded_BS, self.vocabulary.padding, rows.tokens_BS),
            labels_BS=np.where(padded_BS, IGNORE, rows.next_BS),
            segments_BS=rows.segments_BS,
        )
