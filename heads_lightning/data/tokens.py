"""Files of token ids made by others: where one document ends and the next begins, and what the ids are.

Raw files (OLMo's `.npy`, which are none of numpy's, and nanoGPT's `.bin`) hold nothing but ids; numpy's own `.npy` and llm.c's `.bin` begin
with a header, which is recognised; beside Megatron's `.bin` lies an `.idx` with the documents' places. Elsewhere a separator id stands
between documents: it may end or begin each, and is replaced by the marker of our shards. Files are cut into parts without reading them: a
document belongs to the part in which it begins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heads_lightning.configs.data import TokensConfig
from heads_lightning.data.sources import Document, File, Source, listing_fingerprint, matching_files, root_folder
from heads_lightning.registry import ConfigError

PART_TOKENS = 1 << 23
"""Tokens of a part, about: a document that begins in it is read to its end."""
_LONGEST = 1 << 23
"""Tokens without a separator that are taken for a wrong separator rather than a document."""
_NUMPY = b"\x93NUMPY"
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_LLM_C = {20240520: np.uint16, 20240801: np.uint32}
"""First number of llm.c's header of 256 int32 (GPT-2 and Llama 3 files), and the type of the ids after it."""


class Stretch(NamedTuple):
    """Documents of a file that begin in [start, stop): positions of ids, or numbers of documents where an index lies beside it."""

    file: str
    start: int
    stop: int


class Tokens(Source):
    """Documents that are ids already.

    Args:
        config: the files, their type and their separator.
    """

    def __init__(self, config: TokensConfig) -> None:
        self.root = root_folder(config.root, group="data=tokens")
        self._config = config
        self._separator = config.separator

    @cached_property
    def _listing(self) -> list[File]:
        return matching_files(self.root, self._config.include, self._config.exclude, group="data=tokens")

    def fingerprint(self) -> str:
        return listing_fingerprint(self._listing, str(self._config.dtype), str(self._config.separator))

    def open(self, end_of_document: int) -> None:
        if self._config.separator is None:
            self._separator = end_of_document

    def parts(self) -> list[Stretch]:
        parts = []
        for file in self._listing:
            index = megatron_index(self.root / file.name)
            if index is None:
                size, step = len(open_ids(self.root / file.name, self._config.dtype)), PART_TOKENS
            else:
                size = len(index.documents) - 1
                step = max(PART_TOKENS * size // max(int(index.ends[-1]) if len(index.ends) else 1, 1), 1)
            parts += [Stretch(file.name, start, min(start + step, size)) for start in range(0, size, step)]
        return parts

    def read(self, part: Stretch) -> Iterator[Document]:
        path = self.root / part.file
        index = megatron_index(path)
        spans = self._spans(path, part) if index is None else index.spans(part.start, part.stop)
        ids = open_ids(path, self._config.dtype if index is None else str(np.dtype(index.dtype)))
        for start, end in spans:
            document = np.asarray(ids[start:end], np.int64)
            yield Document(f"{part.file}:{start}", "", ids=document[document != self._separator])

    def facts(self) -> dict[str, Any]:
        return {"files": len(self._listing)}

    def _spans(self, path: Path, part: Stretch) -> Iterator[tuple[int, int]]:
        """Places of the documents that begin in a stretch of a file with separators. A document begins at 0 and after every separator."""
        assert self._separator is not None
        ids = open_ids(path, self._config.dtype)
        at = np.flatnonzero(ids[max(part.start - 1, 0) : part.stop] == self._separator) + max(part.start - 1, 0)
        if not len(at) and part.stop - part.start >= _LONGEST:
            raise ConfigError(
                f"{path} has no separator {self._separator} in ids {part.start:,} to {part.stop:,}; "
                f"data.separator=ID names the one that stands between its documents, data.dtype its type"
            )
        begins = [*([0] if part.start == 0 else []), *(int(k) + 1 for k in at if part.start <= k + 1 < part.stop)]
        for number, start in enumerate(begins, start=1):
            end = begins[number] - 1 if number < len(begins) else self._end(ids, start)
            if end > start:
                yield start, end

    def _end(self, ids: np.ndarray, start: int) -> int:
        """Place of the first separator at or after `start`, or the end of the file."""
        for first in range(start, len(ids), PART_TOKENS):
            found = np.flatnonzero(ids[first : first + PART_TOKENS] == self._separator)
            if len(found):
                return first + int(found[0])
        return len(ids)


def open_ids(path: Path, dtype: str) -> np.ndarray:
    """The ids of a file, memory-mapped; `dtype` is that of files without a header."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith(_NUMPY):
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ConfigError(f"{path} is an array of {ids.dtype} with shape {ids.shape}; token ids are whole numbers in one row")
        return ids.view(np.ndarray)
    offset = 0
    if len(head) == 1024 and (magic := struct.unpack("<i", head[:4])[0]) in _LLM_C:
        offset, dtype = 1024, np.dtype(_LLM_C[magic]).name
    kind = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size - offset
    if size % kind.itemsize or size == 0:
        raise ConfigError(f"{path} has {size} bytes, which is no whole number of {dtype}; set data.dtype to the type of its ids")
    return np.memmap(path, kind, "r", offset=offset).view(np.ndarray)


class MegatronIndex(NamedTuple):
    """What Megatron's `.idx` says of the `.bin` beside it."""

    dtype: Any
    starts: np.ndarray
    """int64 [sequences]: position of the first id of each."""
    ends: np.ndarray
    documents: np.ndarray
    """int64 [documents + 1]: number of the first sequence of each document."""

    def spans(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Places of some documents."""
        for document in range(first, stop):
            a, b = int(self.documents[document]), int(self.documents[document + 1])
            if b > a:
                yield int(self.starts[a]), int(self.ends[b - 1])


def megatron_index(path: Path) -> MegatronIndex | None:
    """The index beside a `.bin`, or None when there is none (Megatron-core's IndexedDataset, version 1)."""
    beside = path.with_suffix(".idx")
    if path.suffix != ".bin" or not beside.is_file():
        return None
    raw = beside.read_bytes()
    if not raw.startswith(_MEGATRON):
        raise ConfigError(f"{beside} is no Megatron index (it does not begin with MMIDIDX); move it away to read {path.name} as raw ids")
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:34])
    if version != 1 or code not in _MEGATRON_TYPES:
        raise ConfigError(f"{beside} is a Megatron index of version {version} and type {code}; version 1 with a known type can be read")
    kind = np.dtype(_MEGATRON_TYPES[code])
    lengths = np.frombuffer(raw, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences) // kind.itemsize
    return MegatronIndex(kind, pointers, pointers + lengths, np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences))
