"""Span corruption (T5, arXiv 1910.10683, 3.1.4): spans are replaced by sentinels; the target lists each sentinel and what it hides.

    window    a b c d e f g h          input   a b <0> e f <1> h          target   <0> c d <1> g EOD

Choices:
- Numbers of hidden tokens and of spans are fixed by the window's length (seqio), so shapes are static; the window is the longest whose
  example fits. EOD, the end-of-document id, closes the target (and the encoder's input), as `</s>` does in T5.
- `edges=seqio` is T5's statistics: spans and gaps are independent uniform compositions, beginning with a gap and ending with a span, so
  that the first token is never hidden and the last always is. `edges=uniform` rolls the window by a uniform amount first: every token
  is hidden equally often. A span that the roll wraps around becomes two, each with a sentinel of its own.
- Decoder-only: input and target are one sequence, the input a prefix that is read from both sides. Encoder-decoder: `sequence_length`
  is the encoder's, and the decoder reads the target moved by one, padding first (T5's start id).
- As in T5, the documents of a window are one text; the end-of-document ids between them may be hidden like any token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import SpanCorruptionConfig, SpanEdges
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, gather_ranges
from heads_lightning.registry import ConfigError


class _Spans(NamedTuple):
    """Hidden spans of rows, in order; an unused one is empty and last."""

    starts_BN: np.ndarray
    lengths_BN: np.ndarray


class SpanCorruption(Objective):
    """Predict what sentinels in the text hide."""

    def __init__(self, config: SpanCorruptionConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.attention = config.attention  # pyright: ignore[reportAttributeAccessIssue]  # of this form
        self._windows: dict[int, Window] = {}
        self._spare = int(config.edges is SpanEdges.uniform)
        if not vocabulary.sentinels:
            raise ConfigError(f"objective={config.name} needs sentinels in the tokenizer; set tokenizer.num_sentinels=100")

    def counts(self, num_tokens: int) -> tuple[int, int]:
        """Hidden tokens and spans of a window (as seqio, and at most one span for each token that is not hidden)."""
        hidden = min(max(round(num_tokens * self.config.rate), 1), num_tokens - 1)
        return hidden, max(1, min(round(hidden / self.config.mean_length), hidden, num_tokens - hidden))

    def lengths(self, num_tokens: int) -> tuple[int, int]:
        """Positions of the input and of the target, EOD included in each (in the input: by option)."""
        hidden, spans = self.counts(num_tokens)
        sentinels = spans + self._spare
        return num_tokens - hidden + sentinels + int(self.config.encoder_end), hidden + sentinels + 1

    def _fits(self, num_tokens: int, sequence_length: int) -> bool:
        source, target = self.lengths(num_tokens)
        # decoder-only: the input needs no EOD of its own, and the target's EOD is only predicted
        return (source if self.attention is Attention.encoder_decoder else source + target - 2) <= sequence_length

    def window(self, sequence_length: int) -> Window:
        if sequence_length not in self._windows:
            self._windows[sequence_length] = self._solve(sequence_length)
        return self._windows[sequence_length]

    def _solve(self, sequence_length: int) -> Window:
        num_tokens = 2
        if not self._fits(num_tokens, sequence_length):
            raise ConfigError(f"data.sequence_length={sequence_length} is too short for objective={self.config.name}")
        while self._fits(num_tokens + 1, sequence_length):
            num_tokens += 1
        spans = self.counts(num_tokens)[1] + self._spare
        if spans > len(self.vocabulary.sentinels):
            raise ConfigError(
                f"objective={self.config.name} needs {spans} sentinels at data.sequence_length={sequence_length}, the tokenizer has "
                f"{len(self.vocabulary.sentinels)}; set tokenizer.num_sentinels={spans} or a larger objective.mean_length"
            )
        return Window(stride=num_tokens, length=num_tokens)

    def decoder_length(self, sequence_length: int) -> int:
        if self.attention is not Attention.encoder_decoder:
            return sequence_length
        return self.lengths(self.window(sequence_length).length)[1]

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        spans = self._draw_spans(tokens_BR.shape[1], rng)
        tokens_BR = tokens_BR.astype(np.int64)
        if self.attention is Attention.encoder_decoder:
            return self._encoder_decoder(tokens_BR, spans, sequence_length)
        return self._decoder_only(tokens_BR, spans, sequence_length)

    def _draw_spans(self, num_tokens: int, rng: SampleRandom) -> _Spans:
        hidden, count = self.counts(num_tokens)
        span_BN = _compositions(rng, hidden, count)
        gap_BN = _compositions(rng, num_tokens - hidden, count)
        starts_BN = np.cumsum(span_BN + gap_BN, axis=1) - span_BN
        if self.config.edges is SpanEdges.seqio:
            return _Spans(starts_BN, span_BN)
        starts_BN += (rng.uniform(1) * num_tokens).astype(np.int64)
        starts_BN %= num_tokens
        beyond_BN = np.maximum(starts_BN + span_BN - num_tokens, 0)
        wrapped_B1 = beyond_BN.sum(axis=1, keepdims=True)  # of the one span, at most, that reaches over the end
        starts_BN = np.concatenate([starts_BN, np.where(wrapped_B1 > 0, 0, num_tokens)], axis=1)
        span_BN = np.concatenate([span_BN - beyond_BN, wrapped_B1], axis=1)
        order = np.argsort(starts_BN, axis=1)
        return _Spans(np.take_along_axis(starts_BN, order, 1), np.take_along_axis(span_BN, order, 1))

    def _ranges(self, spans: _Spans, num_tokens: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Input and target of each row as (starts, lengths) of ranges [B, …] of [the rows' tokens, the sentinels, EOD, padding]."""
        starts_BN, lengths_BN = spans
        rows, count = starts_BN.shape
        offset_B1 = (np.arange(rows) * num_tokens)[:, None]
        sentinels_N = rows * num_tokens + np.arange(count)
        used_BN = lengths_BN > 0
        source = np.empty((2, rows, 2 * count + 1), np.int64)  # a gap, a sentinel, …, and what follows the last span
        starts, lengths = source
        starts[:, 0], starts[:, 2::2] = 0, starts_BN + lengths_BN
        lengths[:, :-1:2], lengths[:, -1] = starts_BN, num_tokens
        lengths[:, ::2] -= starts[:, ::2]
        starts[:, ::2] += offset_B1
        starts[:, 1::2], lengths[:, 1::2] = sentinels_N, used_BN
        target = np.empty((2, rows, 2 * count + 1), np.int64)  # a sentinel, what it hides, …, and EOD
        starts, lengths = target
        starts[:, :-1:2], lengths[:, :-1:2] = sentinels_N, used_BN
        starts[:, 1::2], lengths[:, 1::2] = starts_BN + offset_B1, lengths_BN
        starts[:, -1], lengths[:, -1] = rows * num_tokens + len(self.vocabulary.sentinels), 1
        return (source[0], source[1]), (target[0], target[1])

    def _fill(self, tokens_BR: np.ndarray, ranges: tuple[np.ndarray, np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of ids padded to `width`, and their lengths."""
        starts, lengths = ranges
        used_B = lengths.sum(axis=1)
        source = np.concatenate(
            [tokens_BR.reshape(-1), self.vocabulary.sentinels, [self.vocabulary.end_of_document], np.full(width, self.vocabulary.padding)]
        )
        starts = np.column_stack([starts, np.full(len(starts), len(source) - width)])
        lengths = np.column_stack([lengths, width - used_B])
        return source.take(gather_ranges(starts.reshape(-1), lengths.reshape(-1))).reshape(-1, width), used_B

    def _decoder_only(self, tokens_BR: np.ndarray, spans: _Spans, width: int) -> Examples:
        source, target = self._ranges(spans, tokens_BR.shape[1])
        both = np.concatenate([source[0], target[0]], axis=1), np.concatenate([source[1], target[1]], axis=1)
        ids, used_B = self._fill(tokens_BR, both, width + 1)
        source_B, read_B = source[1].sum(axis=1), used_B - 1  # EOD is predicted, not read
        tokens_BS = ids[:, :-1].copy()
        unread = np.flatnonzero(read_B < width)
        tokens_BS[unread, read_B[unread]] = self.vocabulary.padding
        place = np.arange(width)
        trained_BS = (place >= source_B[:, None] - 1) & (place < read_B[:, None])
        return Examples(
            tokens_BS,
            labels_BS=np.where(trained_BS, ids[:, 1:], IGNORE),
            segments_BS=_segments(read_B, width),
            prefix_BS=place < source_B[:, None],
        )

    def _encoder_decoder(self, tokens_BR: np.ndarray, spans: _Spans, width: int) -> Examples:
        source, target = self._ranges(spans, tokens_BR.shape[1])
        end = target[0][:, -1:]
        closed = np.full_like(end, self.config.encoder_end)
        source = np.concatenate([source[0], end], axis=1), np.concatenate([source[1], closed], axis=1)
        encoder_BT, source_B = self._fill(tokens_BR, source, width)
        target_BS, target_B = self._fill(tokens_BR, target, self.lengths(tokens_BR.shape[1])[1])
        start = np.full((len(target_BS), 1), self.vocabulary.padding)
        real_BS = np.arange(target_BS.shape[1]) < target_B[:, None]
        return Examples(
            tokens_BS=np.where(real_BS, np.concatenate([start, target_BS[:, :-1]], axis=1), self.vocabulary.padding),
            labels_BS=np.where(real_BS, target_BS, IGNORE),
            segments_BS=_segments(target_B, target_BS.shape[1]),
            encoder_tokens_BT=encoder_BT,
            encoder_segments_BT=_segments(source_B, width),
        )


def _segments(used_B: np.ndarray, width: int) -> np.ndarray:
    """int32 [B, width]: 0 for the first positions of each row, the used ones, and padding."""
    runs_B2 = np.stack([used_B, width - used_B], axis=1)
    return np.repeat(np.tile(np.array([0, PADDING], np.int32), len(used_B)), runs_B2.reshape(-1)).reshape(-1, width)


def _compositions(rng: SampleRandom, total: int, parts: int) -> np.ndarray:
    """int64 [B, parts]: `total` as a sum of positive parts, each way equally likely (parts − 1 of total − 1 places to break)."""
    if parts == 1:
        return np.full((rng.rows, 1), total)
    keys = rng.bits(-(-(total - 1) // 2)).view(np.uint32)[:, : total - 1]
    least = np.partition(keys, parts - 2, axis=1)[:, parts - 2, None]
    breaks = np.flatnonzero(keys <= least)
    if len(breaks) == len(keys) * (parts - 1):
        breaks = breaks.reshape(len(keys), -1) % (total - 1) + 1
    else:  # two of a row's keys are equal
        breaks = np.argpartition(keys, parts - 2, axis=1)[:, : parts - 1] + 1
        breaks.sort(axis=1)
    edge = np.zeros((len(breaks), 1), np.int64)
    return np.diff(np.concatenate([edge, breaks, edge + total], axis=1), axis=1)


def restore(source_ids: np.ndarray, target_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The window from an example's input and target (without the EOD that closes each): the inverse, for tests and for display."""
    hidden: dict[int, list[int]] = {}
    current: list[int] = []
    for token in target_ids.tolist():
        if token in vocabulary.sentinels:
            current = hidden.setdefault(token, [])
        else:
            current.append(token)
    return np.array([x for token in source_ids.tolist() for x in hidden.get(token, [token])])
