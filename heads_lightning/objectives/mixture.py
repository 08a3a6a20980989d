"""A mixture: each sample is given to one of several objectives, drawn by weight; the loss of each is reported on its own.

Choices:
- A sample belongs to a part by a draw of its own, so the shares hold in the long run and nothing depends on the batch.
- The parts read windows of different lengths. Windows begin at the shortest stride, so that no token is skipped; a part that reads more
  sees some tokens of the next window too.
- Parts must agree on attention. Causal parts fit beside prefix parts: their prefix is empty. The decoder of an encoder-decoder is as long
  as its longest part's; the others are padded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window

_CHOICE = 1 << 20
"""Stream of the draws that choose the part: apart from those of the parts."""


class Part(NamedTuple):
    """One objective of a mixture."""

    name: str
    weight: float
    objective: Objective


class Mixture(Objective):
    """Several objectives, one for each sample."""

    def __init__(self, components: list[Part], attention: Attention, vocabulary: Vocabulary) -> None:
        self.components = components
        self.vocabulary = vocabulary
        self.attention = attention  # pyright: ignore[reportAttributeAccessIssue]  # that of its parts
        self.parts = tuple(
            f"{part.name}_{inner}" if inner else part.name for part in components for inner in (part.objective.parts or ("",))
        )
        counts = [max(1, len(part.objective.parts)) for part in components]
        self._first_part = np.cumsum([0, *counts[:-1]])
        weights = np.array([part.weight for part in components])
        self._edges = np.cumsum(weights)[:-1] / weights.sum()

    def window(self, sequence_length: int) -> Window:
        windows = [part.objective.window(sequence_length) for part in self.components]
        return Window(min(w.stride for w in windows), max(w.length for w in windows))

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        rows = np.arange(len(tokens_BR))
        chosen_B = np.searchsorted(self._edges, rng.uniform_at(rows, np.zeros_like(rows), _CHOICE), side="right")
        out = self._blank(len(tokens_BR), sequence_length)
        for number, part in enumerate(self.components):
            which = np.flatnonzero(chosen_B == number)
            if len(which):
                width = part.objective.window(sequence_length).length
                made = part.objective.examples(np.ascontiguousarray(tokens_BR[which, :width]), rng.select(which), sequence_length)
                self._put(out, which, made, int(self._first_part[number]))
        return out

    def decoder_length(self, sequence_length: int) -> int:
        return max(part.objective.decoder_length(sequence_length) for part in self.components)

    def _blank(self, rows: int, sequence_length: int) -> Examples:
        """Examples of padding."""
        shape, encodes = (rows, self.decoder_length(sequence_length)), self.attention is Attention.encoder_decoder
        return Examples(
            tokens_BS=np.full(shape, self.vocabulary.padding, np.int64),
            labels_BS=np.full(shape, IGNORE, np.int64),
            segments_BS=np.full(shape, PADDING if encodes else 0, np.int32),
            prefix_BS=np.zeros(shape, bool) if self.attention is Attention.prefix else None,
            encoder_tokens_BT=np.full((rows, sequence_length), self.vocabulary.padding, np.int64) if encodes else None,
            encoder_segments_BT=np.full((rows, sequence_length), PADDING, np.int32) if encodes else None,
            part_BS=np.zeros(shape, np.int8),
        )

    def _put(self, out: Examples, rows: np.ndarray, made: Examples, first_part: int) -> None:
        for name, array in made._asdict().items():
            target = getattr(out, name)
            if array is not None and target is not None:
                target[rows, : array.shape[1]] = array
        assert out.part_BS is not None
        out.part_BS[rows] += np.int8(first_part)
