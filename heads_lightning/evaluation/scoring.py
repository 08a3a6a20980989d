"""Asking a trained model the questions of `evaluation`: what it can answer depends on what it was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from heads_lightning.batch import IGNORE
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.prepare import PreparedData
from heads_lightning.data.scored import PreparedRecords
from heads_lightning.evaluation import masked, span_filling
from heads_lightning.evaluation.abilities import can_infill, can_read_left_to_right, check_length, infilling, opening
from heads_lightning.evaluation.likelihood import ROWS, Row, encode_around, next_token_row, score_rows, score_tokens
from heads_lightning.evaluation.protocol import (
    HiddenLine,
    Report,
    bits_per_byte,
    clip_context,
    edit_similarity,
    floors,
    held_out_windows,
    hidden_lines,
    ngram_bits_per_byte,
    protocol,
    random_spans,
)
from heads_lightning.evaluation.span_filling import fills_spans
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import generate
from heads_lightning.objectives.base import document_segments
from heads_lightning.objectives.fim_layout import fim_prompt
from heads_lightning.registry import ConfigError


class Sample(NamedTuple):
    """An infilled line to look at."""

    prefix: str
    infill: str
    truth: str
    suffix: str


class Outcome(NamedTuple):
    """Numbers, and a few infills to look at."""

    report: Report
    samples: list[Sample]

    def samples_text(self) -> str:
        """The samples, readable."""
        return "\n".join(show_sample(sample) for sample in self.samples)


def show_sample(sample: Sample) -> str:
    """One infill with the lines around it."""
    before = "\n".join(sample.prefix.split("\n")[-3:])
    after = "\n".join(sample.suffix.lstrip("\n").split("\n")[:2])
    return f"{_indent(before)}\n  model ▸ {_one_line(sample.infill)}\n  truth ▸ {_one_line(sample.truth)}\n{_indent(after)}\n"


def _one_line(text: str) -> str:
    """A text in one line of the summary: line breaks shown, the end cut."""
    shown = text.strip().replace("\n", "⏎") or "(nothing)"
    return shown if len(shown) <= 100 else shown[:99] + "…"


def _indent(text: str) -> str:
    return "\n".join("    │ " + line[:100] for line in text.split("\n"))


@torch.no_grad()
def value_metrics(model: TrainedModel, prepared: PreparedData | PreparedRecords) -> dict[str, float]:
    """What validation says of a model with objective=value, on the same held-out sequences."""
    config, device = model.config, next(model.head.parameters()).device
    held_out = TokenDataModule(
        prepared,
        config.objective.build(model.tokenizer.vocabulary),
        sequence_length=config.data.sequence_length,
        global_batch_size=config.trainer.global_batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
        total_steps=1,
        validation_sequences=config.data.validation_sequences,
    ).val_dataloader()
    found = [model.head.loss(model.backbone(batch.to(device)), batch.to(device), divisor=None).statistics for batch in held_out]
    total = torch.stack([statistics for statistics in found if statistics is not None]).sum(0)
    return {f"val/{name}": value for name, value in model.head.metrics(total.tolist()).items()}


def evaluate(model: TrainedModel, prepared: PreparedData | PreparedRecords) -> Outcome:
    """The whole protocol, as far as the model goes."""
    config = model.config.evaluation
    report = Report()
    if isinstance(prepared, PreparedRecords):
        return Outcome(report, [])
    report.protocol = protocol(prepared.manifest.content_hash, model.config.data.validation_fraction, config)
    if fills_spans(model.config.objective) and not can_read_left_to_right(model):
        report.left_to_right_refusal = f"objective={model.config.objective.name} has none: it writes what sentinels hide, not running text"
    if isinstance(model.config.data, RepeatConfig):
        _copy_accuracy(model, prepared, report)
        return Outcome(report, [])
    held_out, training = list(prepared.texts("validation")), list(prepared.texts("train"))
    stream = np.concatenate([shard.tokens for shard in prepared.validation.shards])
    report.ngram_bits_per_byte = ngram_bits_per_byte("\n".join(training).encode(), "\n".join(held_out).encode())
    if can_read_left_to_right(model):
        report.left_to_right_bits_per_byte = left_to_right(model, stream, config.text_tokens)
    if masked.can_fill_masks(model):
        report.masked_bits_per_byte = masked.masked_bits_per_byte(model, stream, config.text_tokens)
    if masked.is_diffusion(model):
        report.bound_bits_per_byte = masked.bound_bits_per_byte(model, stream, config.text_tokens)
    lines, spans = hidden_lines(held_out, config), random_spans(held_out, config)
    _score_spans(model, spans, report)
    return Outcome(report, _score_lines(model, training, lines, report) if lines else [])


def _score_lines(model: TrainedModel, training: list[str], questions: list[HiddenLine], report: Report) -> list[Sample]:
    """Hidden lines: bits per byte, and greedy infills beside their floors."""
    report.hidden_lines = len(questions)
    report.floors = floors(training, questions)
    report.prefix_bits_per_byte = _bits_of(model, questions, with_suffix=False)
    report.infill_bits_per_byte = _bits_of(model, questions, with_suffix=True)
    if not answers_holes(model):
        return []
    report.stop_accuracy = stop_accuracy(model, questions)
    answers, stopped = infill_lines(model, questions)
    return _answered(model, report, questions, answers, stopped)


def answers_holes(model: TrainedModel) -> bool:
    """True for models that write what is missing between two texts, and end it."""
    return can_infill(model) or fills_spans(model.config.objective)


def _answered(model: TrainedModel, report: Report, questions: Sequence[HiddenLine], answers: Sequence[str], stopped: float) -> list[Sample]:
    """How right the infills are; returns a few of them to look at."""
    config = model.config.evaluation
    pairs = [(a.strip(), q.line.strip()) for a, q in zip(answers, questions, strict=True)]
    report.infill_exact_match = sum(a == b for a, b in pairs) / len(pairs)
    report.infill_edit_similarity = sum(edit_similarity(a, b) for a, b in pairs) / len(pairs)
    report.infill_stopped = stopped
    chosen = [int((k + 0.5) * len(questions) / config.samples) for k in range(min(config.samples, len(questions)))]
    return [Sample(questions[i].prefix, answers[i], questions[i].line, questions[i].suffix) for i in chosen]


def _score_spans(model: TrainedModel, questions: list[HiddenLine], report: Report) -> None:
    """Random stretches: the same, without floors."""
    if not questions:
        return
    report.random_spans = len(questions)
    report.random_span_prefix_bits_per_byte = _bits_of(model, questions, with_suffix=False)
    report.random_span_bits_per_byte = _bits_of(model, questions, with_suffix=True)
    if answers_holes(model):
        answers, _ = infill_lines(model, questions)
        report.random_span_exact_match = sum(a == q.line for a, q in zip(answers, questions, strict=True)) / len(questions)


def _bits_of(model: TrainedModel, questions: list[HiddenLine], *, with_suffix: bool) -> float | None:
    """Bits per byte of what is hidden; None where the model cannot be asked."""
    if masked.is_diffusion(model):
        return masked.bound_of_lines(model, questions, with_suffix=with_suffix)
    if can_infill(model) if with_suffix else can_read_left_to_right(model):
        return line_bits_per_byte(model, questions, with_suffix=with_suffix)
    if fills_spans(model.config.objective):
        return span_filling.line_bits_per_byte(model, questions, with_suffix=with_suffix)
    return None


# -- left to right ------------------------------------------------------------------------------------------------------


def left_to_right(model: TrainedModel, stream: np.ndarray, max_tokens: int) -> float:
    """Bits per byte of held-out text in windows as long as training sequences, spread evenly; each window starts without context."""
    vocabulary = model.tokenizer.vocabulary
    token_bytes = np.array([len(b) for b in vocabulary.token_bytes])
    nats, num_bytes = 0.0, 0
    for _, tokens in held_out_windows(stream, model.config.data.sequence_length, max_tokens):
        read = np.where(tokens == vocabulary.end_of_document, opening(model), tokens)[:, :-1]
        segments = document_segments(tokens[:, :-1], vocabulary.end_of_document)
        nats += score_tokens(model, read, tokens[:, 1:], segments_BS=segments).nats_BS.sum()
        num_bytes += int(token_bytes[tokens[:, 1:]].sum())
    return bits_per_byte(nats, num_bytes)


# -- hidden lines -------------------------------------------------------------------------------------------------------


def _prompt(
    model: TrainedModel, question: HiddenLine, *, with_suffix: bool, layout: str | None = None, room: int | None = None
) -> np.ndarray:
    """Token ids before the hidden line, in the layout of training; at most `room` of them are text."""
    config = model.config
    if room is None:
        # as much context as leaves the answer inside the length that training saw
        longest = min(config.evaluation.max_new_tokens, config.data.sequence_length // 2)
        room = config.data.sequence_length - longest - 6
    prefix, suffix = encode_around(model.tokenizer, question)
    if not with_suffix:
        suffix = suffix[:0]
    prefix_kept, suffix_kept = clip_context(prefix, suffix, room=room)
    begins = question.begins_document and len(prefix_kept) == len(prefix)
    vocabulary, asked = model.tokenizer.vocabulary, infilling(model)
    if not with_suffix:
        first = opening(model)
        opens = begins or first != vocabulary.end_of_document or not len(prefix_kept)  # a mode token opens every piece
        return np.concatenate([[first] if opens else [], prefix_kept]).astype(np.int64)
    assert asked is not None
    return fim_prompt(
        prefix_kept,
        suffix_kept,
        vocabulary,
        layout=layout or asked.layout,
        spm_variant=asked.layouts.spm,
        document_start=begins,
        mode=asked.mode,
    )


def line_bits_per_byte(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool) -> float:
    """Bits per byte of the hidden lines, given prefix and suffix or the prefix alone."""
    rows = [_asked_row(model, q, with_suffix=with_suffix) for q in questions]
    nats = sum(float(scores.nats_BS.sum()) for scores in score_rows(model, rows))
    return bits_per_byte(nats, sum(len(q.line.encode()) for q in questions))


def _asked_row(model: TrainedModel, question: HiddenLine, *, with_suffix: bool) -> Row:
    return next_token_row(_prompt(model, question, with_suffix=with_suffix), model.tokenizer.encode_inside(question.line))


def stop_accuracy(model: TrainedModel, questions: Sequence[HiddenLine]) -> float:
    """Share of lines whose end the model knows: fed the true line, END is the likeliest token after it and nowhere before."""
    if not can_infill(model):
        return span_filling.stop_accuracy(model, questions)
    end = model.tokenizer.vocabulary.fim_end
    assert end is not None
    rows = []
    for question in questions:
        prompt, line = _prompt(model, question, with_suffix=True), model.tokenizer.encode_inside(question.line)
        tokens = np.concatenate([prompt, line]).astype(np.int64)
        labels = np.full(len(tokens), IGNORE, np.int64)
        labels[len(prompt) - 1 :] = end
        rows.append(Row(tokens, labels))
    scored = score_rows(model, rows, hits=True)
    return sum(bool(s.hits_BS[-1]) and s.hits_BS.sum() == 1 for s in scored) / max(len(rows), 1)


def infill_lines(model: TrainedModel, questions: Sequence[HiddenLine]) -> tuple[list[str], float]:
    """Greedy infills and the share of them that ended by themselves."""
    longest, end = model.config.evaluation.max_new_tokens, model.tokenizer.vocabulary.fim_end
    if can_infill(model):
        assert end is not None
        prompts = [_prompt(model, q, with_suffix=True) for q in questions]
        outputs = _generate(model, prompts, max_new_tokens=longest, stop_ids=[end])
    else:
        outputs = span_filling.fill(model, questions, max_new_tokens=longest)
    stopped = sum(len(o) < longest for o in outputs) / max(len(outputs), 1)
    return [model.tokenizer.decode(o) for o in outputs], stopped


def infill_texts(model: TrainedModel, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Greedy infills between texts of any kind (prefix, suffix)."""
    if not answers_holes(model):
        raise ConfigError(f"objective={model.config.objective.name} did not train infilling; objective=fim does")
    return infill_lines(model, [HiddenLine(prefix, "", suffix, "", "", begins_document=True) for prefix, suffix in pairs])[0]


