"""Asking a model trained on span corruption for what stands between two texts: a sentinel marks the hole, and the model says what it hides.

encoder-decoder   the encoder reads  prefix <0> suffix EOD        the decoder writes  start <0> …what is hidden…
decoder-only      a prefix seen from both sides, prefix <0> suffix, and after it      <0> …what is hidden…

either until the next sentinel or EOD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import ObjectiveConfig, PrefixLMConfig, SpanCorruptionConfig, UL2Config
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation.abilities import modes_of, parts_of
from heads_lightning.evaluation.likelihood import TokenScores, encode_around, score_examples
from heads_lightning.evaluation.protocol import HiddenLine, bits_per_byte, clip_context
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import generate
from heads_lightning.objectives.ul2 import mode_tokens
from heads_lightning.registry import ConfigError

ROWS = 16
"""Questions of one forward pass."""
MARKERS = 2
"""Positions that are no text: two sentinels, or a sentinel and the end-of-document token of an encoder's input."""


def fills_spans(objective: ObjectiveConfig) -> bool:
    """True for what teaches a model to fill sentinels."""
    return _filler(objective) is not None


def _filler(objective: ObjectiveConfig) -> str | None:
    """Name of the part that fills sentinels."""
    for name, part in parts_of(objective).items():
        denoises = isinstance(part, UL2Config) and part is objective and part.r_weight + part.x_weight > 0
        if denoises or isinstance(part, SpanCorruptionConfig):
            return name
    return None


def continues_text(objective: ObjectiveConfig) -> bool:
    """True for what teaches an encoder-decoder to go on from a text that its encoder has read."""
    return isinstance(objective, PrefixLMConfig) and objective.attention == Attention.encoder_decoder


