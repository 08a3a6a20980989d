"""The ids of slices of text: parts of tokens that a cut has taken out of their context, encoded as if they stood alone.

The same few slices come up again and again, so each is encoded once. What is looked up is not text but the ids that a slice lies in and
where it begins and ends inside them, a row of whole numbers: a batch's slices are looked up together, and no text is put together for one
that is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from heads_lightning.objectives.base import gather_ranges

_WIDTH = 8
"""Tokens of a slice that is known by its ids; a longer one (minified code, unspaced scripts) is known by its text."""
_LOCK = threading.Lock()
"""The thread that makes training's next step and a validation may encode at the same time."""


class Slices(NamedTuple):
    """J slices of a stream of tokens, each from byte `skip` of token `first` to before byte `stop` of token `last`."""

    first: np.ndarray
    """int [J]."""
    skip: np.ndarray
    """int [J], below the token's length."""
    last: np.ndarray
    """int [J], not below `first`."""
    stop: np.ndarray
    """int [J], below the token's length: 0 leaves the token `last` out."""


class SliceEncoder:
    """Encodes slices, and remembers their ids.

    Args:
        token_bytes: UTF-8 bytes of each id.
        encode: ids of a text that stands alone.
        table_size: slices that are remembered; a full table is emptied. Affects speed alone.
    """

    def __init__(self, token_bytes: Sequence[bytes], encode: Callable[[str], list[int]], table_size: int = 1 << 18) -> None:
        self._bytes, self._encode_text = token_bytes, encode
        self._byte_ids = {text: token for token, text in enumerate(token_bytes) if len(text) == 1}
        self.table_size = table_size
        self._clear()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def knows_all_bytes(self) -> bool:
        """Whether a slice that ends inside a character has ids: those of single bytes."""
        return all(bytes([byte]) in self._byte_ids for byte in range(128, 256))

    def encode(self, tokens: np.ndarray, slices: Slices) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [J] lengths, int64 ids of all slices, one after the other) of slices of the stream `tokens`."""
        with _LOCK:
            numbers = self._look_up(tokens, slices)  # which may replace the tables
            found_J2 = self._entries[numbers]
            lengths = found_J2[:, 1]
            return lengths, self._pool[gather_ranges(found_J2[:, 0], lengths)]

    def _look_up(self, tokens: np.ndarray, slices: Slices) -> np.ndarray:
        """int64 [J]: numbers of the slices' entries."""
        names = self._names(tokens, slices)
        if len(self._known) + len(names) > self.table_size:
            self._clear()
        numbers = np.fromiter(map(self._known.__getitem__, names), np.int64, len(names))
        missing = np.flatnonzero(numbers < 0)
        if len(missing):
            texts = self._texts(tokens, Slices(*(column[missing] for column in slices)))
            new = [self._entry(text) for text in texts]
            self._known.update(zip([names[j] for j in missing.tolist()], new, strict=True))
            numbers[missing] = new
            self._store()
        return numbers

    def _names(self, tokens: np.ndarray, slices: Slices) -> list[bytes]:
        """What the slices are known by: equal only for slices of the same text."""
        first, skip, last, stop = slices
        count = last - first + (stop > 0)
        place = np.arange(_WIDTH)
        names = np.empty((len(first), _WIDTH + 2), np.int32)
        names[:, :_WIDTH] = np.where(place < count[:, None], tokens.take(first[:, None] + place, mode="clip"), -1)
        names[:, _WIDTH], names[:, _WIDTH + 1] = skip, stop
        result = names.view(f"V{names.itemsize * names.shape[1]}").reshape(-1).tolist()
        long = np.flatnonzero(count > _WIDTH)
        if len(long):
            for j, text in zip(long.tolist(), self._texts(tokens, Slices(*(column[long] for column in slices))), strict=True):
                result[j] = b"text" + text  # which, read as a number, is beyond every id
        return result

    def _texts(self, tokens: np.ndarray, slices: Slices) -> list[bytes]:
        texts = []
        for first, skip, last, stop in zip(*(column.tolist() for column in slices), strict=True):
            text = b"".join([self._bytes[token] for token in tokens[first:last].tolist()])
            if stop:
                text += self._bytes[int(tokens[last])][:stop]
            texts.append(text[skip:])
        return texts

    def _clear(self) -> None:
        self._known = _Known()
        """Number of the entry, by name of the slice."""
        self._number: dict[bytes, int] = {}
        """Number of the entry, by text."""
        self._entries = np.zeros((0, 2), np.int64)
        """[entries, 2]: where the ids of a text begin in the pool, and how many they are."""
        self._pool = np.zeros(0, np.int64)
        self._new: list[list[int]] = []
        """Ids of the entries that are not stored yet."""

    def _entry(self, text: bytes) -> int:
        number = self._number.get(text)
        if number is None:
            self._new.append(self._encode(text))
            number = self._number[text] = len(self._number)
        return number

    def _store(self) -> None:
        """Move the ids of new entries to the tables."""
        if self._new:
            stored = len(self._number) - len(self._new)
            lengths = np.array([len(ids) for ids in self._new])
            ids = np.array([i for ids in self._new for i in ids], np.int64)
            end = int(self._entries[stored - 1].sum()) if stored else 0
            self._entries = _put(self._entries, stored, np.stack([end + np.cumsum(lengths) - lengths, lengths], axis=1))
            self._pool = _put(self._pool, end, ids)
            self._new = []

    def _encode(self, text: bytes) -> list[int]:
        """Ids of a text; of bytes that are no whole characters (at a window's edge), those of single bytes."""
        try:
            return self._encode_text(text.decode())
        except UnicodeDecodeError:
            pass
        head = 0
        while head < len(text) and text[head] & 0xC0 == 0x80:
            head += 1
        tail = len(text)
        try:
            body = text[head:].decode()
        except UnicodeDecodeError as error:
            tail = head + error.start
            body = text[head:tail].decode()
        return [*self._single_bytes(text[:head]), *self._encode_text(body), *self._single_bytes(text[tail:])]

    def _single_bytes(self, text: bytes) -> list[int]:
        return [self._byte_ids[text[k : k + 1]] for k in range(len(text))]


class _Known(dict[bytes, int]):
    """-1 for what is not in it."""

    def __missing__(self, name: bytes) -> int:
        return -1


def _put(array: np.ndarray, at: int, values: np.ndarray) -> np.ndarray:
    """`array` with `values` from `at` on; made longer, at least twice, when it is too short."""
    if at + len(values) > len(array):
        array = np.concatenate([array[:at], np.zeros((at + 2 * len(values) + 1024, *array.shape[1:]), array.dtype)])
    array[at : at + len(values)] = values
    return array
