"""Asking an encoder-decoder trained on span corruption for what stands between two texts: a sentinel marks the hole, the decoder fills it.

encoder   prefix <0> suffix EOD          decoder   start <0> …what is hidden…   until the next sentinel or EOD
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from heads_lightning.batch import IGNORE, PADDING, Attention, Batch, Examples
from heads_lightning.configs.objective import ObjectiveConfig, PrefixLMConfig, SpanCorruptionConfig, UL2Config
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.evaluation import HiddenLine, bits_per_byte, clip_context
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import generate
from heads_lightning.objectives.ul2 import mode_tokens
from heads_lightning.registry import ConfigError

ROWS = 16
"""Questions of one forward pass."""
MARKERS = 2
"""Positions of the encoder that are no text: the sentinel, and the end-of-document token."""


def fills_spans(objective: ObjectiveConfig) -> bool:
    """True for what teaches an encoder-decoder to fill sentinels."""
    trained = isinstance(objective, SpanCorruptionConfig) or (
        isinstance(objective, UL2Config) and objective.r_weight + objective.x_weight > 0
    )
    return trained and objective.attention == Attention.encoder_decoder


def continues_text(objective: ObjectiveConfig) -> bool:
    """True for what teaches an encoder-decoder to go on from a text that its encoder has read."""
    return isinstance(objective, PrefixLMConfig) and objective.attention == Attention.encoder_decoder


def source(model: TrainedModel, question: HiddenLine, *, with_suffix: bool, room: int | None = None) -> np.ndarray:
    """int64 ids that the encoder reads; at most `room` of them are text (as many as training sequences hold, when left out)."""
    vocabulary, encode = model.tokenizer.vocabulary, model.tokenizer.encode
    prefix, suffix = np.asarray(encode(question.prefix)), np.asarray(encode(question.suffix if with_suffix else ""))
    opening = _mode(model)
    if question.begins_document and not opening:  # a mode token stands in the marker's place
        prefix = np.concatenate([[vocabulary.end_of_document], prefix])
    room = (model.config.data.sequence_length - MARKERS if room is None else room) - len(opening)
    prefix, suffix = clip_context(prefix, suffix, room=room)
    end = [vocabulary.end_of_document] if getattr(model.config.objective, "encoder_end", True) else []
    return np.concatenate([opening, prefix, vocabulary.sentinels[:1], suffix, end]).astype(np.int64)


def _mode(model: TrainedModel) -> list[int]:
    """The mode token of a hole in a text: UL2's regular denoising (of extreme denoising, where that was not trained)."""
    objective = model.config.objective
    if not isinstance(objective, UL2Config):
        return []
    modes = mode_tokens(objective, model.tokenizer.vocabulary)
    return [modes["r" if objective.r_weight > 0 else "x"]] if modes else []


def line_bits_per_byte(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool) -> float:
    """Bits per byte of the hidden lines, given prefix and suffix or the prefix alone."""
    rows = [(source(model, q, with_suffix=with_suffix), np.asarray(model.tokenizer.encode(q.line), np.int64)) for q in questions]
    nats = sum(_nats(model, rows[i : i + ROWS]) for i in range(0, len(rows), ROWS))
    return bits_per_byte(nats, sum(len(q.line.encode()) for q in questions))


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
    vocabulary = model.tokenizer.vocabulary
    return generate(
        model.backbone,
        model.head,
        sources,
        decoder_prompts=[[vocabulary.padding, vocabulary.sentinels[0]]] * len(sources),
        attention=Attention.encoder_decoder,
        max_new_tokens=max_new_tokens,
        stop_ids=[vocabulary.end_of_document, *vocabulary.sentinels],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    )


@torch.no_grad()
def _nats(model: TrainedModel, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nats of the rows' targets given their sources; what ends a target is not counted."""
    vocabulary = model.tokenizer.vocabulary
    start = np.array([vocabulary.padding, vocabulary.sentinels[0]], np.int64)
    read = [np.concatenate([start, target[:-1]]) for _, target in rows]
    labels = [np.concatenate([[IGNORE], target]) for _, target in rows]
    sources = [source for source, _ in rows]
    examples = Examples(
        tokens_BS=_padded(read, vocabulary.padding),
        labels_BS=_padded(labels, IGNORE),
        segments_BS=_padded([np.zeros_like(row) for row in read], PADDING),
        encoder_tokens_BT=_padded(sources, vocabulary.padding),
        encoder_segments_BT=_padded([np.zeros_like(row) for row in sources], PADDING),
    )
    batch = Batch.from_examples(examples, Attention.encoder_decoder).to(next(model.backbone.parameters()).device)
    output = model.head(model.backbone(batch), labels=batch.labels_BS, loss_reduction="none", z_loss_multiplier=0.0, return_logits=False)
    return float(output.ce_loss.double().sum())


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """int64 [B, longest]."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, np.int64)
    for r, row in enumerate(rows):
        out[r, : len(row)] = row
    return out