def source(model: TrainedModel, question: HiddenLine, *, with_suffix: bool, room: int | None = None) -> np.ndarray:
    """int64 ids that are read from both sides; at most `room` of them are text (as many as training sequences hold, when left out)."""
    vocabulary = model.tokenizer.vocabulary
    prefix, suffix = encode_around(model.tokenizer, question if with_suffix else question._replace(suffix=""))
    opening, encodes = _mode(model), model.config.objective.attention == Attention.encoder_decoder
    if question.begins_document and not opening:  # a mode token stands in the marker's place
        prefix = np.concatenate([[vocabulary.end_of_document], prefix])
    if room is None:
        longest = 0 if encodes else min(model.config.evaluation.max_new_tokens, model.config.data.sequence_length // 2)
        room = model.config.data.sequence_length - MARKERS - longest
    prefix, suffix = clip_context(prefix, suffix, room=room - len(opening))
    end = [vocabulary.end_of_document] if encodes and getattr(model.config.objective, "encoder_end", True) else []
    return np.concatenate([opening, prefix, vocabulary.sentinels[:1], suffix, end]).astype(np.int64)


def _mode(model: TrainedModel) -> list[int]:
    """The mode token of a hole in a text: UL2's regular denoising (of extreme denoising, where that was not trained), or the part's."""
    objective = model.config.objective
    if isinstance(objective, UL2Config):
        modes = mode_tokens(objective, model.tokenizer.vocabulary)
        return [modes["r" if objective.r_weight > 0 else "x"]] if modes else []
    mode = modes_of(model).get(_filler(objective) or "")
    return [] if mode is None else [mode]


class _Asked(NamedTuple):
    """A question, what was written of the answer, and what is asked of every position from the sentinel on."""

    source: np.ndarray
    written: np.ndarray
    labels: np.ndarray
    """One more than `written`."""


def line_bits_per_byte(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool) -> float:
    """Bits per byte of the hidden lines, given prefix and suffix or the prefix alone; what ends a line is not counted."""
    rows = []
    for question in questions:
        line = model.tokenizer.encode_inside(question.line)
        rows.append(_Asked(source(model, question, with_suffix=with_suffix), line[:-1], line))
    nats = sum(float(scores.nats_BS.sum()) for scores in _score(model, rows))
    return bits_per_byte(nats, sum(len(q.line.encode()) for q in questions))


def stop_accuracy(model: TrainedModel, questions: Sequence[HiddenLine]) -> float:
    """Share of lines whose end the model knows: fed the true line, EOD is the likeliest token after it and nowhere before."""
    rows = []
    for question in questions:
        line = model.tokenizer.encode_inside(question.line)
        labels = np.full(len(line) + 1, model.tokenizer.vocabulary.end_of_document, np.int64)
        rows.append(_Asked(source(model, question, with_suffix=True), line, labels))
    right = 0
    for row, scores in zip(rows, _score(model, rows, hits=True), strict=True):
        hits = scores.hits_BS[-len(row.labels) :]
        right += bool(hits[-1]) and hits.sum() == 1
    return right / max(len(rows), 1)


def fill(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool = True, max_new_tokens: int) -> list[list[int]]:
    """Greedy answers as ids; one shorter than max_new_tokens ended by itself."""
    answers: list[list[int]] = []
    for i in range(0, len(questions), ROWS):
        sources = [source(model, q, with_suffix=with_suffix).tolist() for q in questions[i : i + ROWS]]
        answers += _generate(model, sources, max_new_tokens=max_new_tokens)
    return answers


def infill(model: TrainedModel, prefix: str, suffix: str, request: InfillRequest) -> str:
    """What the model puts between two texts.

    Raises:
        ConfigError: a layout is asked for, which a sentinel does not have.
    """
    if request.layout is not None:
        raise ConfigError(f"layout={request.layout} is of fill-in-the-middle; {request.checkpoint} fills sentinels: leave layout out")
    question = HiddenLine(prefix, "", suffix, "", "", begins_document=True)
    answers = _generate(
        model,
        [source(model, question, with_suffix=True).tolist()],
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        generator=torch.Generator(device=request.device).manual_seed(request.seed),
    )
    return model.tokenizer.decode(answers[0])


def _generate(
    model: TrainedModel,
    sources: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    vocabulary, attention = model.tokenizer.vocabulary, model.config.objective.attention
    return generate(
        model.backbone,
        model.head,
        sources,
        decoder_prompts=[_opening(model)] * len(sources),
        attention=attention,
        max_new_tokens=max_new_tokens,
        stop_ids=[vocabulary.end_of_document, *vocabulary.sentinels],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )


def _opening(model: TrainedModel) -> list[int]:
    """What is written before an answer begins."""
    vocabulary = model.tokenizer.vocabulary
    start = [vocabulary.padding] if model.config.objective.attention == Attention.encoder_decoder else []
    return [*start, vocabulary.sentinels[0]]


def _score(model: TrainedModel, rows: Sequence[_Asked], *, hits: bool = False) -> list[TokenScores]:
    """Scores of every question; the last positions of each are those of its labels."""
    encodes = model.config.objective.attention == Attention.encoder_decoder
    scores: list[TokenScores] = []
    for first in range(0, len(rows), ROWS):
        some = rows[first : first + ROWS]
        examples = (_encoder_decoder if encodes else _decoder_only)(model, some)
        found = score_examples(model, examples, model.config.objective.attention, hits=hits)
        ends = (examples.segments_BS != PADDING).sum(axis=1).tolist()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        scores += [TokenScores(found.nats_BS[r, :end], found.hits_BS[r, :end]) for r, end in enumerate(ends)]
    return scores


def _encoder_decoder(model: TrainedModel, rows: Sequence[_Asked]) -> Examples:
    padding, opening = model.tokenizer.vocabulary.padding, _opening(model)
    read = [np.concatenate([opening, row.written]) for row in rows]
    return Examples(
        tokens_BS=_padded(read, padding),
        labels_BS=_padded([np.concatenate([[IGNORE] * (len(opening) - 1), row.labels]) for row in rows], IGNORE),
        segments_BS=_padded([np.zeros(len(r)) for r in read], PADDING).astype(np.int32),
        encoder_tokens_BT=_padded([row.source for row in rows], padding),
        encoder_segments_BT=_padded([np.zeros(len(row.source)) for row in rows], PADDING).astype(np.int32),
    )


def _decoder_only(model: TrainedModel, rows: Sequence[_Asked]) -> Examples:
    read = [np.concatenate([row.source, _opening(model), row.written]) for row in rows]
    tokens_BS = _padded(read, model.tokenizer.vocabulary.padding)
    return Examples(
        tokens_BS,
        labels_BS=_padded([np.concatenate([np.full(len(row.source), IGNORE), row.labels]) for row in rows], IGNORE),
        segments_BS=_padded([np.zeros(len(r)) for r in read], PADDING).astype(np.int32),
        prefix_BS=np.arange(tokens_BS.shape[1]) < np.array([len(row.source) for row in rows])[:, None],
    )


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """int64 [B, longest]."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for r, row in enumerate(rows):
        out[r, : len(row)] = row
    return out
