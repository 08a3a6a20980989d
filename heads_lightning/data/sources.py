"""Where documents come from. A source lists its parts, cheaply, and reads one part at a time, in any process.

Choices. A document has a name that stays the same on every machine (its path below the root), and the name alone decides whether it is
for training or held out. What cannot be used is handed on as a problem and counted, never dropped in silence. A fingerprint looks at
names, sizes and times, not at contents: asking "has anything changed?" must cost milliseconds. Contents are hashed while preparing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heads_lightning.configs.data import FilesConfig, RepeatConfig, StdlibConfig
from heads_lightning.registry import ConfigError

TRAIN = "train"
VALIDATION = "validation"

_PART_BYTES = 1 << 20, 1 << 26
"""Least and most bytes of a part: large enough to amortise a job, small enough to hold in memory in every process."""
_PARTS = 512
"""Parts to aim for between those two bounds."""


class Document(NamedTuple):
    """A document, or the reason why there is none."""

    name: str
    """The same on every machine; decides the split."""
    text: str
    problem: str = ""
    """Why the document cannot be used (`not UTF-8`, …); its text is then empty."""
    ids: np.ndarray | None = None
    """Its tokens, where they are there already; its text is then empty."""


class Source(ABC):
    """Interface of every source of documents."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever the documents may have changed; milliseconds."""

    @abstractmethod
    def parts(self) -> list[Any]:
        """What `read` takes: picklable pieces of the source of some megabytes each, in the order of the documents."""

    @abstractmethod
    def read(self, part: Any) -> Iterator[Document]:
        """The documents of one part, in order."""

    def open(self, end_of_document: int) -> None:  # noqa: B027 (most sources need nothing)
        """Called before `read`, with the tokenizer's marker: what separates documents in files of ids."""

    def group_of(self, part: Any) -> str:
        """Name of the group of shards that the documents of a part go to: sources of a mixture are kept apart."""
        return ""

    def facts(self) -> dict[str, Any]:
        """What else to record in the manifest."""
        return {}


class Mixture(Source):
    """Several sources one after the other, their documents in groups of shards of their own.

    Args:
        sources: by name, which begins the names of their documents.
    """

    def __init__(self, sources: dict[str, Source]) -> None:
        self.sources = sources

    def open(self, end_of_document: int) -> None:
        for source in self.sources.values():
            source.open(end_of_document)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([[name, source.fingerprint()] for name, source in self.sources.items()]).encode()).hexdigest()

    def parts(self) -> list[tuple[str, Any]]:
        return [(name, part) for name, source in self.sources.items() for part in source.parts()]

    def read(self, part: tuple[str, Any]) -> Iterator[Document]:
        name, inner = part
        return (document._replace(name=f"{name}/{document.name}") for document in self.sources[name].read(inner))

    def group_of(self, part: tuple[str, Any]) -> str:
        return part[0]

    def facts(self) -> dict[str, Any]:
        return {name: source.facts() for name, source in self.sources.items()}


