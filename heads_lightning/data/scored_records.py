"""Records with numbers (objective=value): read, checked and tokenised.

A record has `text` (after an unscored `prompt`) or `input_ids` (with a `mask` of the tokens that are scored), and what its target needs:

    outcome                one number for the whole sequence
    steps, step_labels     instead of text: pieces and a number for each (null: none), which stands at the piece's last token;
                           with input_ids: step_ends, the index of each last token
    returns                a number a token (input_ids), or one for all
    rewards                a number a token (input_ids), or one for the last token
    old_values             a number a token (input_ids), for objective.target=gae and loss=clipped_mse
    chosen, rejected       two texts or lists of ids, with an optional `margin` (objective.loss=bradley_terry)

What is missing or not finite is a problem of the record: it is left out, counted and named. A text is preceded by the end-of-document
id, as everywhere; `input_ids` stand as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from heads_lightning.configs.value import ValueConfig, ValueLoss, ValueTarget
from heads_lightning.data.tokenizer import Tokenizer

FIELDS = [
    "prompt", "text", "input_ids", "mask", "steps", "step_ends", "step_labels", "outcome", "returns", "rewards", "old_values", "chosen",
    "rejected", "margin",
]  # fmt: skip
"""Fields that are read."""


class Sequence(NamedTuple):
    """A sequence one entry a token."""

    tokens: np.ndarray
    mask: np.ndarray
    returns: np.ndarray
    rewards: np.ndarray
    old_values: np.ndarray


class Unusable(ValueError):
    """Why a record is left out."""


class RecordReader:
    """Records to sequences.

    Args:
        config: what the targets need.
        tokenizer: of texts; ids of `input_ids` must be its.
    """

    def __init__(self, config: ValueConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._marker = tokenizer.vocabulary.end_of_document

    def sequences(self, fields: dict[str, Any]) -> list[Sequence]:
        """One sequence, or a chosen and a rejected one.

        Raises:
            Unusable: what is missing or wrong.
        """
        if self._config.pairwise:
            margin = _number(fields, "margin") if fields.get("margin") is not None else 0.0
            return [self._half(fields, side, margin) for side in ("chosen", "rejected")]
        tokens, mask, pieces = self._tokens(fields)
        config, empty = self._config, np.zeros(len(tokens), np.float32)
        returns, rewards = empty, empty
        if config.target == ValueTarget.outcome and fields.get("step_labels") is not None:
            returns, mask = _step_labels(fields["step_labels"], pieces, mask)
        elif config.target == ValueTarget.outcome:
            returns = np.full(len(tokens), _number(fields, "outcome"), np.float32)
        elif config.target == ValueTarget.given:
            returns = _numbers(fields, "returns", mask, everywhere=True)
        else:
            rewards = _numbers(fields, "rewards", mask, everywhere=False)
        asks_old = config.target == ValueTarget.gae or config.loss == ValueLoss.clipped_mse
        old_values = _numbers(fields, "old_values", mask, everywhere=True) if asks_old else empty
        if config.loss == ValueLoss.bce and not ((returns[mask] >= 0) & (returns[mask] <= 1)).all():
            raise Unusable("a target outside 0 to 1, which objective.loss=bce cannot take")
        if not mask.any():
            raise Unusable("no token to score")
        return [Sequence(tokens, mask, returns, rewards, old_values)]

    def _half(self, fields: dict[str, Any], side: str, margin: float) -> Sequence:
        given = fields.get(side)
        inner = {"prompt": fields.get("prompt"), "text" if isinstance(given, str) else "input_ids": given}
        tokens, mask, _ = self._tokens(inner, side)
        none = np.zeros(len(tokens), np.float32)
        return Sequence(tokens, mask, np.full(len(tokens), margin, np.float32), none, none)

    def _tokens(self, fields: dict[str, Any], name: str = "text or input_ids") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, which of them are scored, and the index of each step's last token."""
        if fields.get("input_ids") is not None:
            return self._given_ids(fields)
        steps: Any = fields.get("steps") if fields.get("steps") is not None else [fields.get("text")]
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
            raise Unusable(f"no {name}")
        before = fields.get("prompt")
        prompt = self._tokenizer.encode(before if isinstance(before, str) else "")
        pieces = [self._tokenizer.encode(step) for step in steps]
        tokens = np.concatenate([[self._marker], prompt, *pieces]).astype(np.int64)
        mask = np.arange(len(tokens)) > len(prompt)
        ends = len(prompt) + np.cumsum([len(piece) for piece in pieces])
        return tokens, mask, ends

    def _given_ids(self, fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = fields["input_ids"]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and 0 <= i < self._tokenizer.size for i in ids):
            raise Unusable(f"input_ids are no list of ids below {self._tokenizer.size}")
        mask = fields.get("mask")
        if mask is not None and (not isinstance(mask, list) or len(mask) != len(ids)):
            raise Unusable(f"mask has not one entry for each of {len(ids)} input_ids")
        scored = np.ones(len(ids), bool) if mask is None else np.array(mask).astype(bool)
        ends = fields.get("step_ends")
        ends = np.array(ends if isinstance(ends, list) else [], np.int64)
        if ((ends < 0) | (ends >= len(ids))).any():
            raise Unusable("step_ends outside input_ids")
        return np.array(ids, np.int64), scored, ends


def _step_labels(labels: Any, ends: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers at the ends of steps, and a mask of those alone."""
    if not isinstance(labels, list) or len(labels) != len(ends) or not len(ends):
        raise Unusable("step_labels have not one entry for each of the steps (or step_ends)")
    returns, at_end = np.zeros(len(mask), np.float32), np.zeros(len(mask), bool)
    for label, end in zip(labels, ends.tolist(), strict=True):
        if label is not None:
            returns[end], at_end[end] = _finite(label, "step_labels"), True
    return returns, mask & at_end


def _number(fields: dict[str, Any], name: str) -> float:
    if fields.get(name) is None:
        raise Unusable(f"no {name}")
    return _finite(fields[name], name)


def _finite(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise Unusable(f"{name} is no finite number")
    return float(value)


def _numbers(fields: dict[str, Any], name: str, mask: np.ndarray, *, everywhere: bool) -> np.ndarray:
    """float32, one a token: a list of the record's, or one number for every token (`everywhere`) or for the last one that is scored."""
    given = fields.get(name)
    if not isinstance(given, list):
        numbers = np.full(len(mask), _number(fields, name), np.float32)
        if not everywhere:
            numbers[np.arange(len(mask)) != (np.flatnonzero(mask)[-1] if mask.any() else -1)] = 0.0
        return numbers
    if len(given) != len(mask) or fields.get("input_ids") is None:
        raise Unusable(f"{name} has not one number for each of its input_ids")
    numbers = np.array([np.nan if x is None else x for x in given], np.float32)
    if not np.isfinite(numbers[mask]).all():
        raise Unusable(f"{name} has a number that is not finite")
    return np.where(np.isfinite(numbers), numbers, 0.0).astype(np.float32)
