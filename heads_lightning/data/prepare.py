"""Sources and tokenizers to prepared tokens: in parallel, atomically, once.

Choices. A folder is named by what it was made from (source fingerprint, tokenizer, filters, format), so nothing is ever overwritten and
"did anything change?" is a look for a folder. Work happens beside it under another name, one file per part, and goes on there after a
kill; a rename at the end makes the folder appear whole. Parts are tokenised in any order by any number of processes and put together in
the order of the source, so the result depends on neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from heads_lightning.configs.data import DataConfig
from heads_lightning.configs.tokenizer import TokenizerConfig
from heads_lightning.data.shards import FORMAT, MANIFEST, Manifest, PreparedData, ShardWriter, SplitEntry, merged
from heads_lightning.data.sources import TRAIN, VALIDATION, Document, Source, place
from heads_lightning.data.tokenizer import Tokenizer
from heads_lightning.data.workers import run_jobs
from heads_lightning.registry import ConfigError

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total): stages `waiting`, `tokenizer` (if it is trained), `tokens` (parts) and `shards` (parts)."""

_TOKENIZER_SAMPLE_BYTES = 100_000_000
"""Text that a tokenizer is trained on, at most: parts spread evenly over the source. More changes 4k merges little and costs minutes."""
_NAMES_SHOWN = 3
_ASKED_FOR = _EMPTY, _SHORT, _LONG = "empty", "shorter than data.min_characters", "longer than data.max_characters"
"""Reasons to leave a document out that need no warning; they are counted in the manifest like the others."""


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def prepare(data: DataConfig, tokenizer: TokenizerConfig, *, progress: Progress | None = None) -> PreparedData:
    """The tokens of a source; made now unless they are there already.

    Args:
        data: the source, and where to keep its tokens.
        tokenizer: how to tokenise; trained on the training documents where it is of that kind.
        progress: called while something is done.

    Raises:
        ConfigError: nothing to read, nowhere to write, or what is there is damaged.
    """
    progress = progress or _silent
    if data.tokenized and tokenizer.trained:
        raise ConfigError(
            f"data={data.name} is token ids already, tokenizer={tokenizer.name} would be trained on text; "
            f"give the tokenizer that made them: tokenizer=huggingface tokenizer.path=FOLDER"
        )
    source = data.build_source()
    folder = prepared_folder(data, tokenizer, source)
    if folder.exists():
        return PreparedData(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, progress):
            if not folder.exists():  # another run may have made it while this one waited
                _Preparation(data, tokenizer, source, folder, progress).run()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={data.cache_dir}: {error.strerror or error} ({error.filename or folder}); "
            f"make room or choose another folder with data.cache_dir=FOLDER"
        ) from error
    return PreparedData(folder)


def prepared_folder(data: DataConfig, tokenizer: TokenizerConfig, source: Source) -> Path:
    """Where the tokens of these settings are kept, whether or not they are there."""
    made_from = [FORMAT, data.content(), tokenizer.identity(), source.fingerprint()]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    # from plain Python the interpolation of the command line is not resolved
    cache = Path(data.cache_dir.replace("${run_root}", "runs")).expanduser()
    return cache / f"{data.name}-{tokenizer.name}-{key}"


