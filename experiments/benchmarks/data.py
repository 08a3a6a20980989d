"""How fast is the data path, and what does it cost beside the libraries that it stands on?

    python experiments/benchmarks/data.py [--repeats N] [--json FILE]

Prints medians of interleaved repeats in one process, per second of processor time (other work on the machine shows less), over the
standard library and its 4,096-entry vocabulary: tokenising (read, check, encode, hash, write a part) against `tokenizers` alone on
texts already in memory; the loader (read, transform, collate, with and without its thread) against torch's DataLoader over the same
windows; the same loader with fill in the middle and masking, end to end; and what a second `prepare` costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from heads_lightning.batch import Attention, Examples
from heads_lightning.configs.data import StdlibConfig
from heads_lightning.configs.objective import CausalConfig, CausalLevel, FIMConfig, FIMCut, MLMConfig, ObjectiveConfig
from heads_lightning.configs.tokenizer import BPEConfig
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.prepare import _Setup, encode_part, prepare
from heads_lightning.data.shards import PreparedData
from heads_lightning.data.sources import Stdlib
from heads_lightning.data.tokenizer import Tokenizer
from heads_lightning.objectives.base import Objective, SampleRandom, Window

STEPS = 300
TABLE: list[dict[str, float | str]] = []
"""What was printed, for --json."""


class Causal(Objective):
    """Next token: the least that an objective can do."""

    attention = Attention.causal

    def window(self, sequence_length: int) -> Window:
        return Window(sequence_length, sequence_length + 1)

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        tokens_BR = tokens_BR.astype(np.int64)
        return Examples(tokens_BR[:, :-1], tokens_BR[:, 1:])


class Windows(torch.utils.data.Dataset):
    """What most code does: one window an item, collated by torch."""

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * self.sequence_length
        window = torch.from_numpy(self.tokens[start : start + self.sequence_length + 1].astype(np.int64))
        return window[:-1], window[1:]


def tokenising(cache: str, prepared: PreparedData, repeats: int) -> None:
    """A part's whole job against the library's share of it."""
    config = StdlibConfig(cache_dir=cache)
    source = Stdlib(config)
    parts = source.parts()
    texts = [document.text for part in parts for document in source.read(part)]
    num_bytes = sum(len(text.encode()) for text in texts)
    alone, whole = [], []
    for _ in range(repeats):
        fresh = Tokenizer.load(prepared.folder)  # the library keeps a cache of words
        alone.append(_seconds(lambda fresh=fresh: fresh.inner.encode_batch_fast(texts, add_special_tokens=False)))
        with tempfile.TemporaryDirectory() as folder:
            prepared.tokenizer.save(folder)
            (Path(folder) / "parts").mkdir()
            setup = _Setup(config, Path(folder))
            whole.append(_seconds(lambda setup=setup: [encode_part(setup, job) for job in enumerate(parts)]))
    ratio = statistics.median(a / w for a, w in zip(alone, whole, strict=True))
    print(f"tokenising, tokenizers alone   {num_bytes / statistics.median(alone) / 1e6:7.2f} MB per CPU-second")
    print(f"tokenising, parts on disk      {num_bytes / statistics.median(whole) / 1e6:7.2f} MB per CPU-second   {ratio:.2f} of it")
    TABLE.append({"what": "tokenising, share of tokenizers alone", "ratio": round(ratio, 3)})


def end_to_end(prepared: PreparedData, sequence_length: int, batch_size: int, repeats: int) -> None:
    """Read, transform, collate to tensors: what a training step asks for. Cold begins without encoded cuts, warm has the first repeat's."""
    configs: dict[str, ObjectiveConfig] = {
        "causal": CausalConfig(),
        "causal, whole documents": CausalConfig(level=CausalLevel.document),
        "fim char, rate 0.5, cold": FIMConfig(),
        "fim char, rate 0.5, warm": FIMConfig(),
        "fim char, rate 1, cold": FIMConfig(rate=1.0),
        "fim char, rate 1, warm": FIMConfig(rate=1.0),
        "fim token, rate 1": FIMConfig(rate=1.0, cut=FIMCut.token),
        "mlm 80/10/10": MLMConfig(),
    }
    rates: dict[str, list[float]] = {name: [] for name in configs}
    built = {name: config.build(prepared.vocabulary) for name, config in configs.items()}
    for repeat in range(repeats + 1):
        for name, config in configs.items():
            data = TokenDataModule(
                prepared,
                config.build(prepared.vocabulary) if name.endswith("cold") else built[name],
                sequence_length=sequence_length,
                global_batch_size=batch_size,
                micro_batch_size=batch_size,
                seed=0,
                total_steps=STEPS + 2,
                prefetch=False,
            )
            rate = _rate(iter(data.train_dataloader()), sequence_length * batch_size)
            if repeat:  # the first fills caches
                rates[name].append(rate)
    for name, values in rates.items():
        print(f"S {sequence_length:5d} B {batch_size:3d}  end to end, {name:26s} {statistics.median(values):7.1f} Mtok/CPU-s")
        TABLE.append({"what": f"end to end, {name}", "length": sequence_length, "mtok_per_cpu_second": round(statistics.median(values), 1)})


def loading(prepared: PreparedData, sequence_length: int, batch_size: int, repeats: int) -> None:
    """The loader against torch's."""

    def ours(prefetch: bool) -> float:
        data = TokenDataModule(
            prepared,
            Causal(),
            sequence_length=sequence_length,
            global_batch_size=batch_size,
            micro_batch_size=batch_size,
            seed=0,
            total_steps=STEPS + 2,
            prefetch=prefetch,
        )
        return _rate(iter(data.train_dataloader()), sequence_length * batch_size)

    def torch_loader() -> float:
        dataset = Windows(prepared.train.shards[0].tokens, sequence_length)
        loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
        endless = (batch for _ in iter(int, 1) for batch in loader)
        return _rate(endless, sequence_length * batch_size)

    ways = {"loader": lambda: ours(False), "loader, with its thread": lambda: ours(True), "torch DataLoader": torch_loader}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(way())
    for name, values in rates.items():
        ratio = statistics.median(v / t for v, t in zip(values, rates["torch DataLoader"], strict=True))
        print(f"S {sequence_length:5d} B {batch_size:3d}  {name:24s} {statistics.median(values):7.1f} Mtok/CPU-s   {ratio:.1f} x torch")
        TABLE.append(
            {
                "what": name,
                "length": sequence_length,
                "mtok_per_cpu_second": round(statistics.median(values), 1),
                "ratio": round(ratio, 2),
            }
        )


def _rate(batches, tokens: int) -> float:
    next(batches)
    return STEPS * tokens / _seconds(lambda: [next(batches) for _ in range(STEPS)]) / 1e6


def _seconds(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    started = clock()
    work()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the table to a file")
    args = parser.parse_args()
    repeats = args.repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        config = StdlibConfig(cache_dir=cache)
        print(f"prepare, first call            {_seconds(lambda: prepare(config, BPEConfig()), time.perf_counter):7.2f} s")
        print(f"prepare, nothing changed       {_seconds(lambda: prepare(config, BPEConfig()), time.perf_counter):7.3f} s")
        prepared = prepare(config, BPEConfig())
        tokenising(cache, prepared, repeats)
        for sequence_length, batch_size in ((256, 32), (512, 32), (1024, 16), (2048, 32)):
            loading(prepared, sequence_length, batch_size, repeats)
        for sequence_length, batch_size in ((512, 64), (2048, 32)):
            end_to_end(prepared, sequence_length, batch_size, repeats)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(TABLE, indent=1) + "\n")


if __name__ == "__main__":
    main()
