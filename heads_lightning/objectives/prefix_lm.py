"""Prefix language modelling: the beginning of a piece is read from both sides, the rest is predicted left to right (T5, 3.2.3).

The pieces are the documents of a window. Each has a prefix of its own, a share of its length that is uniform between two bounds, and
always leaves a token to predict. Positions inside the prefix see what they would predict, so they have no target; the last one has.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.objective import PrefixLMConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments


class PrefixLM(Objective):
    """Predict the rest of each document after a prefix that is read from both sides."""

    attention: ClassVar[Attention] = Attention.prefix

    def __init__(self, config: PrefixLMConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        tokens_BS, labels_BS = tokens_BR[:, :-1].astype(np.int64), tokens_BR[:, 1:].astype(np.int64)
        segments_BS = document_segments(tokens_BS, self.vocabulary.end_of_document)
        starts = np.flatnonzero(np.diff(segments_BS, axis=1, prepend=-1))
        lengths = np.diff(starts, append=tokens_BS.size)
        rows = starts // sequence_length
        low, high = self.config.prefix_min, self.config.prefix_max
        share = low + (high - low) * rng.uniform_at(rows, segments_BS.reshape(-1)[starts])
        ends = starts + np.minimum((share * (lengths + 1)).astype(np.int64), lengths - 1)
        place = np.arange(tokens_BS.size)
        prefix_BS = (place < np.repeat(ends, lengths)).reshape(tokens_BS.shape)
        labels_BS[:, :-1][prefix_BS[:, 1:] & (np.diff(segments_BS, axis=1) == 0)] = IGNORE
        return Examples(tokens_BS, labels_BS, segments_BS, prefix_BS=prefix_BS)