@contextlib.contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of a folder; a second run waits for the first and then finds its work done."""
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress("waiting", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# one part, in any process


@dataclass(frozen=True)
class _Setup:
    """What a process needs to tokenise parts; opened once in each process."""

    data: DataConfig
    work: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.work)

    @cached_property
    def source(self) -> Source:
        source = self.data.build_source()
        source.open(self.tokenizer.vocabulary.end_of_document)
        return source


def encode_part(setup: _Setup, job: tuple[int, Any]) -> int:
    """Tokenise one part and write its file; returns its number."""
    number, part = job
    documents, problems = [], []
    for document in setup.source.read(part):
        problem = document.problem or _unwanted(setup.data, document)
        (problems if problem else documents).append((document.name, problem) if problem else document)
    ids = _ids(setup.tokenizer, documents)
    raw = [d.text.encode("utf-8") if d.ids is None else d.ids.astype("<u4").tobytes() for d in documents]
    arrays = {
        "ids": np.concatenate(ids).astype(np.uint32) if ids else np.zeros(0, np.uint32),
        "lengths": np.array([len(i) for i in ids], np.int64),
        "bytes": np.array([len(r) if d.ids is None else _text_bytes(setup.tokenizer, d.ids) for d, r in zip(documents, raw, strict=True)]),
        "places": np.array([place(d.name) for d in documents], np.float64),
        "texts": np.array([hashlib.sha256(r).digest() for r in raw], "V32"),
        "names": np.array([hashlib.sha256(d.name.encode("utf-8", "surrogateescape")).digest() for d in documents], "V32"),
        "problems": np.frombuffer(json.dumps(problems).encode(), np.uint8),
    }
    _write_atomically(_part_file(setup.work, number), lambda file: np.savez(file, **arrays))
    return number


def _ids(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """Ids of each document: encoded, or as they came, if this tokenizer can have made them."""
    encoded = iter(tokenizer.encode_batch([d.text for d in documents if d.ids is None]))
    ids = [next(encoded) if d.ids is None else d.ids for d in documents]
    for document in documents:
        if document.ids is not None and len(document.ids) and not 0 <= document.ids.min() <= document.ids.max() < tokenizer.size:
            raise ConfigError(
                f"{document.name} holds id {document.ids.max()}, and the tokenizer has {tokenizer.size} entries; is it the one that the "
                f"file was made with, and is data.dtype right?"
            )
    return ids


def _text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of the text of some ids."""
    token_bytes = tokenizer.vocabulary.token_bytes
    return sum(count * len(token_bytes[token]) for token, count in enumerate(np.bincount(ids, minlength=1).tolist()) if count)


def _unwanted(data: DataConfig, document: Document) -> str:
    """Why a readable document is left out, or nothing."""
    if document.ids is not None:
        return "" if len(document.ids) else _EMPTY
    if not document.text.strip():
        return _EMPTY
    if len(document.text) < data.min_characters:
        return _SHORT
    if data.max_characters is not None and len(document.text) > data.max_characters:
        return _LONG
    return ""


def _part_file(work: Path, number: int) -> Path:
    return work / "parts" / f"{number:06d}.npz"