def _generate(model: TrainedModel, prompts: Sequence[np.ndarray], *, max_new_tokens: int, stop_ids: list[int]) -> list[list[int]]:
    outputs: list[list[int]] = []
    for i in range(0, len(prompts), ROWS):
        outputs += generate(
            model.backbone,
            model.head,
            [p.tolist() for p in prompts[i : i + ROWS]],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        )
    return outputs


def infill(model: TrainedModel, prefix: str, suffix: str, request: InfillRequest) -> str:
    """What the model puts between two texts.

    Raises:
        ConfigError: the model was not trained to infill, or not with the layout asked for, or the answer is longer than its sequences.
    """
    check_length(model, request.max_new_tokens)
    if fills_spans(model.config.objective) and not can_infill(model):
        return span_filling.infill(model, prefix, suffix, request)
    if masked.is_diffusion(model):
        return masked.fill(
            model,
            prefix,
            suffix,
            new_tokens=request.max_new_tokens,
            steps=request.steps,
            temperature=request.temperature,
            seed=request.seed,
        )
    asked = infilling(model)
    if asked is None:
        raise ConfigError(
            f"{request.checkpoint} was trained with objective={model.config.objective.name} and cannot infill; train one with objective=fim"
        )
    layout, trained = request.layout or asked.layout, asked.layouts.trained
    if layout not in trained:
        raise ConfigError(f"layout={layout} was not trained; {request.checkpoint} knows layout={' and layout='.join(trained)}")
    question = HiddenLine(prefix, "", suffix, "", "", begins_document=True)
    room = model.config.data.sequence_length - min(request.max_new_tokens, model.config.data.sequence_length // 2) - 6
    prompt = _prompt(model, question, with_suffix=True, layout=layout, room=room)
    end = model.tokenizer.vocabulary.fim_end
    assert end is not None
    generator = torch.Generator(device=request.device).manual_seed(request.seed)
    out = generate(
        model.backbone,
        model.head,
        [prompt.tolist()],
        max_new_tokens=request.max_new_tokens,
        stop_ids=[end],
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        generator=generator,
    )[0]
    return model.tokenizer.decode(out)


# -- the synthetic proof ------------------------------------------------------------------------------------------------


COPIES = 200
"""Documents of data=repeat that are asked about."""


def _copy_accuracy(model: TrainedModel, prepared: PreparedData, report: Report, *, count: int = COPIES) -> None:
    """data=repeat: hide the second line; it stands again in the suffix and nowhere in the prefix."""
    questions = [_copy_question(text) for text in islice(prepared.texts("validation"), count)]
    asked = infilling(model)
    if asked is None and fills_spans(model.config.objective):
        outputs = [
            span_filling.fill(model, questions, with_suffix=shown, max_new_tokens=_longest(model, questions)) for shown in (False, True)
        ]
        report.hidden_lines = len(questions)
        report.copy_accuracy_prefix, report.copy_accuracy_infill = (_share_right(model, questions, output) for output in outputs)
        return
    if not can_read_left_to_right(model):
        return
    report.hidden_lines = len(questions)
    report.copy_accuracy_prefix = _accuracy(model, questions, with_suffix=False, layout=None)
    if asked is not None:
        accuracies = (_accuracy(model, questions, with_suffix=True, layout=name) for name in asked.layouts.trained)
        report.copy_accuracy_infill = min(accuracies)


def _copy_question(text: str) -> HiddenLine:
    before, repeated, after = text.splitlines(keepends=True)
    return HiddenLine(before, repeated, after, "", "", begins_document=True)


def _accuracy(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool, layout: str | None) -> float:
    """Share of hidden tokens that greedy decoding gets right."""
    prompts = [_prompt(model, q, with_suffix=with_suffix, layout=layout) for q in questions]
    stop = [i for i in (model.tokenizer.vocabulary.fim_end,) if i is not None]
    return _share_right(model, questions, _generate(model, prompts, max_new_tokens=_longest(model, questions), stop_ids=stop))


def _truths(model: TrainedModel, questions: Sequence[HiddenLine]) -> list[list[int]]:
    """Ids of the hidden lines; that a line ends is no news."""
    return [list(model.tokenizer.encode_inside(q.line.strip())) for q in questions]


def _longest(model: TrainedModel, questions: Sequence[HiddenLine]) -> int:
    return max(len(truth) for truth in _truths(model, questions))


def _share_right(model: TrainedModel, questions: Sequence[HiddenLine], outputs: Sequence[Sequence[int]]) -> float:
    truths = _truths(model, questions)
    right = sum(a == b for out, truth in zip(outputs, truths, strict=True) for a, b in zip(out, truth, strict=False))
    return right / sum(len(t) for t in truths)
