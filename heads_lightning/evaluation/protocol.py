"""The held-out protocol: one fixed set of questions for every model, whatever it was trained with.

Left to right: bits per byte of untransformed held-out text. Infilling: bits per byte of a hidden line given what stands before and after
it, against given what stands before it alone; exact match and edit similarity of the greedy infill, beside two floors that need no
model. Bits per byte survive a change of tokenizer. Lines and windows are chosen by fixed arithmetic, never by the run's seed.

A hidden line starts with the line break before it: prefix, line and suffix are then tokenised apart exactly as they are tokenised
together, so that no score suffers from an unusual split.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from heads_lightning.configs.evaluation import EvaluationConfig

VERSION = 2
"""Of the protocol: goes up when a question or a measure changes."""


class HiddenLine(NamedTuple):
    """A question: infill `line` between `prefix` and `suffix`."""

    prefix: str
    line: str
    """The line break before the line, and the line."""
    suffix: str
    previous_line: str
    next_line: str
    begins_document: bool
    """The prefix starts where its document starts."""


def is_eligible(line: str) -> bool:
    """Lines worth infilling: 6 to 60 visible characters, one of them a letter or a digit."""
    visible = line.strip()
    return 6 <= len(visible) <= 60 and any(c.isalnum() for c in visible)


def hidden_lines(documents: list[str], config: EvaluationConfig) -> list[HiddenLine]:
    """`config.infill_lines` lines spread evenly over all eligible lines of the documents."""
    places: list[tuple[int, int]] = []
    for d, text in enumerate(documents):
        lines = text.split("\n")
        places += [(d, i) for i in range(1, len(lines) - 1) if is_eligible(lines[i])]
    if not places:
        return []
    count = min(config.infill_lines, len(places))
    chosen = [places[int((k + 0.5) * len(places) / count)] for k in range(count)]
    return [_hide(documents[d].split("\n"), i, config) for d, i in chosen]


LONGEST_SPAN = 60
"""Characters of a random stretch, at most: as many as a hidden line has."""


def random_spans(documents: list[str], config: EvaluationConfig) -> list[HiddenLine]:
    """`config.random_spans` stretches of 1 to 60 characters at fixed pseudo-random places of the documents."""
    usable = [text for text in documents if len(text) > 2 * LONGEST_SPAN]
    if not usable:
        return []
    edges = np.cumsum([len(text) - LONGEST_SPAN for text in usable])
    draws = np.random.Generator(np.random.Philox(key=_SPAN_SEED)).random((config.random_spans, 2))
    questions = []
    for place, size in zip((draws[:, 0] * edges[-1]).astype(int).tolist(), draws[:, 1].tolist(), strict=True):
        d = int(np.searchsorted(edges, place, side="right"))
        start = place - (int(edges[d - 1]) if d else 0)
        questions.append(_cut(usable[d], start, start + 1 + int(size * LONGEST_SPAN), config))
    return questions


_SPAN_SEED = 20_220_728


def _cut(text: str, start: int, end: int, config: EvaluationConfig) -> HiddenLine:
    prefix = text[max(start - config.prefix_characters, 0) : start]
    suffix = text[end : end + config.suffix_characters]
    return HiddenLine(prefix, text[start:end], suffix, "", "", begins_document=len(prefix) == start)


def protocol(content_hash: str, validation_fraction: float, config: EvaluationConfig) -> str:
    """12 digits that are equal where models were asked the same: the same documents held out, the same questions."""
    asked = {k: v for k, v in asdict(config).items() if k not in ("enabled", "samples")}
    told = json.dumps([VERSION, content_hash, validation_fraction, asked], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def held_out_windows(stream: np.ndarray, length: int, max_tokens: int, rows: int = 16) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, int64 [B, length + 1]) of windows that are spread evenly over the held-out stream."""
    available = max((len(stream) - 1) // length, 1)
    count = max(min(max_tokens // length, available), 1)
    starts = [int(k * available / count) * length for k in range(count)]
    for first in range(0, count, rows):
        windows = [np.asarray(stream[start : start + length + 1], np.int64) for start in starts[first : first + rows]]
        shortest = min(len(window) for window in windows)
        yield first, np.stack([window[:shortest] for window in windows])


def _hide(lines: list[str], i: int, config: EvaluationConfig) -> HiddenLine:
    before, after = "\n".join(lines[:i]), "\n" + "\n".join(lines[i + 1 :])
    prefix = before[-config.prefix_characters :]
    return HiddenLine(
        prefix=prefix,
        line="\n" + lines[i],
        suffix=after[: config.suffix_characters],
        previous_line=lines[i - 1],
        next_line=lines[i + 1],
        begins_document=len(prefix) == len(before),
    )


# -- floors: what needs no model ----------------------------------------------------------------------------------------


@dataclass
class Floors:
    """Scores of methods without a model, on the same questions."""

    lookup_exact_match: float
    """Share of lines infilled exactly by the most frequent training line between the same neighbours (backing off to one)."""
    lookup_edit_similarity: float
    frequent_exact_match: float
    """The same for always answering the most frequent training line."""
    frequent_edit_similarity: float


def floors(training: Sequence[str], questions: Sequence[HiddenLine]) -> Floors:
    """Line lookup and most frequent line."""
    wanted_both = {(q.previous_line, q.next_line) for q in questions}
    wanted_one = {q.previous_line for q in questions} | {q.next_line for q in questions}
    tables: dict[Any, Counter[str]] = defaultdict(Counter)
    frequent: Counter[str] = Counter()
    for text in training:
        lines = text.split("\n")
        for i in range(1, len(lines) - 1):
            line = lines[i]
            if not is_eligible(line):
                continue
            frequent[line] += 1
            if (lines[i - 1], lines[i + 1]) in wanted_both:
                tables[lines[i - 1], lines[i + 1]][line] += 1
            if lines[i - 1] in wanted_one:
                tables["before", lines[i - 1]][line] += 1
            if lines[i + 1] in wanted_one:
                tables["after", lines[i + 1]][line] += 1
    top = frequent.most_common(1)[0][0] if frequent else ""
    looked_up = [_lookup(tables, q) for q in questions]
    return Floors(*_similarity(looked_up, questions), *_similarity([top] * len(questions), questions))


def _lookup(tables: dict[Any, Counter[str]], question: HiddenLine) -> str:
    for key in (
        (question.previous_line, question.next_line),
        ("before", question.previous_line),
        ("after", question.next_line),
    ):
        if tables.get(key):
            return tables[key].most_common(1)[0][0]
    return ""


def _similarity(answers: Sequence[str], questions: Sequence[HiddenLine]) -> tuple[float, float]:
    pairs = [(a.strip(), q.line.strip()) for a, q in zip(answers, questions, strict=True)]
    count = max(len(pairs), 1)
    return sum(a == b for a, b in pairs) / count, sum(edit_similarity(a, b) for a, b in pairs) / count


def edit_similarity(a: str, b: str) -> float:
    """1 − Levenshtein distance / length of the longer; 1 for two empty strings."""
    if not a or not b:
        return float(a == b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def ngram_bits_per_byte(training: bytes, held_out: bytes, order: int = 5) -> float:
    """Bits per byte of an interpolated byte n-gram model: p_k = (count + distinct·p_{k−1}) / (total + distinct) (Witten & Bell 1991, C)."""
    p = np.full(len(held_out), 1 / 256)
    for k in range(1, order + 1):
        keys, seen = _packed(training, k), _packed(held_out, k)
        grams, counts = np.unique(keys, return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        distinct = np.diff(np.append(first, len(grams)))
        count = _look_up(grams, counts, seen)
        total = _look_up(contexts, totals, seen >> np.uint64(8))
        kinds = _look_up(contexts, distinct, seen >> np.uint64(8))
        tail = p[k - 1 :]
        known = total > 0
        p[k - 1 :] = np.where(known, (count + kinds * tail) / np.maximum(total + kinds, 1), tail)
    return float(-np.log2(p).mean())


def _packed(text: bytes, k: int) -> np.ndarray:
    """uint64: every run of k bytes as one number."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    keys = np.zeros(len(data) - k + 1, np.uint64)
    for i in range(k):
        keys = (keys << np.uint64(8)) | data[i : len(data) - k + 1 + i]
    return keys


def _look_up(sorted_keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == wanted, values[at], 0)


# -- a model's answers --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What an evaluation found. None: the model cannot be asked this."""

    protocol: str = ""
    """Of what was asked: reports are comparable where it is the same (held-out text, questions, version of the protocol)."""
    left_to_right_bits_per_byte: float | None = None
    left_to_right_refusal: str | None = None
    """Why there is no such score, where a reader would look for it."""
    ngram_bits_per_byte: float | None = None
    """A 5-gram byte model's, on the same text."""
    infill_bits_per_byte: float | None = None
    """Of hidden lines, given prefix and suffix."""
    prefix_bits_per_byte: float | None = None
    """Of the same lines, given the prefix alone."""
    infill_exact_match: float | None = None
    infill_edit_similarity: float | None = None
    infill_stopped: float | None = None
    """Share of infills that end by themselves within the allowed length."""
    stop_accuracy: float | None = None
    """Share of hidden lines after which, and not before, the end of the middle is the likeliest token, fed the true line."""
    random_span_bits_per_byte: float | None = None
    """Of random stretches of 1 to 60 characters, given prefix and suffix."""
    random_span_prefix_bits_per_byte: float | None = None
    """Of the same, given the prefix alone."""
    random_span_exact_match: float | None = None
    random_spans: int = 0
    masked_bits_per_byte: float | None = None
    """Of tokens hidden at 15 %, from both sides; no bound on the text."""
    bound_bits_per_byte: float | None = None
    """Masked diffusion: upper bound on the bits per byte of held-out text. The infilling numbers of such a model are bounds too."""
    hidden_lines: int = 0
    floors: Floors | None = None
    copy_accuracy_infill: float | None = None
    """data=repeat: tokens of the hidden part right, given prefix and suffix (worst of the trained layouts)."""
    copy_accuracy_prefix: float | None = None
    """data=repeat: the same given the prefix alone."""
    validation_loss: float | None = None

    def metrics(self) -> dict[str, float]:
        """Flat numbers for tracking."""
        flat = asdict(self)
        inner = flat.pop("floors") or {}
        flat.pop("protocol")
        flat.pop("left_to_right_refusal")
        flat |= {f"floor_{k}": v for k, v in inner.items()}
        return {f"eval/{k}": float(v) for k, v in flat.items() if v is not None}


def clip_context(prefix: np.ndarray, suffix: np.ndarray, *, room: int, suffix_share: float = 0.33) -> tuple[np.ndarray, np.ndarray]:
    """The nearest `room` tokens around a hole: the end of the prefix and the start of the suffix."""
    suffix_room = min(len(suffix), max(int(room * suffix_share), room - len(prefix)))
    prefix_room = max(room - suffix_room, 0)
    return prefix[max(len(prefix) - prefix_room, 0) :], suffix[:suffix_room]


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats of some text as bits per byte of it."""
    return nats / math.log(2) / max(num_bytes, 1)