def _write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Under another name first: a file with the right name is whole."""
    temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# the whole


class _Preparation:
    """One preparation, from nothing or from where a killed one left off."""

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, source: Source, folder: Path, progress: Progress) -> None:
        self._data, self._tokenizer_config, self._source = data, tokenizer, source
        self._folder, self._progress = folder, progress
        self._work = folder.with_name(folder.name + ".partial")
        self._parts = source.parts()
        self._problems: Counter[str] = Counter()
        self._problem_names: list[str] = []
        self._duplicates = 0
        self._content = hashlib.sha256()
        self._lowest_place = 1.0

    def run(self) -> None:
        """Make the folder."""
        (self._work / "parts").mkdir(parents=True, exist_ok=True)
        tokenizer = self._tokenizer()
        self._encode_parts()
        out = self._work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        splits = self._assemble(out, tokenizer)
        self._report()
        self._check(splits)
        tokenizer.save(out)
        manifest = self._manifest(tokenizer, splits)
        _write_atomically(out / MANIFEST, lambda file: file.write(manifest.to_json().encode()))
        _sync_folder(out)
        os.rename(out, self._folder)
        _sync_folder(self._folder.parent)
        shutil.rmtree(self._work, ignore_errors=True)

    def _tokenizer(self) -> Tokenizer:
        done = self._work / "tokenizer.done"
        if not done.exists():
            progress = self._progress if self._tokenizer_config.trained else _silent
            progress("tokenizer", 0, 1)
            self._tokenizer_config.build(self._training_texts()).save(self._work)
            _write_atomically(done, lambda file: None)
            progress("tokenizer", 1, 1)
        return Tokenizer.load(self._work)

    def _training_texts(self) -> Iterator[str]:
        """Each distinct training document, of parts spread evenly if all are too many."""
        seen: set[bytes] = set()
        taken = 0
        for index in _spread(len(self._parts)):
            for document in self._source.read(self._parts[index]):
                held_out = place(document.name) < self._data.validation_fraction
                if held_out or document.problem or document.ids is not None or _unwanted(self._data, document):
                    continue
                digest = hashlib.sha256(document.text.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    taken += len(document.text)
                    yield document.text
            if taken > _TOKENIZER_SAMPLE_BYTES:
                return

    def _encode_parts(self) -> None:
        total = len(self._parts)
        jobs = [(i, part) for i, part in enumerate(self._parts) if not _part_file(self._work, i).exists()]
        done = total - len(jobs)
        self._progress("tokens", done, total)
        setup = _Setup(self._data, self._work)
        for _ in run_jobs(encode_part, setup, jobs, processes=self._data.prepare_processes or _processors()):
            done += 1
            self._progress("tokens", done, total)

    def _assemble(self, out: Path, tokenizer: Tokenizer) -> dict[str, SplitEntry]:
        dtype = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
        marker = tokenizer.vocabulary.end_of_document
        writers: dict[str, dict[str, ShardWriter]] = {}
        seen: set[bytes] = set()
        for number, listed in enumerate(self._parts):
            group = self._source.group_of(listed)
            if group not in writers:
                writers[group] = {
                    split: ShardWriter(out, split, group=group, end_of_document=marker, dtype=dtype) for split in (TRAIN, VALIDATION)
                }
            with np.load(_part_file(self._work, number), allow_pickle=False) as part:
                self._append(dict(part), writers[group], seen)
            self._progress("shards", number + 1, len(self._parts))
        return {split: merged([by_split[split].close() for by_split in writers.values()]) for split in (TRAIN, VALIDATION)}

    def _append(self, part: dict[str, np.ndarray], writers: dict[str, ShardWriter], seen: set[bytes]) -> None:
        for name, problem in json.loads(part["problems"].tobytes()):
            self._problems[problem] += 1
            if problem not in _ASKED_FOR:
                self._problem_names.append(f"{name} ({problem})")
        ends = np.cumsum(part["lengths"])
        for i, end in enumerate(ends.tolist()):
            text, stands = part["texts"][i].tobytes(), float(part["places"][i])
            if self._data.drop_duplicates and text in seen:
                self._duplicates += 1
                continue
            seen.add(text)
            self._content.update(part["names"][i].tobytes() + text)
            self._lowest_place = min(self._lowest_place, stands)
            split = VALIDATION if stands < self._data.validation_fraction else TRAIN
            writers[split].add(part["ids"][end - int(part["lengths"][i]) : end], int(part["bytes"][i]))

    def _report(self) -> None:
        """Say once what was left out, and name the first."""
        if self._problem_names:
            shown = ", ".join(self._problem_names[:_NAMES_SHOWN])
            more = f" and {len(self._problem_names) - _NAMES_SHOWN} more" if len(self._problem_names) > _NAMES_SHOWN else ""
            warnings.warn(f"data={self._data.name}: left out {len(self._problem_names)} documents: {shown}{more}", stacklevel=2)

    def _check(self, splits: dict[str, SplitEntry]) -> None:
        """Refuse what cannot be trained or validated on, with the value that works."""
        name, fraction = self._data.name, self._data.validation_fraction
        documents = sum(split.documents for split in splits.values())
        if documents == 0:
            left_out = ", ".join(f"{count} {problem}" for problem, count in self._problems.items()) or "none read"
            message = f"data={name} has no usable documents ({left_out})"
        elif documents == 1:
            message = f"data={name} has one document; it takes 2 or more, one of them to hold out: name a folder or patterns that find more"
        elif splits[VALIDATION].documents == 0:
            works = np.ceil((self._lowest_place + 1e-9) * 1000) / 1000
            message = (
                f"data.validation_fraction={fraction} holds out none of the {documents} documents of data={name}; "
                f"data.validation_fraction={works:g} does"
            )
        elif splits[TRAIN].documents == 0:
            message = f"data.validation_fraction={fraction} leaves none of the {documents} documents of data={name} to train on; lower it"
        else:
            return
        shutil.rmtree(self._work, ignore_errors=True)
        raise ConfigError(message)

    def _manifest(self, tokenizer: Tokenizer, splits: dict[str, SplitEntry]) -> Manifest:
        return Manifest(
            format=FORMAT,
            data=self._data.content(),
            tokenizer=asdict(self._tokenizer_config),
            source_fingerprint=self._source.fingerprint(),
            content_hash=self._content.hexdigest(),
            tokenizer_hash=tokenizer.fingerprint,
            dtype="<u2" if tokenizer.size <= 1 << 16 else "<u4",
            splits=splits,
            duplicates=self._duplicates,
            skipped=dict(self._problems),
            skipped_names=self._problem_names[:100],
            facts=self._source.facts(),
            python=sys.version.split()[0],
            packages={name: version(name) for name in ("numpy", "tokenizers")} | {"platform": platform.platform()},
        )


def _spread(count: int) -> list[int]:
    """0 … count-1 so that every beginning of the list is spread over the whole: bit-reversed, then the parts in order if there are few."""
    bits = max(count - 1, 1).bit_length()
    return [r for i in range(1 << bits) if (r := int(f"{i:0{bits}b}"[::-1], 2)) < count]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
