"""The ids of the two sides of a cut, encoded as if each stood alone, inside the few tokens that the cut changes: its cell.

The same few cells come up again and again, cut at the same places, so each is encoded once. What is looked up is not text but the ids of
the cell and where it is cut, a row of whole numbers: a batch's cuts are looked up together, and no text is put together for one that is
known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from heads_lightning.objectives.base import gather_ranges

_WIDTH = 8
"""Tokens of a cell that is known by its ids; a longer one (minified code, unspaced scripts) is known by its text."""
_LOCK = threading.Lock()
"""The thread that makes training's next step and a validation may encode at the same time."""


class Cuts(NamedTuple):
    """Cuts in a stream of tokens, each in its cell. Two cuts of a piece have cells that are apart or the same one."""

    left: np.ndarray
    """int64 [...]: the first token of the cell."""
    at: np.ndarray
    """int64 [...]: the token that the cut falls in, or before which it falls."""
    byte: np.ndarray
    """int64 [...]: bytes of that token before the cut, fewer than all."""
    right: np.ndarray
    """int64 [...]: the token after the cell; `left` where the cell is empty."""


class CellEncoder:
    """Encodes both sides of cuts, and remembers their ids.

    Args:
        token_bytes: UTF-8 bytes of each id.
        encode: ids of a text that stands alone.
        table_size: cuts that are remembered; a full table is emptied. Affects speed alone.
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
        """Whether a side that ends inside a character has ids: those of single bytes."""
        return all(bytes([byte]) in self._byte_ids for byte in range(128, 256))

    def encode(self, tokens: np.ndarray, cuts_2P: Cuts) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [4, P] lengths, int64 ids, one side after the other) of what is left and right of the first cut of P pieces, and of the
        second. Where one cell holds both cuts, what is right of the first ends at the second, and nothing is left of that."""
        with _LOCK:
            numbers = self._look_up(tokens, Cuts(*(column.reshape(-1) for column in cuts_2P)))
            found_22P2 = self._entries[numbers].reshape(2, -1, 2, 2).transpose(0, 2, 1, 3)  # cut, side, piece
            starts_4P, lengths_4P = np.ascontiguousarray(found_22P2.reshape(4, -1, 2).transpose(2, 0, 1))
            for piece in np.flatnonzero(cuts_2P.left[1] < cuts_2P.right[0]).tolist():
                ranges = self._three(tokens, Cuts(*(column[:, piece] for column in cuts_2P)))
                starts_4P[:, piece], lengths_4P[:, piece] = np.transpose(ranges)
            self._store()
            return lengths_4P, self._pool[gather_ranges(starts_4P.reshape(-1), lengths_4P.reshape(-1))]

    def _look_up(self, tokens: np.ndarray, cuts: Cuts) -> np.ndarray:
        """int64 [J]: numbers of the cuts' entries."""
        names = self._names(tokens, cuts)
        if len(self._known) + len(names) > self.table_size:
            self._clear()
        numbers = np.fromiter(map(self._known.__getitem__, names), np.int64, len(names))
        missing = np.flatnonzero(numbers < 0).tolist()
        if missing:
            new = [self._entry(names[j], *self._sides(tokens, *(int(column[j]) for column in cuts))) for j in missing]
            numbers[missing] = new
            self._store()
        return numbers

    def _names(self, tokens: np.ndarray, cuts: Cuts) -> list[bytes]:
        """What cuts are known by: equal only for those of the same text at the same place."""
        left, at, byte, right = cuts
        count, place = right - left, np.arange(_WIDTH)
        names = np.empty((len(left), _WIDTH + 2), np.int32)
        names[:, :_WIDTH] = np.where(place < count[:, None], tokens.take(left[:, None] + place, mode="clip"), -1)
        names[:, _WIDTH], names[:, _WIDTH + 1] = at - left, byte
        result = names.view(f"V{names.itemsize * names.shape[1]}").reshape(-1).tolist()
        for j in np.flatnonzero(count > _WIDTH).tolist():
            before, after = self._sides(tokens, *(int(column[j]) for column in cuts))
            result[j] = b"text%d " % len(before) + before + after  # which, read as a number, is beyond every id
        return result

    def _sides(self, tokens: np.ndarray, left: int, at: int, byte: int, right: int) -> tuple[bytes, bytes]:
        """Text of the cell before the cut, and after it."""
        text = b"".join([self._bytes[token] for token in tokens[left:right].tolist()])
        cut = sum(len(self._bytes[token]) for token in tokens[left:at].tolist()) + byte
        return text[:cut], text[cut:]

    def _three(self, tokens: np.ndarray, cuts: Cuts) -> list[tuple[int, int]]:
        """Ranges in the pool of what is left, between and right of two cuts in one cell: the third of four is empty."""
        (before, rest), (_, after) = (self._sides(tokens, *(int(column[k]) for column in cuts)) for k in range(2))
        return [self._ids(before), self._ids(rest[: len(rest) - len(after)]), (0, 0), self._ids(after)]

    def _clear(self) -> None:
        self._known = _Known()
        """Number of the entry, by name of the cut."""
        self._ranges: dict[bytes, tuple[int, int]] = {}
        """Where the ids of a text begin in the pool, and how many they are."""
        self._entries = np.zeros((0, 4), np.int64)
        """[entries, 4]: range of what is left of a cut, and of what is right of it."""
        self._pool = np.zeros(0, np.int64)
        self._pool_size = 0
        self._new_entries: list[tuple[int, int, int, int]] = []
        self._new_ids: list[int] = []
        """What is not stored in the tables yet."""

    def _entry(self, name: bytes, before: bytes, after: bytes) -> int:
        """Number of the cut's entry, which may have been made for the same cut earlier in this batch."""
        number = self._known[name]
        if number < 0:
            number = self._known[name] = len(self._known)
            self._new_entries.append((*self._ids(before), *self._ids(after)))
        return number

    def _ids(self, text: bytes) -> tuple[int, int]:
        """Range of a text's ids in the pool."""
        found = self._ranges.get(text)
        if found is None:
            ids = self._encode(text)
            found = self._ranges[text] = self._pool_size, len(ids)
            self._new_ids += ids
            self._pool_size += len(ids)
        return found

    def _store(self) -> None:
        """Move what is new to the tables."""
        if self._new_entries:
            self._entries = _put(self._entries, len(self._known) - len(self._new_entries), np.array(self._new_entries))
            self._new_entries = []
        if self._new_ids:
            self._pool = _put(self._pool, self._pool_size - len(self._new_ids), np.array(self._new_ids))
            self._new_ids = []

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
