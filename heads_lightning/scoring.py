"""Asking a trained model the questions of `evaluation`: what it can answer depends on what it was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from heads_lightning import masked
from heads_lightning.batch import IGNORE, Attention
from heads_lightning.configs.data import RepeatConfig
from heads_lightning.configs.objective import (
    CausalConfig,
    FIMConfig,
    FIMLayouts,
    MixtureConfig,
    MultiTokenConfig,
    ObjectiveConfig,
    PrefixLMConfig,
    UL2Config,
)
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.data.prepare import PreparedData
from heads_lightning.evaluation import (
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
from heads_lightning.experiment import TrainedModel
from heads_lightning.generation import generate
from heads_lightning.likelihood import ROWS, Row, next_token_row, score_rows, score_tokens
from heads_lightning.objectives.base import document_segments
from heads_lightning.objectives.fim import fim_prompt
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


def can_read_left_to_right(model: TrainedModel) -> bool:
    """True for models that predict the next token of plain text (a prefix of length 0 is causal)."""
    objective = model.config.objective
    plain = (CausalConfig, FIMConfig, MultiTokenConfig, PrefixLMConfig, UL2Config)
    if objective.predicts != "token" or objective.attention not in (Attention.causal, Attention.prefix):
        return False
    return objective.attention == Attention.causal or any(isinstance(part, plain) for part in parts_of(objective).values())


class Infilling(NamedTuple):
    """How a model was taught to infill."""

    layouts: FIMLayouts
    mode: int | None
    """Mode token that opens its pieces."""

    @property
    def layout(self) -> str:
        """The layout to ask with: psm unless it was never shown."""
        return self.layouts.trained[0]


def parts_of(objective: ObjectiveConfig) -> dict[str, ObjectiveConfig]:
    """The objectives of a mixture by part; one that is none, by its name."""
    return objective.part_configs() if isinstance(objective, MixtureConfig) else {objective.name: objective}


def infilling(model: TrainedModel) -> Infilling | None:
    """How to ask for an infill; None for models whose infilling tokens were not trained."""
    vocabulary, objective = model.tokenizer.vocabulary, model.config.objective
    for name, part in parts_of(objective).items():
        if isinstance(part, FIMConfig) and part.rate > 0:
            return Infilling(part.layouts(vocabulary.fim_format), _modes(model).get(name))
    return None


def _modes(model: TrainedModel) -> dict[str, int]:
    """Mode tokens by part."""
    objective = model.config.objective
    return objective.mode_tokens(model.tokenizer.vocabulary.sentinels)[0] if isinstance(objective, MixtureConfig) else {}


def opening(model: TrainedModel) -> int:
    """The token that opens a document read left to right: the end-of-document marker, or the mode token that training put in its place."""
    modes = _modes(model)
    readers = [name for name, part in parts_of(model.config.objective).items() if not isinstance(part, FIMConfig) or part.rate < 1]
    plain = [name for name in readers if isinstance(parts_of(model.config.objective)[name], CausalConfig)]
    return next((modes[name] for name in [*plain, *readers] if name in modes), model.tokenizer.vocabulary.end_of_document)


def can_infill(model: TrainedModel) -> bool:
    """True for models whose infilling tokens were trained."""
    return infilling(model) is not None


def evaluate(model: TrainedModel, prepared: PreparedData) -> Outcome:
    """The whole protocol, as far as the model goes."""
    config = model.config.evaluation
    report = Report(protocol=protocol(prepared.manifest.content_hash, model.config.data.validation_fraction, config))
    if isinstance(model.config.data, RepeatConfig):
        if can_read_left_to_right(model):
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
    if not can_infill(model):
        return []
    report.stop_accuracy = stop_accuracy(model, questions)
    answers, report.infill_stopped = infill_lines(model, questions)
    pairs = [(a.strip(), q.line.strip()) for a, q in zip(answers, questions, strict=True)]
    report.infill_exact_match = sum(a == b for a, b in pairs) / len(pairs)
    report.infill_edit_similarity = sum(edit_similarity(a, b) for a, b in pairs) / len(pairs)
    count = model.config.evaluation.samples
    chosen = [int((k + 0.5) * len(questions) / count) for k in range(min(count, len(questions)))]
    return [Sample(questions[i].prefix, answers[i], questions[i].line, questions[i].suffix) for i in chosen]


def _score_spans(model: TrainedModel, questions: list[HiddenLine], report: Report) -> None:
    """Random stretches: the same, without floors."""
    if not questions:
        return
    report.random_spans = len(questions)
    report.random_span_prefix_bits_per_byte = _bits_of(model, questions, with_suffix=False)
    report.random_span_bits_per_byte = _bits_of(model, questions, with_suffix=True)
    if can_infill(model):
        answers, _ = infill_lines(model, questions)
        report.random_span_exact_match = sum(a == q.line for a, q in zip(answers, questions, strict=True)) / len(questions)


def _bits_of(model: TrainedModel, questions: list[HiddenLine], *, with_suffix: bool) -> float | None:
    """Bits per byte of what is hidden; None where the model cannot be asked."""
    if masked.is_diffusion(model):
        return masked.bound_of_lines(model, questions, with_suffix=with_suffix)
    if can_infill(model) if with_suffix else can_read_left_to_right(model):
        return line_bits_per_byte(model, questions, with_suffix=with_suffix)
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
    encode, config = model.tokenizer.encode, model.config
    if room is None:
        # as much context as leaves the answer inside the length that training saw
        longest = min(config.evaluation.max_new_tokens, config.data.sequence_length // 2)
        room = config.data.sequence_length - longest - 6
    prefix, suffix = np.asarray(encode(question.prefix)), np.asarray(encode(question.suffix))
    if not with_suffix:
        suffix = suffix[:0]
    prefix_kept, suffix_kept = clip_context(prefix, suffix, room=room)
    begins = question.begins_document and len(prefix_kept) == len(prefix)
    vocabulary = model.tokenizer.vocabulary
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
    return next_token_row(_prompt(model, question, with_suffix=with_suffix), model.tokenizer.encode(question.line))


def stop_accuracy(model: TrainedModel, questions: Sequence[HiddenLine]) -> float:
    """Share of lines whose end the model knows: fed the true line, END is the likeliest token after it and nowhere before."""
    end = model.tokenizer.vocabulary.fim_end
    assert end is not None
    rows = []
    for question in questions:
        prompt, line = _prompt(model, question, with_suffix=True), model.tokenizer.encode(question.line)
        tokens = np.concatenate([prompt, line]).astype(np.int64)
        labels = np.full(len(tokens), IGNORE, np.int64)
        labels[len(prompt) - 1 :] = end
        rows.append(Row(tokens, labels))
    scored = score_rows(model, rows, hits=True)
    return sum(bool(s.hits_BS[-1]) and s.hits_BS.sum() == 1 for s in scored) / max(len(rows), 1)


def infill_lines(model: TrainedModel, questions: Sequence[HiddenLine]) -> tuple[list[str], float]:
    """Greedy infills and the share of them that ended by themselves."""
    prompts = [_prompt(model, q, with_suffix=True) for q in questions]
    end = model.tokenizer.vocabulary.fim_end
    assert end is not None
    outputs = _generate(model, prompts, max_new_tokens=model.config.evaluation.max_new_tokens, stop_ids=[end])
    stopped = sum(len(o) < model.config.evaluation.max_new_tokens for o in outputs) / max(len(outputs), 1)
    return [model.tokenizer.decode(o) for o in outputs], stopped


def infill_texts(model: TrainedModel, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Greedy infills between texts of any kind (prefix, suffix)."""
    if not can_infill(model):
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
        ConfigError: the model was not trained to infill, or not with the layout asked for.
    """
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


def _copy_accuracy(model: TrainedModel, prepared: PreparedData, report: Report, *, count: int = 200) -> None:
    """data=repeat: hide the second line; it stands again in the suffix and nowhere in the prefix."""
    questions = [_copy_question(text) for text in islice(prepared.texts("validation"), count)]
    report.hidden_lines = len(questions)
    report.copy_accuracy_prefix = _accuracy(model, questions, with_suffix=False, layout=None)
    asked = infilling(model)
    if asked is not None:
        accuracies = (_accuracy(model, questions, with_suffix=True, layout=name) for name in asked.layouts.trained)
        report.copy_accuracy_infill = min(accuracies)


def _copy_question(text: str) -> HiddenLine:
    before, repeated, after = text.splitlines(keepends=True)
    return HiddenLine(before, repeated, after, "", "", begins_document=True)


def _accuracy(model: TrainedModel, questions: Sequence[HiddenLine], *, with_suffix: bool, layout: str | None) -> float:
    """Share of hidden tokens that greedy decoding gets right."""
    prompts = [_prompt(model, q, with_suffix=with_suffix, layout=layout) for q in questions]
    truths = [list(model.tokenizer.encode(q.line.strip())) for q in questions]  # that a line ends is no news
    stop = [i for i in (model.tokenizer.vocabulary.fim_end,) if i is not None]
    outputs = _generate(model, prompts, max_new_tokens=max(len(t) for t in truths), stop_ids=stop)
    right = sum(a == b for out, truth in zip(outputs, truths, strict=True) for a, b in zip(out, truth, strict=False))
    return right / sum(len(t) for t in truths)
