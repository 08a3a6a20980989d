"""The contract of an objective: pure, per sample, well-formed, and nothing that is to be predicted can be read."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import ObjectiveConfig
from heads_lightning.objectives.base import Objective, SampleRandom, Vocabulary
from heads_lightning.registry import ConfigError

ROLES = [f.name for f in fields(Vocabulary) if f.name == "sentinels" or "int | None" in str(f.type)]
"""Special tokens that a tokenizer may lack."""


def check_objective(config: ObjectiveConfig, *, vocabulary: Vocabulary | None = None, sequence_length: int = 64) -> None:
    """objectives.base.Objective, on source code and on a text of tokens that are all different.

    Args:
        config: what to check.
        vocabulary: with the roles that it needs; one token per byte when left out.
        sequence_length: of the examples, at most 64.
    """
    vocabulary = byte_vocabulary() if vocabulary is None else vocabulary
    _check_roles(config, vocabulary)
    objective = config.build(vocabulary)
    assert objective.attention == config.attention, f"attention: the config says {config.attention}, the objective {objective.attention}"
    window = objective.window(sequence_length)
    assert 1 <= window.stride <= window.length, f"{window}: tokens between two windows would never be seen"
    stream = text_stream(vocabulary)
    if objective.rewrites_stream:
        before = stream.copy()
        rewritten = objective.rewrite(stream, 0, 0)
        assert np.array_equal(stream, before), "rewrite changes the stream that it is given"
        assert np.array_equal(rewritten, objective.rewrite(stream, 0, 0)), "rewrite is not a function of stream, seed and epoch"
        assert rewritten.dtype == stream.dtype, f"rewrite gives {rewritten.dtype}, not the stream's {stream.dtype}"
        assert len(rewritten) >= len(stream), "rewrite gives a shorter stream"
        stream = rewritten
    count = min(24, (len(stream) - window.length) // window.stride)
    _check_shapes(objective, make_examples(objective, stream, sequence_length, range(count)), vocabulary, sequence_length)
    _check_purity(objective, stream, sequence_length, count)
    if config.predicts == "token":  # the label of a value is the token after it, which nobody is to predict
        _check_nothing_to_predict_can_be_read(objective, vocabulary, sequence_length)


def _check_roles(config: ObjectiveConfig, vocabulary: Vocabulary) -> None:
    unknown = set(config.special_tokens) - set(ROLES)
    assert not unknown, f"special_tokens: {', '.join(unknown)} are no roles; there are {', '.join(ROLES)}"
    for role in config.special_tokens:
        try:
            config.build(replace(vocabulary, **{role: () if role == "sentinels" else None})).window(64)
        except ConfigError:
            continue
        raise AssertionError(f"a vocabulary without {role} must be refused with a ConfigError: see objectives.base.require_roles")


def _check_shapes(objective: Objective, made: Examples, vocabulary: Vocabulary, sequence_length: int) -> None:
    rows = len(made.tokens_BS)
    kinds = {"tokens": np.int64, "labels": np.int64, "segments": np.int32, "weights": np.float32, "prefix": bool, "part": np.int8}
    kinds |= {"values": np.float32, "old_values": np.float32, "counts": np.int64}
    for name, array in made._asdict().items():
        if array is not None:
            kind = kinds[name.removeprefix("encoder_").rsplit("_", 1)[0]]
            assert array.dtype == kind, f"{name} is {array.dtype}, not {np.dtype(kind)}"
            assert array.flags["C_CONTIGUOUS"], f"{name} is not contiguous: use np.ascontiguousarray"
            blocks = 1 + objective.steps_ahead if name in ("labels_BS", "weights_BS", "part_BS") else 1
            shape = (rows,) if name.endswith("_B") else (rows, blocks * objective.decoder_length(sequence_length))
            assert name.startswith("encoder_") or array.shape == shape, f"{name} is {array.shape}"
            assert np.isfinite(array).all(), f"{name} has numbers that are not finite"
    assert (made.prefix_BS is not None) == (objective.attention == Attention.prefix), (
        "prefix_BS belongs to attention=prefix, and only there"
    )
    encodes = objective.attention == Attention.encoder_decoder
    assert (made.encoder_tokens_BT is not None) == encodes, "encoder_tokens_BT belongs to attention=encoder_decoder, and only there"
    targets = made.labels_BS != IGNORE
    assert targets.any(), "nothing is to be predicted"
    assert (made.counts_B is not None) == objective.counts_apart, "counts_B belongs to counts_apart=True, and only there"
    for name, ids in (("tokens_BS", made.tokens_BS), ("labels_BS", made.labels_BS[targets])):
        assert ((ids >= 0) & (ids < vocabulary.size)).all(), f"{name} has ids outside 0..{vocabulary.size - 1}"
    for role in (vocabulary.padding, vocabulary.mask):
        assert not (made.labels_BS[targets] == role).any(), "padding or the mask token is to be predicted"
    if made.segments_BS is not None:
        padded, steps = made.segments_BS == PADDING, np.diff(made.segments_BS, axis=1)
        assert not targets[np.tile(padded, (1, 1 + objective.steps_ahead))].any(), "padding has targets"
        assert (made.tokens_BS[padded] == vocabulary.padding).all(), "positions of segment PADDING do not hold the padding token"
        assert (padded[:, 1:] | (steps == 0) | (steps == 1)).all(), "segments are numbered in order, one run each, padding last"
    assert len(set(objective.parts)) == len(objective.parts), f"parts {objective.parts} repeat a name"
    if made.part_BS is not None:
        assert set(np.unique(made.part_BS)) <= set(range(len(objective.parts))), f"part_BS has numbers beyond parts {objective.parts}"


def _check_purity(objective: Objective, stream: np.ndarray, sequence_length: int, count: int) -> None:
    whole = make_examples(objective, stream, sequence_length, range(count), seed=3, epoch=1)
    again = make_examples(objective, stream, sequence_length, range(count), seed=3, epoch=1)
    assert _same(whole, again), "the same (seed, epoch, index) gives other examples: every random number must come from rng"
    for chosen in np.array_split(np.random.default_rng(0).permutation(count), 5):
        mixed = make_examples(objective, stream, sequence_length, chosen, seed=3, epoch=1)
        assert _same(mixed, [None if array is None else array[chosen] for array in whole]), (
            "a sample depends on its place in the batch or on its neighbours"
        )
    for kind in (np.uint16, np.int64):
        other = make_examples(objective, stream.astype(kind), sequence_length, range(count), seed=3, epoch=1)
        assert _same(whole, other), f"a stream of {np.dtype(kind)} gives other examples"
    length = objective.window(sequence_length).length
    windows = np.stack([stream[:length], stream[1 : length + 1]])
    before = windows.copy()
    objective.examples(windows, SampleRandom(0, 0, np.arange(2)), sequence_length)
    assert np.array_equal(windows, before), "the windows given are changed: they are shared"


def _check_nothing_to_predict_can_be_read(objective: Objective, vocabulary: Vocabulary, sequence_length: int) -> None:
    """Every ordinary token of a window differs, so a label that stands where its position may look has leaked."""
    single = [vocabulary.encode(character) for character in string.printable.strip()]
    different = [vocabulary.end_of_document, *(ids[0] for ids in single if len(ids) == 1)]
    assert len(different) > objective.window(sequence_length).length, f"sequence_length={sequence_length} is too long for this vocabulary"
    made = make_examples(objective, np.tile(np.array(different, np.uint32), 60), sequence_length, range(32))
    segments = np.zeros_like(made.tokens_BS) if made.segments_BS is None else made.segments_BS
    index, readable, targets = np.arange(made.tokens_BS.shape[1]), 0, 0
    for b, column in zip(*np.nonzero(made.labels_BS != IGNORE), strict=True):
        if vocabulary.special_V[made.labels_BS[b, column]]:
            continue
        s = column % sequence_length
        sees = index <= s if objective.attention != Attention.bidirectional else index >= 0
        if made.prefix_BS is not None:
            sees = sees | (made.prefix_BS[b] if made.prefix_BS[b, s] else False)
        seen = made.tokens_BS[b, sees & (segments[b] == segments[b, s])]
        if made.encoder_tokens_BT is not None:
            same = True if made.encoder_segments_BT is None else made.encoder_segments_BT[b] == segments[b, s]
            seen = np.concatenate((seen, made.encoder_tokens_BT[b][same].ravel()))
        label = made.labels_BS[b, column]
        targets, readable = targets + 1, readable + int((seen == label).any())
        leaks = bool((seen == label).any()) and objective.attention != Attention.bidirectional
        assert not leaks, f"row {b}, position {s}: the label {label} stands where this position may look (labels are aligned)"
    # from both sides some targets may be left as they are (BERT keeps a tenth), but not all
    assert readable < targets, "every target can be read where it stands: nothing is hidden"


def _same(one: Iterable[np.ndarray | None], other: Iterable[np.ndarray | None]) -> bool:
    return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def make_examples(
    objective: Objective, stream: np.ndarray, sequence_length: int, indices: Iterable[int], *, seed: int = 0, epoch: int = 0
) -> Examples:
    """Examples from the windows of the stream with these numbers."""
    stride, length = objective.window(sequence_length)
    numbers = np.fromiter(indices, np.int64)
    windows = np.stack([stream[i * stride : i * stride + length] for i in numbers])
    return objective.examples(windows, SampleRandom(seed, epoch, numbers), sequence_length)


@cache
def byte_vocabulary() -> Vocabulary:
    """Seven special tokens, 100 sentinels, then the 256 bytes."""
    special, texts = np.arange(363) < 107, tuple(b"" if i < 107 else bytes([i - 107]) for i in range(363))
    return Vocabulary(
        size=363,
        end_of_document=0,
        padding=1,
        mask=2,
        fim_prefix=3,
        fim_suffix=4,
        fim_middle=5,
        fim_end=6,
        sentinels=tuple(range(7, 107)),
        special_V=special,
        token_bytes=texts,
        word_start_V=np.array([not (text.isalnum() or text >= b"\x80") for text in texts]),
        encode=lambda text: [107 + byte for byte in text.encode()],
    )


def text_stream(vocabulary: Vocabulary) -> np.ndarray:
    """uint32: short documents, paragraphs of Python's own json package and a text that is not ASCII, an end-of-document id around each."""
    texts = [text for path in sorted(Path(json.__file__).parent.glob("*.py")) for text in path.read_text(encoding="utf-8").split("\n\n")]
    ids = [[vocabulary.end_of_document, *vocabulary.encode(text)] for text in ("naïve — 日本語 😀 x² ≤ π\n" * 4, *texts[:80])]
    return np.array([token for document in ids for token in document] + [vocabulary.end_of_document], np.uint32)
