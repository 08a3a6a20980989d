"""The same seed gives the same batch, from one version to the next: what a run was trained on can be made again, and a resumed run goes on.

A number here changes only with a decision to change what training sees; then say so in the changelog.
"""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest

from heads_lightning.configs.objective import (
    CausalConfig,
    CausalLevel,
    FIMConfig,
    FIMCut,
    FIMLoss,
    MaskedDiffusionConfig,
    MixtureConfig,
    MLMConfig,
    MLMCount,
    MLMUnit,
    MultiTokenConfig,
    ObjectiveConfig,
    PrefixLMConfig,
    SpanCorruptionConfig,
    SpanEdges,
    SPMLayout,
    UL2Config,
)
from heads_lightning.data.shards import Shard
from heads_lightning.data.stream import SampleStream
from heads_lightning.objectives.base import Vocabulary

MERGED = [" the", " of", "ing", "tion", "return", " self", "    ", "\n    ", "é", "日本", "def ", "'s", "er", "on"]
WORDS = [
    "the",
    "of",
    "thing",
    "attention",
    "return",
    "self",
    "don't",
    "x1",
    "été",
    "日本語",
    "(a+b)",
    "\n    return",
    "\n\n",
    "def f(x):",
    "3.14",
]


def encode(text: str) -> list[int]:
    """Longest entry first, inside runs of letters, digits, marks or white space: a tokenizer that no library's version changes."""
    ids = []
    for piece in re.findall(r" ?[^\W\d_]+| ?\d+| ?[^\w\s]+|_+|\s+(?!\S)|\s+", text):
        left = piece.encode()
        while left:
            token = next((m for m in sorted(MERGED, key=len, reverse=True) if left.startswith(m.encode())), None)
            ids.append(256 + MERGED.index(token) if token else left[0])
            left = left[len(token.encode()) if token else 1 :]
    return ids


def vocabulary() -> Vocabulary:
    text = (*(bytes([b]) for b in range(256)), *(m.encode() for m in MERGED))
    special = len(text)
    size = special + 7 + 60
    token_bytes = (*text, *[b""] * 67)
    return Vocabulary(
        size=size,
        end_of_document=special,
        padding=special + 1,
        mask=special + 2,
        fim_prefix=special + 3,
        fim_suffix=special + 4,
        fim_middle=special + 5,
        fim_end=special + 6,
        sentinels=tuple(range(special + 7, size)),
        special_V=np.arange(size) >= special,
        token_bytes=token_bytes,
        word_start_V=np.array([not b or b[:1] in b" \n(.+'" for b in token_bytes]),
        encode=encode,
    )


def stream() -> np.ndarray:
    v, draws = vocabulary(), np.random.Generator(np.random.Philox(key=5))
    ids = []
    for length in draws.integers(1, 90, 120).tolist():
        words = [WORDS[k] for k in draws.integers(0, len(WORDS), length).tolist()]
        ids += [v.end_of_document, *encode(" ".join(words))]
    return np.array([*ids, v.end_of_document], np.uint16)


CASES: dict[str, tuple[ObjectiveConfig, int]] = {
    "causal": (CausalConfig(), 2_251_915_591),
    "causal documents": (CausalConfig(level=CausalLevel.document), 127_766_477),
    "fim char": (FIMConfig(rate=0.7), 195_561_563),
    "fim char, variant 1, middle": (FIMConfig(rate=1.0, spm=SPMLayout.variant1, loss_on=FIMLoss.middle), 2_489_090_847),
    "fim token": (FIMConfig(cut=FIMCut.token), 2_667_897_115),
    "fim line": (FIMConfig(cut=FIMCut.line, rate=1.0), 2_032_567_639),
    "fim schedule": (FIMConfig(rate=0.9, rate_start=0.0, rate_tokens=3000), 4_284_948_609),
    "mlm": (MLMConfig(), 41_762_262),
    "mlm words": (MLMConfig(unit=MLMUnit.word), 823_913_195),
    "mlm spans": (MLMConfig(unit=MLMUnit.span), 3_668_872_329),
    "mlm exact": (MLMConfig(count=MLMCount.exact), 3_343_074_653),
    "span_corruption": (SpanCorruptionConfig(), 2_009_090_709),
    "span_corruption of seqio": (SpanCorruptionConfig(edges=SpanEdges.seqio), 3_163_231_880),
    "prefix_lm": (PrefixLMConfig(), 2_043_767_804),
    "ul2": (UL2Config(), 3_786_731_309),
    "masked_diffusion": (MaskedDiffusionConfig(), 1_059_701_026),
    "multi_token": (MultiTokenConfig(), 1_335_652_702),
    "mixture": (MixtureConfig(parts={"a": {"name": "causal"}, "b": {"name": "fim", "mode": True}}), 3_374_727_194),
}


def digest(config: ObjectiveConfig) -> int:
    """CRC-32 of two epochs of batches, every array of them, read through the stream that training reads."""
    v = vocabulary()
    objective = config.build(v)
    shards = [Shard(part, np.flatnonzero(part == v.end_of_document)) for part in np.array_split(stream(), 2)]
    samples = SampleStream(shards, objective, sequence_length=96, seed=11, trained_before=0)
    total = 0
    for first in range(0, 2 * samples.windows, 7):
        for name, array in samples.examples(first, 7)._asdict().items():
            if array is not None:
                total = zlib.crc32(np.ascontiguousarray(array).tobytes(), zlib.crc32(f"{name}{array.dtype}{array.shape}".encode(), total))
    return total


@pytest.mark.parametrize(("config", "expected"), CASES.values(), ids=CASES)
def test_batches_are_those_of_the_first_version(config, expected):
    assert digest(config) == expected
