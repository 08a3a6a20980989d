"""Prefix language modelling: the beginning of a piece is read from both sides, the rest is predicted left to right (T5, 3.2.3).

The pieces are the documents of a window. Each has a prefix of its own, a share of its length that is uniform between two bounds, and
always leaves a token to predict. Positions inside the prefix see what they would predict, so they have no target; the last one has.

Encoder-decoder: the encoder reads the prefixes, one token each at least, and the decoder writes the rests, each after a start token (T5's,
the padding id). Pieces keep their segments, so a decoder position sees the prefix of its own document alone.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import PrefixLMConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments, gather_ranges


class PrefixLM(Objective):
    """Predict the rest of each document after a prefix that is read from both sides."""

    attention: ClassVar[Attention] = Attention.prefix

    def __init__(self, config: PrefixLMConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.attention = config.attention  # pyright: ignore[reportAttributeAccessIssue]  # of this form

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
        if self.attention is Attention.encoder_decoder:
            kept = np.clip((share * (lengths + 1)).astype(np.int64), 1, lengths)
            return self._encoder_decoder(Examples(tokens_BS, labels_BS, segments_BS), starts, lengths, kept)
        ends = starts + np.minimum((share * (lengths + 1)).astype(np.int64), lengths - 1)
        place = np.arange(tokens_BS.size)
        prefix_BS = (place < np.repeat(ends, lengths)).reshape(tokens_BS.shape)
        labels_BS[:, :-1][prefix_BS[:, 1:] & (np.diff(segments_BS, axis=1) == 0)] = IGNORE
        return Examples(tokens_BS, labels_BS, segments_BS, prefix_BS=prefix_BS)

    def _encoder_decoder(self, windows: Examples, starts_P: np.ndarray, lengths_P: np.ndarray, kept_P: np.ndarray) -> Examples:
        """Prefixes for the encoder and rests for the decoder, from pieces [P] of the windows and what each keeps as its prefix."""
        tokens_BS, labels_BS, segments_BS = windows.tokens_BS, windows.labels_BS, windows.segments_BS
        assert segments_BS is not None
        numbers_P, width = segments_BS.reshape(-1)[starts_P], tokens_BS.shape[1]
        out = Examples(
            tokens_BS=np.full_like(tokens_BS, self.vocabulary.padding),
            labels_BS=np.full_like(labels_BS, IGNORE),
            segments_BS=np.full_like(segments_BS, PADDING),
            encoder_tokens_BT=np.full_like(tokens_BS, self.vocabulary.padding),
            encoder_segments_BT=np.full_like(segments_BS, PADDING),
        )
        assert out.segments_BS is not None
        assert out.encoder_tokens_BT is not None
        assert out.encoder_segments_BT is not None
        read, there = gather_ranges(starts_P, kept_P), gather_ranges(_packed(starts_P // width, kept_P, width), kept_P)
        out.encoder_tokens_BT.reshape(-1)[there] = tokens_BS.reshape(-1)[read]
        out.encoder_segments_BT.reshape(-1)[there] = np.repeat(numbers_P, kept_P)
        rest_P = lengths_P - kept_P + 1  # what is predicted: the last token of the prefix would predict the first
        places_P = _packed(starts_P // width, rest_P, width)
        read, there = gather_ranges(starts_P + kept_P - 1, rest_P), gather_ranges(places_P, rest_P)
        out.labels_BS.reshape(-1)[there] = labels_BS.reshape(-1)[read]
        out.tokens_BS.reshape(-1)[there] = tokens_BS.reshape(-1)[read]
        out.tokens_BS.reshape(-1)[places_P] = self.vocabulary.padding
        out.segments_BS.reshape(-1)[there] = np.repeat(numbers_P, rest_P)
        return out


def _packed(rows_P: np.ndarray, lengths_P: np.ndarray, width: int) -> np.ndarray:
    """int64 [P]: where runs of these lengths begin when each row of `width` is filled from its beginning."""
    before_P = np.cumsum(lengths_P) - lengths_P
    first_P = np.searchsorted(rows_P, rows_P)
    return rows_P * width + before_P - before_P[first_P]
