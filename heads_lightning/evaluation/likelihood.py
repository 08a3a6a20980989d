"""What a trained model gives to certain tokens: nats and hits of rows of ids, the one forward pass that all scoring is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch, Examples
from heads_lightning.data.tokenizer import Tokenizer
from heads_lightning.evaluation.protocol import HiddenLine
from heads_lightning.experiment import TrainedModel

ROWS = 16
"""Sequences of one forward pass."""


class TokenScores(NamedTuple):
    """Of every position; 0 where there is no target."""

    nats_BS: np.ndarray
    """float64: negative log-likelihood of the target."""
    hits_BS: np.ndarray
    """bool: no other token is likelier. All false unless asked for."""


@torch.no_grad()
def score_examples(model: TrainedModel, examples: Examples, attention: Attention, *, hits: bool = False) -> TokenScores:
    """Likelihood of the labels of any examples."""
    batch = Batch.from_examples(examples, attention).to(next(model.backbone.parameters()).device)
    output = model.head(
        model.backbone(batch), labels=batch.labels_BS, loss_reduction="none", z_loss_multiplier=0.0, return_logits=False, token_metrics=hits
    )
    labels_BS = examples.labels_BS
    hits_BS = (output.correct.cpu().numpy() > 0) & (labels_BS != IGNORE) if hits else np.zeros(labels_BS.shape, bool)
    return TokenScores(output.ce_loss.double().cpu().numpy(), hits_BS)


def score_tokens(
    model: TrainedModel,
    tokens_BS: np.ndarray,
    labels_BS: np.ndarray,
    *,
    segments_BS: np.ndarray | None = None,
    attention: Attention = Attention.causal,
    hits: bool = False,
) -> TokenScores:
    """Likelihood of the labels, which are aligned as everywhere. Without segments every row is one."""
    if segments_BS is None:
        segments_BS = np.zeros(tokens_BS.shape, np.int32)
    arrays = (np.ascontiguousarray(tokens_BS), np.ascontiguousarray(labels_BS), np.ascontiguousarray(segments_BS))
    return score_examples(model, Examples(*arrays), attention, hits=hits)


def encode_around(tokenizer: Tokenizer, question: HiddenLine) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids of what stands before and after a hole, as they are inside a document."""
    prefix = (tokenizer.encode if question.begins_document else tokenizer.encode_inside)(question.prefix)
    return prefix, tokenizer.encode_inside(question.suffix)


class Row(NamedTuple):
    """A sequence and what is asked of it."""

    tokens: np.ndarray
    labels: np.ndarray
    """Aligned; IGNORE where nothing is asked."""


def score_rows(
    model: TrainedModel, rows: Sequence[Row], *, attention: Attention = Attention.causal, hits: bool = False
) -> list[TokenScores]:
    """Scores of rows of any lengths, each its own length: padded on the right, ROWS at a time."""
    scores: list[TokenScores] = []
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        shape = len(some), max(len(row.tokens) for row in some)
        tokens, labels = np.full(shape, model.tokenizer.vocabulary.padding, np.int64), np.full(shape, IGNORE, np.int64)
        segments = np.full(shape, PADDING, np.int32)
        for r, row in enumerate(some):
            length = len(row.tokens)
            tokens[r, :length], labels[r, :length], segments[r, :length] = row.tokens, row.labels, 0
        found = score_tokens(model, tokens, labels, segments_BS=segments, attention=attention, hits=hits)
        scores += [TokenScores(found.nats_BS[r, : len(row.tokens)], found.hits_BS[r, : len(row.tokens)]) for r, row in enumerate(some)]
    return scores


def next_token_row(prompt: np.ndarray, target: np.ndarray) -> Row:
    """The ids of `target` after a prompt, each predicted from what stands before it."""
    whole = np.concatenate([prompt, target]).astype(np.int64)
    labels = np.full(len(whole) - 1, IGNORE, np.int64)
    labels[len(prompt) - 1 :] = target
    return Row(whole[:-1], labels)
