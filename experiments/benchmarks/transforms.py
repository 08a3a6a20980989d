"""How fast are the objectives, and how much faster than the ways in common use? One process, one thread, interleaved repeats.

    python experiments/benchmarks/transforms.py [--tokens 400000] [--batch 64 256] [--length 512] [--repeats 5] [--json FILE]

Data: the standard library's source, byte-level BPE of 4096 entries. Figures are raw tokens per CPU-second, from windows (or, for
transformers, rows) that are in memory to examples; reading is part of data.py. Peers are written here in
the style of public code: fill in the middle by decoding a piece, cutting the text and encoding its three parts (Megatron, bigcode);
masking by transformers' DataCollatorForLanguageModeling, when transformers and torch are installed.

`cold` draws new cuts in each repeat, so that most of the work is encoding cells not met before; `warm` repeats the same cuts, which is
the cost of all the rest. Training is between the two: its tables fill with the run. `floor` writes the arrays of examples and nothing
else, and gathers the ids of pieces in a random order first: no transform into new arrays is faster. A batch is what a rank makes at
once, its share of an optimizer step; small ones pay for a few hundred calls of numpy each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from heads_lightning.configs.objective import FIMConfig, FIMCut, FIMLevel, MLMConfig, MLMCount, MLMUnit, ObjectiveConfig, objectives
from heads_lightning.objectives.base import SampleRandom, Vocabulary, gather_ranges

SPECIAL = [f"<|{name}|>" for name in ("eod", "pad", "mask", "pre", "suf", "mid", "end", *(f"extra_{k}" for k in range(100)))]


def corpus(num_tokens: int) -> tuple[Tokenizer, Vocabulary, np.ndarray]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "encodings", "pydoc_data"} & set(p.parts)]
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in files][:: max(1, len(files) * 10_000 // (num_tokens * 4))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {chr(b): b for b in plain} | {chr(256 + k): b for k, b in enumerate(b for b in range(256) if b not in plain)}
    size = tokenizer.get_vocab_size()
    names = [tokenizer.id_to_token(i) or "" for i in range(size)]
    special = np.array([name in SPECIAL for name in names])
    token_bytes = tuple(b"" if special[i] else bytes(stand_in[c] for c in names[i]) for i in range(size))
    vocabulary = Vocabulary(
        size,
        end_of_document=0,
        padding=1,
        mask=2,
        fim_prefix=3,
        fim_suffix=4,
        fim_middle=5,
        fim_end=6,
        sentinels=tuple(range(7, 107)),
        special_V=special,
        token_bytes=token_bytes,
        word_start_V=np.array([special[i] or not token_bytes[i][:1].isalnum() for i in range(size)]),
        encode=lambda text: tokenizer.encode(text).ids,
    )
    ids = [[0, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]
    return tokenizer, vocabulary, np.array([*[i for document in ids for i in document][:num_tokens], 0], np.uint16)


def ours(config: ObjectiveConfig, vocabulary: Vocabulary, stream: np.ndarray, batch: int, length: int, *, warm: bool) -> Callable[[], int]:
    """A function that transforms the whole stream once; it returns the raw tokens that it covered. Windows are there already."""
    objective = config.build(vocabulary)
    stride, width = objective.window(length)
    count = (len(stream) - width) // stride
    batches = [np.arange(first, min(first + batch, count)) for first in range(0, count, batch)]
    windows = [stream[indices[:, None] * stride + np.arange(width)] for indices in batches]  # as the loader hands them over
    epoch = 0

    def whole() -> int:
        nonlocal epoch
        epoch += not warm
        if objective.rewrites_stream:
            objective.rewrite(stream, 0, epoch)
            return len(stream)
        for indices, tokens_BR in zip(batches, windows, strict=True):
            objective.examples(tokens_BR, SampleRandom(0, epoch, indices), length)
        return count * stride

    return whole


def floor(stream: np.ndarray, batch: int, length: int, *, gather: bool) -> Callable[[], int]:
    """Copies of the windows into the four arrays of examples; before that, if asked, one gather of seven ranges a row."""
    count = (len(stream) - 1) // length
    windows = [stream[first * length : (first + batch) * length + 1].astype(np.int64) for first in range(0, count - batch + 1, batch)]
    rng, ranges = np.random.default_rng(0), 7 * batch
    edges = np.sort(rng.choice(batch * length, ranges - 1, replace=False) + 1)
    starts, lengths = np.append(0, edges), np.diff(edges, prepend=0, append=batch * length + 1)
    order = rng.permutation(ranges)

    def whole() -> int:
        for window in windows:
            ids = window.take(gather_ranges(starts[order], lengths[order])) if gather else window
            _ = ids[:-1].copy(), ids[1:].copy(), np.zeros(batch * length, np.int32), np.zeros(batch * length, np.int8)
        return len(windows) * batch * length

    return whole


def decode_and_encode(tokenizer: Tokenizer, stream: np.ndarray, length: int, rate: float) -> Callable[[], int]:
    """Windows split at documents; a piece's text is cut and its three parts are encoded; the window is cut back or padded."""
    random = np.random.RandomState(0)

    def piece(ids: np.ndarray) -> list[int]:
        if not len(ids) or random.rand() >= rate:
            return ids.tolist()
        text = tokenizer.decode(ids.tolist())
        a, b = sorted(random.randint(0, len(text) + 1, 2))
        prefix, middle, suffix = (tokenizer.encode(part).ids for part in (text[:a], text[a:b], text[b:]))
        return [3, 4, *suffix, 5, *prefix, *middle] if random.rand() < 0.5 else [3, *prefix, 4, *suffix, 5, *middle]

    def whole() -> int:
        for start in range(0, len(stream) - length, length):
            window = stream[start : start + length].astype(np.int64)
            out: list[int] = []
            for document in np.split(window, np.flatnonzero(window == 0)):
                opens = int(len(document) > 0 and document[0] == 0)
                out += document[:opens].tolist() + piece(document[opens:])
            np.array((out + [1] * length)[:length])
        return len(stream)

    return whole


