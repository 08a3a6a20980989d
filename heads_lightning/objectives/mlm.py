"""Masked language modelling: some tokens are hidden, and predicted from both sides (BERT, arXiv 1810.04805).

Choices:
- One 16-bit draw per token decides whether it is a target and what replaces it, so the rate is a multiple of 1/65536. Random
  replacements are drawn only for the few tokens that need one, from the ordinary ids (special tokens are neither hidden nor drawn).
- A whole word gets one draw: it is masked, randomised or kept as a whole. Words come from a table by id (`Vocabulary.word_start_V`),
  which serves byte-level vocabularies and needs no text at run time.
- A row that has an ordinary token has a target: where the draws choose none, the token (or word) with the lowest draw is taken.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, Attention, Examples
from heads_lightning.configs.objective import MLMConfig, MLMUnit
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window, document_segments, gather_ranges, require_roles
from heads_lightning.registry import ConfigError


class _Words(NamedTuple):
    """The words of a batch, as ranges of flat positions."""

    starts: np.ndarray
    lengths: np.ndarray


class MLM(Objective):
    """Hide a share of the tokens or words and predict them from both sides."""

    attention: ClassVar[Attention] = Attention.bidirectional

    def __init__(self, config: MLMConfig, vocabulary: Vocabulary) -> None:
        (self._mask,) = require_roles(vocabulary, config.special_tokens, config.name)
        self.config = config
        self.vocabulary = vocabulary
        self._special_V = np.zeros(vocabulary.size, bool)
        self._special_V[: len(vocabulary.special_V)] = vocabulary.special_V
        self._special_V[[self._mask, vocabulary.padding, vocabulary.end_of_document]] = True
        self._ordinary = np.flatnonzero(~self._special_V)
        if not len(self._ordinary):
            raise ConfigError("objective=mlm needs a vocabulary with ordinary tokens; every id of this tokenizer is special")
        if config.unit is MLMUnit.word and not len(vocabulary.word_start_V):
            raise ConfigError("objective.unit=word needs a tokenizer that knows where words begin; use objective.unit=token")
        # a special token opens a word and is never a target itself: two words it stands between stay apart
        self._word_start_V = np.ones(vocabulary.size, bool)
        self._word_start_V[: len(vocabulary.word_start_V)] = vocabulary.word_start_V
        self._word_start_V |= self._special_V
        # thresholds of the 16-bit draw: below the first masked, below the second random, below the third kept
        shares = np.cumsum([config.mask_share, config.random_share, 1 - config.mask_share - config.random_share])
        self._masked, self._random, self._chosen = (max(1, round(65536 * config.rate * share)) if share else 0 for share in shares)

    def window(self, sequence_length: int) -> Window:
        return Window(stride=sequence_length, length=sequence_length)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        draws_BS = rng.uint16(sequence_length)
        words = self._words(tokens_BR) if self.config.unit is MLMUnit.word else None
        at_N, draw_N = self._choose(tokens_BR, draws_BS, words)
        at_N, draw_N = self._never_empty(at_N, draw_N, tokens_BR, draws_BS, words, rng)
        tokens_BS = tokens_BR.astype(np.int64)
        labels_BS = np.full(tokens_BR.shape, IGNORE, np.int64)
        tokens, labels = tokens_BS.reshape(-1), labels_BS.reshape(-1)
        labels[at_N] = tokens[at_N]
        tokens[at_N[draw_N < self._masked]] = self._mask
        change = at_N[(draw_N >= self._masked) & (draw_N < self._random)]
        draws = rng.uniform_at(change // sequence_length, change % sequence_length)
        tokens[change] = self._ordinary[(draws * len(self._ordinary)).astype(np.int64)]
        return Examples(tokens_BS, labels_BS, document_segments(tokens_BR, self.vocabulary.end_of_document))

    def _words(self, tokens_BS: np.ndarray) -> _Words:
        starts_BS = self._word_start_V[tokens_BS]
        starts_BS[:, 0] = True
        starts = np.flatnonzero(starts_BS)
        return _Words(starts, np.diff(starts, append=tokens_BS.size))

    def _choose(self, tokens_BS: np.ndarray, draws_BS: np.ndarray, words: _Words | None) -> tuple[np.ndarray, np.ndarray]:
        """Flat positions of the targets, and the draw that chose each."""
        if words is None:
            at = np.flatnonzero(draws_BS < self._chosen)
            draw = draws_BS.reshape(-1)[at]
        else:
            draw_W = draws_BS.reshape(-1)[words.starts]
            chosen = np.flatnonzero(draw_W < self._chosen)
            at = gather_ranges(words.starts[chosen], words.lengths[chosen])
            draw = np.repeat(draw_W[chosen], words.lengths[chosen])
        ordinary = ~self._special_V[tokens_BS.reshape(-1)[at]]  # looked up for the chosen alone
        return at[ordinary], draw[ordinary]

    def _never_empty(
        self, at: np.ndarray, draw: np.ndarray, tokens_BS: np.ndarray, draws_BS: np.ndarray, words: _Words | None, rng: SampleRandom
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
        split = (rng.uniform_at(row, np.zeros_like(row), stream=1) * self._chosen).astype(draw.dtype)  # the usual mask/random/keep
        if words is not None:
            word = np.searchsorted(words.starts, forced, side="right") - 1
            forced, split = gather_ranges(words.starts[word], words.lengths[word]), np.repeat(split, words.lengths[word])
            ordinary = ~self._special_V[tokens_BS.reshape(-1)[forced]]
            forced, split = forced[ordinary], split[ordinary]
        return np.concatenate([at, forced]), np.concatenate([draw, split])
