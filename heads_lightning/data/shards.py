"""Prepared tokens on disk, memory-mapped.

A folder of prepared data holds

    manifest.json            what is in the folder, with sizes and hashes: written last, so that a folder with a manifest is whole
    tokenizer.json           the tokenizer, and tokenizer_config.json the roles of its special tokens
    train-00000.bin …        token ids, little-endian uint16 (uint32 where the vocabulary has more than 65,536 entries), no header
    train-00000.offsets.npy  int64 [documents + 1]: position of the marker before each document, and of the one at the end
    validation-00000.bin …   the same for documents held out

The stream of a shard: every document is **preceded** by the end-of-document id, and the shard ends with one. A marker thus opens each
document and is predicted at the end of each. A document is never split over shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from heads_lightning.data.sources import TRAIN, VALIDATION
from heads_lightning.data.tokenizer import Tokenizer, saved_fingerprint
from heads_lightning.objectives.base import Vocabulary
from heads_lightning.registry import ConfigError

FORMAT = 1
"""Version of all that is described above; prepared data of another version is prepared again."""
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 27
"""Tokens after which a shard is closed."""


@dataclass
class ShardEntry:
    """A shard in the manifest."""

    file: str
    documents: int
    stream_tokens: int
    """Ids in the file, markers included."""
    sha256: str
    offsets_sha256: str
    group: str = ""
    """Source of a mixture that its documents come from."""


@dataclass
class SplitEntry:
    """A split in the manifest."""

    documents: int = 0
    tokens: int = 0
    """Of the documents; markers are not counted."""
    bytes: int = 0
    """Of the documents' UTF-8 text: the denominator of bits per byte."""
    shards: list[ShardEntry] = field(default_factory=list)


@dataclass
class Manifest:
    """What is in a folder of prepared data."""

    format: int
    data: dict[str, Any]
    """The config of the source."""
    tokenizer: dict[str, Any]
    """The config of the tokenizer."""
    source_fingerprint: str
    content_hash: str
    """sha256 over names and texts of the documents that were kept."""
    tokenizer_hash: str
    dtype: str
    splits: dict[str, SplitEntry]
    duplicates: int
    skipped: dict[str, int]
    """Documents that could not be used, by reason."""
    skipped_names: list[str]
    """The first of them."""
    facts: dict[str, Any]
    """What the source says of itself."""
    python: str
    packages: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a folder, or one line that says what is wrong with it."""
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            splits = {k: SplitEntry(**(v | {"shards": [ShardEntry(**s) for s in v["shards"]]})) for k, v in raw["splits"].items()}
            return cls(**(raw | {"splits": splits}))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise damaged(path, f"cannot be read ({type(error).__name__})", folder) from None

    def to_json(self) -> str:
        """As written to the folder."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def damaged(file: Path, what: str, folder: Path) -> ConfigError:
    """The one line about a damaged file."""
    return ConfigError(f"{file} {what}; delete the folder {folder} and it will be prepared again")


class ShardWriter:
    """Writes the documents of one split, opening a new shard whenever one is full.

    Args:
        folder: of the prepared data.
        split: name of the split.
        group: source of a mixture that its documents come from; part of the files' names.
        end_of_document: id of the marker.
        dtype: of the file.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        end_of_document: int,
        dtype: np.dtype[Any],
        group: str = "",
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.entry = SplitEntry()
        self._folder, self._group, self._shard_tokens = folder, group, shard_tokens
        self._name = f"{split}-{group}" if group else split
        self._marker = np.array([end_of_document], dtype)
        self._file: IO[bytes] | None = None
        self._offsets: list[int] = []
        self._position = 0
        self._hash = hashlib.sha256()

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Append a document."""
        if self._file is not None and self._position + len(ids) + 2 > self._shard_tokens:
            self._close_shard()
        if self._file is None:
            self._file = open(self._path(".bin"), "wb", buffering=1 << 20)  # noqa: SIM115 (closed in _close_shard)
            self._offsets, self._position, self._hash = [], 0, hashlib.sha256()
        self._offsets.append(self._position)
        self._write(np.concatenate([self._marker, ids.astype(self._marker.dtype)]))
        self.entry.documents += 1
        self.entry.tokens += len(ids)
        self.entry.bytes += num_bytes

    def close(self) -> SplitEntry:
        """Finish the last shard; everything is on the disk when this returns."""
        if self._file is not None:
            self._close_shard()
        return self.entry

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._name}-{len(self.entry.shards):05d}{suffix}"

    def _write(self, ids: np.ndarray) -> None:
        assert self._file is not None
        raw = ids.tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self._position += len(ids)

    def _close_shard(self) -> None:
        assert self._file is not None
        self._offsets.append(self._position)
        self._write(self._marker)
        sync_and_close(self._file)
        self._file = None
        offsets = self._path(".offsets.npy")
        with open(offsets, "wb") as file:
            np.save(file, np.array(self._offsets, "<i8"))
            file.flush()
            os.fsync(file.fileno())
        shard = ShardEntry(
            file=self._path(".bin").name,
            documents=len(self._offsets) - 1,
            stream_tokens=self._position,
            sha256=self._hash.hexdigest(),
            offsets_sha256=hash_file(offsets),
            group=self._group,
        )
        self.entry.shards.append(shard)


