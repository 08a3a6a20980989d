"""Sequences with numbers (objective=value), kept as columns beside their tokens; what a record may hold: data/scored_records.py.

Choices. Columns hold what the records say, so that γ, λ and alignment can change without preparing again. A folder appears whole, by a
rename. One sequence (or pair) fills a row; longer ones are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from heads_lightning.batch import PADDING, Examples
from heads_lightning.configs.data import DataConfig
from heads_lightning.configs.tokenizer import TokenizerConfig
from heads_lightning.configs.value import ValueConfig, ValueLoss
from heads_lightning.data.prepare import Progress
from heads_lightning.data.records import Record, RecordSource
from heads_lightning.data.scored_records import FIELDS, RecordReader, Sequence, Unusable
from heads_lightning.data.sources import TRAIN, VALIDATION, place
from heads_lightning.data.stream import permute, sample_key
from heads_lightning.data.tokenizer import Tokenizer
from heads_lightning.objectives.base import Objective
from heads_lightning.objectives.value import Scored, Value
from heads_lightning.registry import ConfigError

FORMAT = 1
"""Version of a folder's layout."""
COLUMNS = {"tokens": "<u4", "mask": "|b1", "returns": "<f4", "rewards": "<f4", "old_values": "<f4"}
"""Files of a split, one entry a token; `lengths` has one a sequence."""
_NOT_CONTENT = ("sequence_length", "validation_sequences", "cache_dir", "prepare_processes", "validation_fraction")


# -- a folder ------------------------------------------------------------------------------------------------------------


class ScoredSplit:
    """The sequences of one side, memory-mapped.

    Args:
        folder: of the prepared records.
        name: `train` or `validation`.
        padding: id of padding.
    """

    def __init__(self, folder: Path, name: str, padding: int) -> None:
        self.name, self.padding = name, padding
        self.columns = {column: _load(folder / f"{name}.{column}.npy") for column in (*COLUMNS, "lengths")}
        self.starts = np.concatenate([[0], np.cumsum(self.columns["lengths"])])

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.starts[-1])

    def rows(self, sequences_BK: np.ndarray, length: int) -> Scored:
        """Sequences [B, K] laid out K a row, padded to a length."""
        rows, shape = len(sequences_BK), (len(sequences_BK), length)
        arrays = {column: np.zeros(shape, self.columns[column].dtype) for column in COLUMNS}
        arrays["tokens"] = np.full(shape, self.padding, np.int64)
        segments_BS = np.full(shape, PADDING, np.int32)
        for row in range(rows):
            at = 0
            for segment, number in enumerate(sequences_BK[row].tolist()):
                start, stop = self.starts[number], self.starts[number + 1]
                here = slice(at, at + int(stop - start))
                for column, array in arrays.items():
                    array[row, here] = self.columns[column][start:stop]
                segments_BS[row, here], at = segment, here.stop
        return Scored(arrays["tokens"], segments_BS, arrays["mask"], arrays["returns"], arrays["rewards"], arrays["old_values"])


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (OSError, ValueError, EOFError):
        raise ConfigError(f"{path} is missing or damaged; delete the folder {path.parent} and it will be prepared again") from None


class PreparedRecords:
    """A folder of prepared records: what a data module and a run ask of prepared data.

    Args:
        folder: as returned by prepare_records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the texts."""
        return Tokenizer.load(self.folder)

    @property
    def fingerprint(self) -> str:
        """Equal for the same sequences in the same order, on any machine."""
        return self.facts["content"]

    @cached_property
    def train(self) -> ScoredSplit:
        """Sequences to train on."""
        return ScoredSplit(self.folder, TRAIN, self.tokenizer.vocabulary.padding)

    @cached_property
    def validation(self) -> ScoredSplit:
        """Sequences held out."""
        return ScoredSplit(self.folder, VALIDATION, self.tokenizer.vocabulary.padding)


def prepare_records(
    data: DataConfig, tokenizer: TokenizerConfig, objective: ValueConfig, *, progress: Progress | None = None
) -> PreparedRecords:
    """The sequences of a source of records; made now unless they are there already.

    Raises:
        ConfigError: no usable record, or none to hold out.
    """
    progress = progress or (lambda stage, done, total: None)
    source = data.build_source()
    assert isinstance(source, RecordSource), f"data={data.name} says that it has records"
    folder = _folder(data, tokenizer, objective, source)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.exists():
                _Preparation(data, tokenizer, objective, source, progress).run(folder)
    return PreparedRecords(folder)


def _folder(data: DataConfig, tokenizer: TokenizerConfig, objective: ValueConfig, source: RecordSource) -> Path:
    content = {k: v for k, v in asdict(data).items() if k not in _NOT_CONTENT} | {"validation_fraction": data.validation_fraction}
    needs = [objective.target, objective.loss in (ValueLoss.clipped_mse, ValueLoss.bce) and objective.loss, objective.pairwise]
    key = hashlib.sha256(json.dumps([FORMAT, content, tokenizer.identity(), needs, source.fingerprint()]).encode()).hexdigest()[:12]
    cache = Path(data.cache_dir.replace("${run_root}", "runs")).expanduser()
    return cache / f"{data.name}-scored-{tokenizer.name}-{key}"