def collator(tokenizer: Tokenizer, stream: np.ndarray, batch: int, length: int) -> Callable[[], int] | None:
    try:
        import torch
        from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
    except ImportError:
        return None
    torch.set_num_threads(1)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="<|mask|>", pad_token="<|pad|>", eos_token="<|eod|>")
    collate = DataCollatorForLanguageModeling(fast, mlm=True)
    rows = [{"input_ids": row} for row in stream[: len(stream) // length * length].reshape(-1, length).astype(np.int64).tolist()]

    def whole() -> int:
        for first in range(0, len(rows), batch):
            collate(rows[first : first + batch])
        return len(rows) * length

    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--syntax", action="store_true", help="also cuts of the syntax tree: slow")
    parser.add_argument("--json", type=Path, help="write the table to a file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer, vocabulary, stream = corpus(args.tokens)
    tables = {batch: measure(tokenizer, vocabulary, stream, batch, args) for batch in args.batch}
    if args.json:
        facts = {"tokens": len(stream), "length": args.length, "repeats": args.repeats}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": facts, "rows_by_batch": tables}, indent=1) + "\n")


def measure(tokenizer: Tokenizer, vocabulary: Vocabulary, stream: np.ndarray, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, at one size of batch; prints a table and returns it."""

    def run(config: ObjectiveConfig, *, warm: bool = False) -> Callable[[], int]:
        return ours(config, vocabulary, stream, batch, args.length, warm=warm)

    char, token = FIMCut.char, FIMCut.token
    reencode, masking = "decode, cut, encode three parts", "DataCollatorForLanguageModeling"
    cases: dict[str, tuple[Callable[[], int] | None, str]] = {
        "floor: copy": (floor(stream, batch, args.length, gather=False), ""),
        "floor: gather and copy": (floor(stream, batch, args.length, gather=True), ""),
        f"{reencode}, rate 0.5": (decode_and_encode(tokenizer, stream, args.length, 0.5), ""),
        f"{reencode}, rate 1": (decode_and_encode(tokenizer, stream, args.length, 1.0), ""),
        "fim char, rate 0.5, cold": (run(FIMConfig(rate=0.5, cut=char)), f"{reencode}, rate 0.5"),
        "fim char, rate 1, cold": (run(FIMConfig(rate=1.0, cut=char)), f"{reencode}, rate 1"),
        "fim char, rate 0.5, warm": (run(FIMConfig(rate=0.5, cut=char), warm=True), f"{reencode}, rate 0.5"),
        "fim char, rate 1, warm": (run(FIMConfig(rate=1.0, cut=char), warm=True), f"{reencode}, rate 1"),
        "fim char, rate 1, documents, cold": (run(FIMConfig(rate=1.0, level=FIMLevel.document)), f"{reencode}, rate 1"),
        "fim char, rate 1, documents, warm": (run(FIMConfig(rate=1.0, level=FIMLevel.document), warm=True), f"{reencode}, rate 1"),
        "fim token, rate 0.5": (run(FIMConfig(rate=0.5, cut=token)), f"{reencode}, rate 0.5"),
        "fim token, rate 1": (run(FIMConfig(rate=1.0, cut=token)), f"{reencode}, rate 1"),
        masking: (collator(tokenizer, stream, batch, args.length), ""),
        "mlm 80/10/10, tokens": (run(MLMConfig()), masking),
        "mlm 80/10/10, words": (run(MLMConfig(unit=MLMUnit.word)), masking),
        "mlm 80/10/10, spans": (run(MLMConfig(unit=MLMUnit.span)), masking),
        "mlm 80/10/10, exact count": (run(MLMConfig(count=MLMCount.exact)), masking),
        "mlm 80/10/10, rate 0.3 to 0.15": (run(MLMConfig(rate_start=0.3, rate_tokens=args.tokens)), masking),
    }
    if args.syntax:
        cases["fim syntax, rate 1"] = (run(FIMConfig(rate=1.0, cut=FIMCut.syntax)), f"{reencode}, rate 1")
    for name, config in objectives.items():
        if name not in ("fim", "mlm"):
            cases[name] = (run(config()), "")
    seconds: dict[str, list[float]] = {name: [] for name, (f, _) in cases.items() if f}
    for repeat in range(args.repeats + 1):
        for name in seconds:
            f = cases[name][0]
            assert f is not None
            start = time.process_time()
            done = f()
            if repeat:  # the first fills tables and caches
                seconds[name].append((time.process_time() - start) / done)
    print(f"{len(stream)} tokens, windows of {args.length}, batches of {batch}, median of {args.repeats}")
    table = []
    for name, values in seconds.items():
        peer = cases[name][1]
        ratio = statistics.median(seconds[peer]) / statistics.median(values) if peer in seconds else None
        speed = 1e-6 / statistics.median(values)
        table.append({"transform": name, "mtok_per_cpu_second": round(speed, 2), "ratio": ratio and round(ratio, 1), "peer": peer})
        print(f"{name:48s} {speed:8.1f} Mtok/s" + (f"   {ratio:6.1f} x {peer}" if ratio else ""))
    return table


if __name__ == "__main__":
    main()