def merged(entries: Sequence[SplitEntry]) -> SplitEntry:
    """One split of the shards of several writers."""
    total = SplitEntry()
    for entry in entries:
        total.documents += entry.documents
        total.tokens += entry.tokens
        total.bytes += entry.bytes
        total.shards += entry.shards
    return total


def sync_and_close(file: IO[bytes]) -> None:
    """Flush to the disk, then close."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard, memory-mapped: nothing is read before it is used."""

    tokens: np.ndarray
    """uint16 or uint32 [stream tokens], read-only."""
    offsets: np.ndarray
    """int64 [documents + 1]: positions of the markers."""
    group: str = ""
    """Source of a mixture that its documents come from."""

    def document(self, index: int) -> np.ndarray:
        """Ids of a document, without its marker."""
        return self.tokens[self.offsets[index] + 1 : self.offsets[index + 1]]


@dataclass(frozen=True)
class Split:
    """The documents of one side."""

    name: str
    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


class PreparedData:
    """A folder of prepared data, checked against its manifest when opened (sizes; `verify` reads everything).

    Args:
        folder: as returned by `prepare`.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.format != FORMAT:
            raise damaged(self.folder / MANIFEST, f"has format {self.manifest.format}, this version reads {FORMAT}", self.folder)
        for shard in self._entries():
            self._check_size(self.folder / shard.file, shard.stream_tokens * self._dtype.itemsize)
        try:
            tokenizer_hash = saved_fingerprint(self.folder)
        except (OSError, ValueError, KeyError, TypeError):
            tokenizer_hash = ""
        if tokenizer_hash != self.manifest.tokenizer_hash:
            raise damaged(self.folder / "tokenizer.json", "is not the tokenizer that these shards were made with", self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with."""
        return Tokenizer.load(self.folder)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer."""
        return self.tokenizer.vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same tokens in the same order, on any machine."""
        hashes = [s.sha256 for s in self._entries()]
        return hashlib.sha256(json.dumps([FORMAT, self.manifest.tokenizer_hash, hashes]).encode()).hexdigest()

    @cached_property
    def train(self) -> Split:
        """Documents to train on."""
        return self._split(TRAIN)

    @cached_property
    def validation(self) -> Split:
        """Documents held out."""
        return self._split(VALIDATION)

    def documents(self, split: str) -> Iterator[np.ndarray]:
        """Ids of each document of `train` or `validation`, in order."""
        for shard in getattr(self, split).shards:
            for index in range(len(shard.offsets) - 1):
                yield shard.document(index)

    def texts(self, split: str) -> Iterator[str]:
        """Text of each document."""
        return (self.tokenizer.decode(ids) for ids in self.documents(split))

    def verify(self) -> None:
        """Read every shard and compare its hash: seconds per gigabyte."""
        for shard in self._entries():
            for path, expected in ((shard.file, shard.sha256), (_offsets_name(shard.file), shard.offsets_sha256)):
                if hash_file(self.folder / path) != expected:
                    raise damaged(self.folder / path, "does not have the contents that its manifest records", self.folder)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest.dtype)

    def _entries(self) -> Iterator[ShardEntry]:
        for split in self.manifest.splits.values():
            yield from split.shards

    def _check_size(self, path: Path, expected: int) -> None:
        size = path.stat().st_size if path.is_file() else None
        if size != expected:
            what = "is missing" if size is None else f"is damaged: {size:,} bytes instead of {expected:,}"
            raise damaged(path, what, self.folder)

    def _split(self, name: str) -> Split:
        entry = self.manifest.splits[name]
        shards = tuple(self._open(shard) for shard in entry.shards)
        return Split(name, entry.documents, entry.tokens, entry.bytes, shards)

    def _open(self, shard: ShardEntry) -> Shard:
        path = self.folder / _offsets_name(shard.file)
        try:
            offsets = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError, EOFError):
            raise damaged(path, "cannot be read", self.folder) from None
        if len(offsets) != shard.documents + 1:
            raise damaged(path, f"has {len(offsets)} offsets instead of {shard.documents + 1}", self.folder)
        # a plain view: every slice of an np.memmap runs Python code
        tokens = np.memmap(self.folder / shard.file, self._dtype, "r").view(np.ndarray)
        return Shard(tokens, offsets, shard.group)


def _offsets_name(shard_file: str) -> str:
    return shard_file.removesuffix(".bin") + ".offsets.npy"
