"""Values: which position scores which token, and the number that it must reach.

The targets are computed here, in numpy, before anything reaches a device. Choices: a score's position holds a label too, the token after
it, so that the count of targets is the count of labels everywhere, and a joint language-model loss has what it needs; numbers are finite
at every position; masked tokens (a prompt, a tool's output) carry nothing but their rewards, which belong to the token before them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Examples
from heads_lightning.configs.value import ValueAlignment, ValueConfig, ValueLoss, ValuePositions, ValueReduction, ValueTarget
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary, Window
from heads_lightning.registry import ConfigError

_CORRUPTED = 1
"""Stream of the random numbers that decide which snippets are corrupted."""


class Scored(NamedTuple):
    """Sequences to score, one or a few a row. Arrays [B, S] by token; numbers where `mask` is false do not matter."""

    tokens_BS: np.ndarray
    """int64."""
    segments_BS: np.ndarray
    """int32: sequence of the row, PADDING for padding."""
    mask_BS: np.ndarray
    """bool: tokens that are scored (actions, not prompt or tool output)."""
    returns_BS: np.ndarray
    """float32: `returns`, or the outcome, of each token; of pairs the margin."""
    rewards_BS: np.ndarray
    """float32: what each token earned."""
    old_values_BS: np.ndarray
    """float32: what each token's state was thought to be worth."""


