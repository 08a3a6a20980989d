"""Multi-token prediction (Gloeckle et al., arXiv 2404.19737): at each position the next token and k more, steps reported apart.

Labels come in blocks of S positions, one for each step: block j holds the token j + 1 places on. A label beyond the end of its document is
left out, except that the marker that ends a document can be seen coming; so nothing is asked that belongs to another document. The loss is
the mean of the next token's plus `weight` times each of the others', over the positions of the row.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.objective import MultiTokenConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments


class MultiToken(Objective):
    """Predict the next token and those after it."""

    attention: ClassVar[Attention] = Attention.causal
    counts_apart = True

    def __init__(self, config: MultiTokenConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.steps_ahead = config.steps_ahead
        self.parts = ("next", *(f"ahead_{step}" for step in range(2, config.steps_ahead + 2)))

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length + 1 + self.steps_ahead)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        tokens_BR = tokens_BR.astype(np.int64)
        segments_BR = document_segments(tokens_BR, self.vocabulary.end_of_document)
        segments_BS = np.ascontiguousarray(segments_BR[:, :sequence_length])
        blocks = [tokens_BR[:, 1 : sequence_length + 1]]
        for step in range(1, self.steps_ahead + 1):
            # the position from which this token would be the next one must be of the same document
            same_BS = segments_BR[:, step : step + sequence_length] == segments_BS
            blocks.append(np.where(same_BS, tokens_BR[:, step + 1 : step + 1 + sequence_length], IGNORE))
        rows, steps = len(tokens_BR), len(blocks)
        step_of = np.repeat(np.arange(steps), sequence_length)
        return Examples(
            tokens_BS=np.ascontiguousarray(tokens_BR[:, :sequence_length]),
            labels_BS=np.concatenate(blocks, axis=1),
            segments_BS=segments_BS,
            weights_BS=np.tile(np.where(step_of == 0, 1.0, self.config.weight).astype(np.float32), (rows, 1)),
            part_BS=np.tile(step_of.astype(np.int8), (rows, 1)),
            counts_B=np.full(rows, sequence_length),
        )