class _Preparation:
    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        objective: ValueConfig,
        source: RecordSource,
        progress: Progress,
    ) -> None:
        self._data, self._tokenizer_config, self._objective, self._source = data, tokenizer, objective, source
        self._progress = progress
        self._parts = source.parts()
        self._problems: Counter[str] = Counter()
        self._example = ""

    def run(self, folder: Path) -> None:
        """Write the folder under another name, then rename it."""
        work = folder.with_name(folder.name + ".partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        self._progress("tokenizer", 0, 1)
        tokenizer = self._tokenizer_config.build(self._training_texts())
        tokenizer.save(work)
        content = hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint]).encode())
        writers = {name: _SplitWriter(work, name) for name in (TRAIN, VALIDATION)}
        reader = RecordReader(self._objective, Tokenizer.load(work))
        for number, part in enumerate(self._parts):
            self._progress("tokens", number, len(self._parts))
            for record in self._source.records(part, FIELDS):
                self._add(record, reader, writers, content)
        counts = {name: writer.close() for name, writer in writers.items()}
        self._check(counts, work)
        facts = {"content": content.hexdigest(), "sequences": counts, "left_out": dict(self._problems)}
        (work / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.rename(work, folder)

    def _training_texts(self) -> Iterator[str]:
        for part in self._parts:
            for record in self._source.records(part, FIELDS):
                if place(record.name) >= self._data.validation_fraction:
                    for name in ("prompt", "text", "chosen", "rejected", "steps"):
                        given = record.fields.get(name)
                        yield from (text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str))

    def _add(self, record: Record, reader: RecordReader, writers: dict[str, _SplitWriter], content: Any) -> None:
        try:
            if record.problem:
                raise Unusable(record.problem)
            sequences = reader.sequences(record.fields)
        except Unusable as problem:
            self._problems[str(problem)] += 1
            self._example = self._example or f"{record.name} ({problem})"
            return
        writer = writers[VALIDATION if place(record.name) < self._data.validation_fraction else TRAIN]
        for sequence in sequences:
            writer.add(sequence)
            content.update(b"".join(array.tobytes() for array in sequence))

    def _check(self, counts: dict[str, int], work: Path) -> None:
        left_out = sum(self._problems.values())
        if all(counts.values()):
            if left_out:
                warnings.warn(f"data={self._data.name}: left out {left_out} records, the first {self._example}", stacklevel=2)
            return
        shutil.rmtree(work, ignore_errors=True)
        if not any(counts.values()):
            said = ", ".join(f"{count} with {problem}" for problem, count in self._problems.most_common(3)) or "none read"
            raise ConfigError(f"data={self._data.name} has no record that objective=value can use: {said}")
        side, change = ("held out", "raise") if counts[TRAIN] else ("to train on", "lower")
        raise ConfigError(
            f"data.validation_fraction={self._data.validation_fraction} leaves no record {side} (of {sum(counts.values())}); {change} it"
        )


class _SplitWriter:
    """Appends sequences to one file a column; the .npy headers are written at the end."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._files = {column: open(folder / f"{name}.{column}.raw", "wb") for column in COLUMNS}  # noqa: SIM115 (closed in close)
        self._lengths: list[int] = []

    def add(self, sequence: Sequence) -> None:
        for (column, kind), array in zip(COLUMNS.items(), sequence, strict=True):
            self._files[column].write(array.astype(kind).tobytes())
        self._lengths.append(len(sequence.tokens))

    def close(self) -> int:
        """Finish the files; the number of sequences."""
        for column, kind in COLUMNS.items():
            self._files[column].close()
            raw = self._folder / f"{self._name}.{column}.raw"
            entries = np.memmap(raw, kind, "r") if self._lengths else np.zeros(0, kind)
            np.save(self._folder / f"{self._name}.{column}.npy", entries)
            raw.unlink()
        np.save(self._folder / f"{self._name}.lengths.npy", np.array(self._lengths, np.int64))
        return len(self._lengths)


# -- batches -------------------------------------------------------------------------------------------------------------


class ScoredStream:
    """An endless, numbered sequence of examples, as SampleStream: sample n is record `n % windows` of epoch `n // windows`, permuted.

    Args:
        split: the sequences.
        objective: makes the examples.
        sequence_length: positions of a row; longer sequences (or pairs) are left out.
        seed: of the order.
    """

    def __init__(self, split: ScoredSplit, objective: Objective, *, sequence_length: int, seed: int) -> None:
        assert isinstance(objective, Value)
        self._split, self._objective, self._sequence_length, self._seed = split, objective, sequence_length, seed
        each = 2 if objective.config.pairwise else 1
        self._sequences_NK = np.arange(len(split.columns["lengths"])).reshape(-1, each)
        fits_N = split.columns["lengths"].reshape(-1, each).sum(axis=1) <= sequence_length
        if not fits_N.any():
            longest = int(split.columns["lengths"].max(initial=0))
            raise ConfigError(
                f"no {split.name} record fits data.sequence_length={sequence_length} (the longest sequence has {longest} tokens); "
                f"use a longer data.sequence_length"
            )
        if not fits_N.all():
            warnings.warn(
                f"{np.count_nonzero(~fits_N)} of {len(fits_N)} {split.name} records are longer than data.sequence_length={sequence_length} "
                f"and left out",
                stacklevel=2,
            )
        self._sequences_NK = self._sequences_NK[fits_N]

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return len(self._sequences_NK)

    def examples(self, first_sample: int, count: int) -> Examples:
        """Samples first_sample … first_sample + count - 1, in order."""
        epoch_B, place_B = np.divmod(np.arange(first_sample, first_sample + count), self.windows)
        chosen_B = np.empty(count, np.int64)
        for epoch in np.unique(epoch_B).tolist():
            here = epoch_B == epoch
            chosen_B[here] = permute(place_B[here], self.windows, sample_key("order", self._seed, epoch))
        return self._objective.scored_examples(self._split.rows(self._sequences_NK[chosen_B], self._sequence_length))