def gae(
    rewards_BS: np.ndarray, values_BS: np.ndarray, mask_BS: np.ndarray, *, gamma: float, lam: float, segments_BS: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over the tokens of the mask, as if the others were not there.

    A reward at a masked token goes to the token of the mask before it; values at masked tokens do not matter. The state after a sequence's
    last token is worth 0.

    Args:
        rewards_BS: float [B, S].
        values_BS: float [B, S].
        mask_BS: bool [B, S].
        gamma: discount a token.
        lam: λ; 0 is one step ahead, 1 the whole return.
        segments_BS: int [B, S]: sequences of a row, which do not reach each other. None: one a row.

    Returns:
        (advantages, returns = advantages + values), float32 [B, S], 0 at masked tokens.
    """
    rows, length = rewards_BS.shape
    rewards_BS = np.where(np.isfinite(rewards_BS) | mask_BS, rewards_BS, 0.0).astype(np.float64)
    advantages_BS = np.zeros((rows, length))
    advantage, value_after, earned_after = np.zeros(rows), np.zeros(rows), np.zeros(rows)
    for t in range(length - 1, -1, -1):
        if segments_BS is not None and t + 1 < length:
            same = segments_BS[:, t] == segments_BS[:, t + 1]
            advantage, value_after, earned_after = (np.where(same, x, 0.0) for x in (advantage, value_after, earned_after))
        acts, value, earned = mask_BS[:, t], values_BS[:, t], rewards_BS[:, t] + earned_after
        delta = earned + gamma * value_after - value
        advantage = np.where(acts, delta + gamma * lam * advantage, advantage)
        value_after, earned_after = np.where(acts, value, value_after), np.where(acts, 0.0, earned)
        advantages_BS[:, t] = np.where(acts, advantage, 0.0)
    returns_BS = np.where(mask_BS, advantages_BS + np.where(mask_BS, values_BS, 0.0), 0.0)
    return advantages_BS.astype(np.float32), returns_BS.astype(np.float32)


class Value(Objective):
    """Score tokens. `examples` makes the built-in task of windows of text; `scored_examples` takes records."""

    def __init__(self, config: ValueConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.attention = config.attention  # pyright: ignore[reportAttributeAccessIssue]
        self._special_V = np.zeros(vocabulary.size, bool)
        self._special_V[: len(vocabulary.special_V)] = vocabulary.special_V
        self._special_V[[vocabulary.end_of_document, vocabulary.padding]] = True
        self._ordinary = np.flatnonzero(~self._special_V)

    def window(self, sequence_length: int) -> Window:
        length = sequence_length
        if self.config.pairwise:  # each snippet stands in a row twice
            snippet = self._snippet(sequence_length)
            length = sequence_length // (2 * snippet) * snippet
        return Window(stride=length, length=length)

    def _snippet(self, sequence_length: int) -> int:
        """Tokens of a snippet of the built-in task."""
        return min(self.config.snippet_tokens, sequence_length // 2 if self.config.pairwise else sequence_length)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        if self.config.needs_records:
            raise ConfigError(f"{self.config.needs_records} needs records that hold its numbers: use data=jsonl or data=parquet")
        tokens_BR = tokens_BR.astype(np.int64)
        if self.config.pairwise:
            return self.scored_examples(self._pairs(tokens_BR, rng, sequence_length))
        segments_BR = self._snippets(tokens_BR, sequence_length)
        rows_BR = np.indices(segments_BR.shape)[0]
        corrupted_BR = rng.uniform_at(rows_BR, segments_BR, _CORRUPTED) < 0.5
        changed_BR = self._corrupt(tokens_BR, corrupted_BR, rng)
        intact_BR = 1.0 - _any_in_sequence(changed_BR != tokens_BR, segments_BR)
        mask_BR = ~self._special_V[tokens_BR]
        return self.scored_examples(
            Scored(
                changed_BR,
                segments_BR,
                mask_BR,
                returns_BS=intact_BR.astype(np.float32),
                rewards_BS=(intact_BR * _last_of_each(mask_BR, segments_BR)).astype(np.float32),
                old_values_BS=np.zeros(tokens_BR.shape, np.float32),
            )
        )

    def scored_examples(self, scored: Scored) -> Examples:
        """Examples of sequences whose numbers are known."""
        targets_BS = self._targets(scored)
        old_BS = scored.old_values_BS if self.config.loss == ValueLoss.clipped_mse else None
        mask_BS = scored.mask_BS
        if self.config.positions == ValuePositions.last or self.config.pairwise:
            mask_BS = _last_of_each(mask_BS, scored.segments_BS)
        next_BS = self._next_tokens(scored)
        if self.config.alignment == ValueAlignment.state_before_action:
            mask_BS = _one_earlier(mask_BS, False) & (_one_earlier(scored.segments_BS, PADDING) == scored.segments_BS)
            targets_BS, old_BS = _one_earlier(targets_BS, 0.0), None if old_BS is None else _one_earlier(old_BS, 0.0)
        counts_B, weights_BS = self._divisor(mask_BS, scored.segments_BS)
        return Examples(
            tokens_BS=scored.tokens_BS,
            labels_BS=np.where(mask_BS, next_BS, IGNORE),
            segments_BS=scored.segments_BS,
            weights_BS=weights_BS,
            values_BS=np.where(mask_BS, targets_BS, 0.0).astype(np.float32),
            old_values_BS=None if old_BS is None else np.where(mask_BS, old_BS, 0.0).astype(np.float32),
            counts_B=counts_B,
        )

    def _targets(self, scored: Scored) -> np.ndarray:
        """float32 [B, S], by token."""
        config = self.config
        if config.target in (ValueTarget.outcome, ValueTarget.given):
            return scored.returns_BS
        whole = config.target == ValueTarget.monte_carlo
        values_BS, lam = (np.zeros_like(scored.rewards_BS), 1.0) if whole else (scored.old_values_BS, config.lam)
        return gae(scored.rewards_BS, values_BS, scored.mask_BS, gamma=config.gamma, lam=lam, segments_BS=scored.segments_BS)[1]

    def _next_tokens(self, scored: Scored) -> np.ndarray:
        """int64 [B, S]: the token after each position; a sequence ends with the end-of-document id."""
        following_BS = _one_earlier(scored.tokens_BS, self.vocabulary.end_of_document)
        goes_on_BS = _one_earlier(scored.segments_BS, PADDING) == scored.segments_BS
        return np.where(goes_on_BS, following_BS, self.vocabulary.end_of_document)

    def _divisor(self, mask_BS: np.ndarray, segments_BS: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What rows count for, and the weights of targets; None for one each."""
        if self.config.pairwise:
            return np.count_nonzero(mask_BS, axis=1).astype(np.int64) // 2, None
        if self.config.reduction == ValueReduction.token_mean:
            return None, None
        counts_B = np.count_nonzero(_last_of_each(mask_BS, segments_BS), axis=1).astype(np.int64)
        if self.config.reduction == ValueReduction.seq_mean_token_sum:
            return counts_B, None
        length_BS = np.maximum(_sum_in_sequence(mask_BS, segments_BS), 1)
        return counts_B, np.where(mask_BS, 1.0 / length_BS, 1.0).astype(np.float32)

    # -- the built-in task ----------------------------------------------------------------------------------------------

    def _snippets(self, tokens_BR: np.ndarray, sequence_length: int) -> np.ndarray:
        """int32: number of the snippet in its row; one ends with its document, or when it is long enough."""
        starts_BR = tokens_BR == self.vocabulary.end_of_document
        starts_BR[:, :: self._snippet(sequence_length)] = True
        return (np.cumsum(starts_BR, axis=1) - 1).astype(np.int32)

    def _corrupt(self, tokens_BR: np.ndarray, corrupted_BR: np.ndarray, rng: SampleRandom) -> np.ndarray:
        """The tokens with some of those in corrupted snippets replaced by ordinary ones, drawn evenly."""
        length = tokens_BR.shape[1]
        chosen_BR = corrupted_BR & (rng.uniform(length) < self.config.corruption_rate) & ~self._special_V[tokens_BR]
        drawn_BR = self._ordinary[(rng.uniform(length) * len(self._ordinary)).astype(np.int64)]
        return np.where(chosen_BR, drawn_BR, tokens_BR)

    def _pairs(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Scored:
        """Each snippet and its corrupted copy side by side: chosen, rejected."""
        rows, snippet = len(tokens_BR), self._snippet(sequence_length)
        corrupted_BR = self._corrupt(tokens_BR, np.ones(tokens_BR.shape, bool), rng)
        pairs_BPKE = np.stack([x.reshape(rows, -1, snippet) for x in (tokens_BR, corrupted_BR)], axis=2)
        differ_BP = (pairs_BPKE[:, :, 0] != pairs_BPKE[:, :, 1]).any(axis=2)  # a snippet that stays as it is makes no pair
        padding = sequence_length - 2 * tokens_BR.shape[1]
        tokens_BS = np.pad(pairs_BPKE.reshape(rows, -1), ((0, 0), (0, padding)), constant_values=self.vocabulary.padding)
        segments = np.pad(np.arange(2 * tokens_BR.shape[1]) // snippet, (0, padding), constant_values=PADDING).astype(np.int32)
        segments_BS = np.ascontiguousarray(np.broadcast_to(segments, tokens_BS.shape))
        mask_BS = np.pad(np.repeat(differ_BP, 2 * snippet, axis=1), ((0, 0), (0, padding)))
        none_BS = np.zeros(tokens_BS.shape, np.float32)
        return Scored(tokens_BS, segments_BS, mask_BS, none_BS, none_BS, none_BS)


def scored_tokens(examples: Examples, alignment: ValueAlignment) -> np.ndarray:
    """int64 [B, S]: the token that each position's value is about, IGNORE where it has none. To look at, before trusting an alignment."""
    about_BS = examples.tokens_BS if alignment == ValueAlignment.after_token else examples.labels_BS
    return np.where(examples.labels_BS != IGNORE, about_BS, IGNORE)


def _one_earlier(array_BS: np.ndarray, last: float) -> np.ndarray:
    """Each row moved one place to the left."""
    moved = np.full_like(array_BS, last)
    moved[:, :-1] = array_BS[:, 1:]
    return moved


def _last_of_each(mask_BS: np.ndarray, segments_BS: np.ndarray) -> np.ndarray:
    """bool: the last position of the mask in each sequence."""
    later_BS = np.zeros(mask_BS.shape, bool)
    seen = np.zeros(len(mask_BS), bool)
    for t in range(mask_BS.shape[1] - 1, -1, -1):
        if t + 1 < mask_BS.shape[1]:
            seen = seen & (segments_BS[:, t] == segments_BS[:, t + 1])
        later_BS[:, t] = seen
        seen = seen | mask_BS[:, t]
    return mask_BS & ~later_BS


def _sum_in_sequence(array_BS: np.ndarray, segments_BS: np.ndarray) -> np.ndarray:
    """[B, S]: at each position, the sum over its whole sequence."""
    width = segments_BS.shape[1] + 1
    sequence = np.indices(segments_BS.shape)[0] * width + segments_BS - PADDING
    return np.bincount(sequence.reshape(-1), array_BS.reshape(-1), minlength=width * len(segments_BS))[sequence]


def _any_in_sequence(array_BS: np.ndarray, segments_BS: np.ndarray) -> np.ndarray:
    return _sum_in_sequence(array_BS, segments_BS) > 0
