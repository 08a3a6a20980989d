"""Real text for the objectives' tests: the standard library's source, a small byte-level BPE trained on it, and streams of both."""

from __future__ import annotations

import functools
import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from heads_lightning.objectives.base import Vocabulary
from heads_lightning.testing.objectives import byte_vocabulary

NAMED = ["<eod>", "<pad>", "<mask>", "<pre>", "<suf>", "<mid>", "<end>"]
SENTINELS = [f"<extra_{k}>" for k in range(100)]
MULTI_BYTE = (
    "naïve façade — “déjà vu” … ∑ x² ≤ π·r²\n日本語のテキスト、改行\nと空白　全角 😀👩‍👩‍👧 zwj\n"
    "\tΔt = 3µs # Ünïcødé\r\nкириллица и ещё слова\n"
)


@functools.cache
def documents() -> tuple[str, ...]:
    """Some files of the standard library, and one that is full of multi-byte characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(p for folder in ("", "json", "email", "asyncio", "logging") for p in (root / folder).glob("*.py"))
    texts = [p.read_text(encoding="utf-8") for p in names[::3] if p.stat().st_size < 40_000]
    return (*[t for t in texts if t.strip()][:60], MULTI_BYTE * 4)


def byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(rest)}


@functools.cache
def tokenizer(size: int = 1500, pattern: str | None = None) -> Tokenizer:
    """Byte-level BPE; `pattern` replaces GPT-2's expression of pre-tokens."""
    made = Tokenizer(models.BPE())
    if pattern is None:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        from tokenizers import Regex

        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=NAMED + SENTINELS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents(), trainer)
    return made


@functools.cache
def vocabulary(size: int = 1500, pattern: str | None = None) -> Vocabulary:
    made = tokenizer(size, pattern)
    table = byte_of_char()
    names = {i: t for t, i in made.get_vocab().items()}
    special = np.array([names[i] in NAMED + SENTINELS for i in range(len(names))])
    texts = tuple(b"" if special[i] else bytes(table[c] for c in names[i]) for i in range(len(names)))
    plain = Tokenizer.from_str(json.dumps(json.loads(made.to_str()) | {"added_tokens": []}))  # text that spells a sentinel is text
    return replace(  # the special tokens have the same ids
        byte_vocabulary(),
        size=len(names),
        special_V=special,
        token_bytes=texts,
        word_start_V=np.array([bool(special[i]) or not (texts[i][:1].isalnum() or texts[i][:1] >= b"\x80") for i in range(len(names))]),
        encode=lambda text: plain.encode(text, add_special_tokens=False).ids,
    )


@functools.cache
def stream(size: int = 1500, pattern: str | None = None) -> np.ndarray:
    """uint16: every document after an end-of-document id, and one at the end."""
    v = vocabulary(size, pattern)
    ids = [np.array([v.end_of_document, *v.encode(text)], np.uint16) for text in documents()]
    return np.concatenate([*ids, np.array([v.end_of_document], np.uint16)])


def windows(objective, sequence_length: int, indices, source: np.ndarray | None = None) -> np.ndarray:
    """[B, R] windows of the stream, by number."""
    source = stream() if source is None else source
    stride, length = objective.window(sequence_length)
    return np.stack([source[i * stride : i * stride + length] for i in indices])


def num_windows(objective, sequence_length: int, source: np.ndarray | None = None) -> int:
    source = stream() if source is None else source
    stride, length = objective.window(sequence_length)
    return (len(source) - length) // stride + 1


def text_of(ids, v: Vocabulary) -> bytes:
    """Bytes of ids; special tokens have none."""
    return b"".join(v.token_bytes[i] for i in np.asarray(ids).tolist())
