"""Masked language modelling: some tokens are hidden, and predicted from both sides (BERT, arXiv 1810.04805).

Choices:
- One 16-bit draw per token decides whether it is a target and what replaces it, so the rate is a multiple of 1/65536. Random
  replacements are drawn only for the few tokens that need one, from the ordinary ids (special tokens are neither hidden nor drawn).
- A whole word gets one draw: it is masked, randomised or kept as a whole. Words come from a table by id (`Vocabulary.word_start_V`),
  which serves byte-level vocabularies and needs no text at run time.
- Spans begin independently at every position; the probability of a beginning is solved for the share that their union covers.
- A row that has an ordinary token has a target: where the draws choose none, the token (or word) with the lowest draw is taken.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.objective import MLMConfig, MLMCount, MLMUnit
from heads_lightning.objectives.base import (
    Objective,
    Ramp,
    SampleRandom,
    Vocabulary,
    Window,
    document_segments,
    gather_ranges,
    ordinary_ids,
    require_roles,
)
from heads_lightning.registry import ConfigError


class _Words(NamedTuple):
    """The words of a batch, as ranges of flat positions."""

    starts: np.ndarray
    lengths: np.ndarray


class _SpanLengths:
    """Lengths of hidden spans: geometric, cut at a largest and renormalised (SpanBERT, arXiv 1907.10529, section 3.1).

    Args:
        end: probability that a span ends after each token.
        longest: tokens of a span, at most.
    """

    def __init__(self, end: float, longest: int) -> None:
        p = end * (1 - end) ** np.arange(longest)
        self._cumulative = np.cumsum(p) / p.sum()
        self._longer = 1 - np.concatenate([[0.0], self._cumulative[:-1]])  # P(length > d), d = 0 …
        self._begins: dict[float, float] = {}  # as many as there are 16-bit rates

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """int64: lengths from uniform numbers."""
        return np.minimum(np.searchsorted(self._cumulative, uniform, side="right") + 1, len(self._cumulative))

    def begin(self, rate_B: np.ndarray) -> np.ndarray:
        """Probability [B] that a span begins at a position, so that a share `rate` of the positions is in one."""
        rates, of_B = np.unique(rate_B, return_inverse=True)
        return np.array([self._begin(float(rate)) for rate in rates])[of_B]

    def _begin(self, rate: float) -> float:
        """The root, by bisection, of 1 − Π_d (1 − q·P(length > d)) = rate."""
        if rate not in self._begins:
            low, high = 0.0, 1.0
            for _ in range(40):
                q = (low + high) / 2
                low, high = (q, high) if 1 - np.prod(1 - q * self._longer) < rate else (low, q)
            self._begins[rate] = high
        return self._begins[rate]


class MLM(Objective):
    """Hide a share of the tokens or words and predict them from both sides."""

    attention: ClassVar[Attention] = Attention.bidirectional

    def __init__(self, config: MLMConfig, vocabulary: Vocabulary) -> None:
        (self._mask,) = require_roles(vocabulary, config.special_tokens, config.name)
        self.config = config
        self.vocabulary = vocabulary
        self._special_V = ~ordinary_ids(vocabulary, config.name)
        self._ordinary = np.flatnonzero(~self._special_V)
        if config.unit is MLMUnit.word and not len(vocabulary.word_start_V):
            raise ConfigError("objective.unit=word needs a tokenizer that knows where words begin; use objective.unit=token")
        # a special token opens a word and is never a target itself: two words it stands between stay apart
        self._word_start_V = np.ones(vocabulary.size, bool)
        self._word_start_V[: len(vocabulary.word_start_V)] = vocabulary.word_start_V
        self._word_start_V |= self._special_V
        start = config.rate if config.rate_start is None else config.rate_start
        self._rate = Ramp(start, config.rate, config.rate_tokens)
        self._spans = _SpanLengths(config.span_end, config.span_max) if config.unit is MLMUnit.span else None

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        limits_B3 = self._thresholds(rng)
        if self.config.count is MLMCount.exact:
            at_N, draw_N = self._choose_exactly(tokens_BR, rng, limits_B3[0, 2])
        elif self._spans is not None:
            at_N, draw_N = self._choose_spans(tokens_BR, rng, limits_B3[:, 2])
        else:
            draws_BS = rng.uint16(sequence_length)
            words = self._words(tokens_BR) if self.config.unit is MLMUnit.word else None
            at_N, draw_N = self._choose(tokens_BR, draws_BS, words, limits_B3[:, 2])
            at_N, draw_N = self._never_empty(at_N, draw_N, tokens_BR, draws_BS, words, rng, limits_B3[:, 2])
        limit_N3 = limits_B3[at_N // sequence_length] if self._rate.tokens else limits_B3[:1]
        tokens_BS = tokens_BR.astype(np.int64)
        labels_BS = np.full(tokens_BR.shape, IGNORE, np.int64)
        tokens, labels = tokens_BS.reshape(-1), labels_BS.reshape(-1)
        labels[at_N] = tokens[at_N]
        tokens[at_N[draw_N < limit_N3[:, 0]]] = self._mask
        change = at_N[(draw_N >= limit_N3[:, 0]) & (draw_N < limit_N3[:, 1])]
        draws = rng.uniform_at(change // sequence_length, change % sequence_length)
        tokens[change] = self._ordinary[(draws * len(self._ordinary)).astype(np.int64)]
        return Examples(tokens_BS, labels_BS, document_segments(tokens_BR, self.vocabulary.end_of_document))

    def _thresholds(self, rng: SampleRandom) -> np.ndarray:
        """int64 [B, 3], of a 16-bit draw: below the first masked, below the second random, below the third kept."""
        c = self.config
        shares = np.cumsum([c.mask_share, c.random_share, 1 - c.mask_share - c.random_share])
        limits_B3 = np.rint(65536 * self._rate.at(rng)[:, None] * shares).astype(np.int64)
        return np.maximum(limits_B3, shares > 0)

    def _words(self, tokens_BS: np.ndarray) -> _Words:
        starts_BS = self._word_start_V.take(tokens_BS)
        starts_BS[:, 0] = True
        starts = np.flatnonzero(starts_BS)
        return _Words(starts, np.diff(starts, append=tokens_BS.size))

    def _choose_exactly(self, tokens_BS: np.ndarray, rng: SampleRandom, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """As many targets in each row as `rate` makes of its positions, at least one; fewer where a row has too few ordinary tokens."""
        rows, width = tokens_BS.shape
        count = max(1, round(self.config.rate * width))
        keys_BS = np.where(self._special_V.take(tokens_BS), np.uint32(2**32 - 1), rng.uint32(width) >> np.uint32(1))
        at_BK = np.sort(np.argpartition(keys_BS, count - 1, axis=1)[:, :count], axis=1)
        row_BK = np.broadcast_to(np.arange(rows)[:, None], at_BK.shape)
        chosen_BK = keys_BS[row_BK, at_BK] < 2**31
        at, row = at_BK[chosen_BK], row_BK[chosen_BK]
        return row * width + at, (rng.uniform_at(row, at, stream=1) * limit).astype(np.int64)

    def _choose_spans(self, tokens_BS: np.ndarray, rng: SampleRandom, limit_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spans that begin by chance, some before the window, so that every position is hidden with the same probability. Where two
        overlap, the later one decides what becomes of the tokens."""
        assert self._spans is not None
        rows, width = tokens_BS.shape
        before = self.config.span_max - 1
        begins_BE = rng.uint32(width + before) < (self._spans.begin(limit_B / 65536) * 2.0**32)[:, None]
        row, start = np.nonzero(begins_BE)
        length = self._spans.draw(rng.uniform_at(row, start, stream=1))
        split = (rng.uniform_at(row, start, stream=2) * limit_B[row]).astype(np.int64)
        first, end = np.maximum(start - before, 0), np.minimum(start - before + length, width)
        kept = end > first
        lengths = (end - first)[kept]
        hidden, draw = gather_ranges((row * width + first)[kept], lengths), np.repeat(split[kept], lengths)
        ordinary = ~self._special_V.take(tokens_BS.reshape(-1).take(hidden))
        draw_M = np.full(rows * width, -1, np.int32)
        draw_M[hidden[ordinary]] = draw[ordinary]
        at = np.flatnonzero(draw_M >= 0)
        empty = np.flatnonzero(np.diff(at.searchsorted(np.arange(rows + 1) * width)) == 0)
        if len(empty):
            forced, split = self._force_one(empty, tokens_BS, rng, limit_B)
            draw_M[forced] = split
            at = np.flatnonzero(draw_M >= 0)
        return at, draw_M[at]

    def _force_one(self, empty: np.ndarray, tokens_BS: np.ndarray, rng: SampleRandom, limit_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat position and draw of one ordinary token in each of the rows `empty` that have one."""
        place = np.arange(tokens_BS.shape[1])
        keys = np.where(self._special_V[tokens_BS[empty]], 2.0, rng.uniform_at(empty[:, None], place[None], stream=3))
        at = keys.argmin(axis=1)
        usable = keys[np.arange(len(empty)), at] < 1
        row, at = empty[usable], at[usable]
        return row * len(place) + at, (rng.uniform_at(row, at, stream=4) * limit_B[row]).astype(np.int64)

    def _choose(
        self, tokens_BS: np.ndarray, draws_BS: np.ndarray, words: _Words | None, limit_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flat positions of the targets, and the draw that chose each."""
        if words is None:
            limit = limit_B[:, None] if self._rate.tokens else int(limit_B[0])  # one number compares four times as fast
            at = np.flatnonzero(draws_BS < limit)
            draw = draws_BS.reshape(-1)[at]
        else:
            draw_W = draws_BS.reshape(-1)[words.starts]
            chosen = np.flatnonzero(draw_W < limit_B[words.starts // tokens_BS.shape[1]])
            at = gather_ranges(words.starts[chosen], words.lengths[chosen])
            draw = np.repeat(draw_W[chosen], words.lengths[chosen])
        ordinary = ~self._special_V.take(tokens_BS.reshape(-1).take(at))  # looked up for the chosen alone
        return at[ordinary], draw[ordinary]

    def _never_empty(
        self,
        at: np.ndarray,
        draw: np.ndarray,
        tokens_BS: np.ndarray,
        draws_BS: np.ndarray,
        words: _Words | None,
        rng: SampleRandom,
        limit_B: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add, for each row without a target, its ordinary token with the lowest draw (or the word of that token)."""
        rows, width = tokens_BS.shape
        has_B = np.zeros(rows, bool)
        has_B[at // width] = True
        empty = np.flatnonzero(~has_B)
        if not len(empty):
            return at, draw
        special = self._special_V[tokens_BS[empty]]
        lowest = np.where(special, 1 << 16, draws_BS[empty].astype(np.int32)).argmin(axis=1)
        usable = ~special[np.arange(len(empty)), lowest]  # a row of special tokens alone stays without
        forced, row = (empty * width + lowest)[usable], empty[usable]
        split = (rng.uniform_at(row, np.zeros_like(row), stream=1) * limit_B[row]).astype(draw.dtype)  # the usual mask/random/keep
        if words is not None:
            word = np.searchsorted(words.starts, forced, side="right") - 1
            forced, split = gather_ranges(words.starts[word], words.lengths[word]), np.repeat(split, words.lengths[word])
            ordinary = ~self._special_V[tokens_BS.reshape(-1)[forced]]
            forced, split = forced[ordinary], split[ordinary]
        return np.concatenate([at, forced]), np.concatenate([draw, split])