def place(name: str) -> float:
    """Where a document stands between 0 and 1, by the sha1 of its name: it is held out if that is below the validation fraction.

    A larger fraction therefore only adds documents to those held out. At 1/20 it agrees with `sha1 % 20 == 0`.
    """
    number = int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest(), 16)
    return (number % 20 + (number // 20 % 10**9) / 10**9) / 20


def split(name: str, validation_fraction: float) -> str:
    """`train` or `validation`: a document never changes side."""
    return VALIDATION if place(name) < validation_fraction else TRAIN


class Stdlib(Source):
    """Python's own standard library, cleaned: see `files` for what is left out and why.

    Args:
        config: whether to include the library's tests.
    """

    # encodings: 122 near-identical tables, with which a line look-up "infills" 14 % of held-out lines. The others are generated,
    # near-duplicates or not on every machine.
    _EXCLUDED = frozenset(
        ("encodings", "pydoc_data", "idlelib", "lib2to3", "turtledemo", "msilib", "site-packages", "dist-packages", "__pycache__")
    )

    def __init__(self, config: StdlibConfig) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self._excluded = self._EXCLUDED | (frozenset() if config.include_tests else {"test", "tests"})

    @cached_property
    def _listing(self) -> list[File]:
        found = _walk(
            self.root,
            keep_folder=lambda path: path.rsplit("/", 1)[-1] not in self._excluded,
            keep_file=lambda path: path.endswith(".py"),
        )
        if not (files := list(found)):
            raise ConfigError(f"data=stdlib found no .py files in {self.root} (a stripped Python); use data=files data.root=FOLDER")
        return files

    def fingerprint(self) -> str:
        return listing_fingerprint(self._listing, sys.version)

    def parts(self) -> list[list[str]]:
        return _group(self._listing)

    def read(self, part: list[str]) -> Iterator[Document]:
        return (_read_file(self.root, name) for name in part)

    def facts(self) -> dict[str, Any]:
        return {"python": sys.version.split()[0], "files": len(self._listing)}


class Files(Source):
    """Text files below a folder, chosen by glob patterns; one document a file.

    Args:
        config: the folder and the patterns.
    """

    def __init__(self, config: FilesConfig) -> None:
        self.root = root_folder(config.root, group="data=files")
        self._config = config

    @cached_property
    def _listing(self) -> list[File]:
        return matching_files(self.root, self._config.include, self._config.exclude, group="data=files")

    def fingerprint(self) -> str:
        return listing_fingerprint(self._listing)

    def parts(self) -> list[list[str]]:
        return _group(self._listing)

    def read(self, part: list[str]) -> Iterator[Document]:
        return (_read_file(self.root, name) for name in part)

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}


class Repeat(Source):
    """Synthetic documents of three lines, the last two the same: see the config for what they prove.

    Args:
        config: how many, how long, and their seed.
    """

    _DOCUMENTS_PER_PART = 10_000

    def __init__(self, config: RepeatConfig) -> None:
        self._config = config

    def fingerprint(self) -> str:
        c = self._config
        return hashlib.sha256(json.dumps(["three lines", c.num_documents, c.word_length, c.seed]).encode()).hexdigest()

    def parts(self) -> list[tuple[int, int]]:
        step, end = self._DOCUMENTS_PER_PART, self._config.num_documents
        return [(first, min(first + step, end)) for first in range(0, end, step)]

    def read(self, part: tuple[int, int]) -> Iterator[Document]:
        first, end = part
        rng = np.random.Generator(np.random.Philox(key=[self._config.seed, first]))
        letters = np.argsort(rng.random((end - first, 2, 26)), axis=2)[:, :, : self._config.word_length]
        for number, words in enumerate((letters + ord("a")).astype(np.uint8), start=first):
            before, repeated = (word.tobytes().decode("ascii") for word in words)
            yield Document(f"{number:08d}", f"{before}\n{repeated}\n{repeated}\n")


# files


class File(NamedTuple):
    """A file of a source."""

    name: str
    """Path below the root, with forward slashes."""
    size: int
    modified_ns: int


def _walk(root: Path, *, keep_folder: Callable[[str], object], keep_file: Callable[[str], object]) -> Iterator[File]:
    """Files below root in a fixed order; links to folders are not followed (they may form circles)."""
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else below + "/"
        folders[:] = sorted(f for f in folders if keep_folder(prefix + f))
        for name in sorted(name for name in names if keep_file(prefix + name)):
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:
                continue  # a dangling link
            yield File(prefix + name, status.st_size, status.st_mtime_ns)


def root_folder(root: str, *, group: str) -> Path:
    """The folder that patterns are relative to, or one line that says it is not there."""
    path = Path(root).expanduser()
    if not path.is_dir():
        raise ConfigError(f"data.root={root} is not a folder; {group} needs data.root=FOLDER")
    return path


def matching_files(root: Path, include: Iterable[str], exclude: Iterable[str], *, group: str) -> list[File]:
    """Files below root whose relative path matches a pattern of `include` and none of `exclude`, or one line that says there are none."""
    wanted, unwanted = _any_glob(include), _any_glob(exclude)
    files = list(
        _walk(
            root,
            keep_folder=lambda path: not unwanted.fullmatch(path + "/"),
            keep_file=lambda path: wanted.fullmatch(path) and not unwanted.fullmatch(path),
        )
    )
    if not files:
        patterns = ", ".join(include)
        raise ConfigError(
            f"{group}: no file below data.root={root} matches data.include=[{patterns}]; patterns are relative to the root, e.g. **/*.txt"
        )
    return files


def _any_glob(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(_glob(p) for p in patterns) or r"(?!)", re.DOTALL)


def _glob(pattern: str) -> str:
    """`**/` is any folders or none, `**` anything, `*` and `?` stop at slashes, `[…]` is a set."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meaning[p] if p in meaning else "[" + p[1:-1].replace("!", "^", 1).replace("\\", r"\\") + "]" if p.startswith("[") else re.escape(p)
        for p in pieces
    )


def listing_fingerprint(listing: list[File], *more: str) -> str:
    """Of names, sizes and times, and whatever else decides what is read."""
    return hashlib.sha256(json.dumps([*more, listing]).encode("utf-8", "surrogateescape")).hexdigest()


def part_bytes(total_bytes: int) -> int:
    """Bytes of a part of a source of this size."""
    return min(max(total_bytes // _PARTS, _PART_BYTES[0]), _PART_BYTES[1])


def _group(listing: list[File]) -> list[list[str]]:
    """Neighbouring files together, up to the size of a part."""
    limit = part_bytes(sum(file.size for file in listing))
    parts: list[list[str]] = [[]]
    filled = 0
    for file in listing:
        if parts[-1] and filled + file.size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(file.name)
        filled += file.size
    return parts


def _read_file(root: Path, name: str) -> Document:
    try:
        return Document(name, (root / name).read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return Document(name, "", "not UTF-8")
    except OSError as error:
        return Document(name, "", f"unreadable: {error.strerror}")
