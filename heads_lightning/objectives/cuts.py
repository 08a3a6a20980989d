"""Where a piece of text is cut in three, and the ids of the three parts.

Cutting between tokens is arithmetic. Cutting between characters changes ids near the cut, because the two sides are tokenised as if
each stood alone. Tokenising whole parts again would cost a thousand times the rest; here only the *cell* around a cut is encoded:
the tokens between the last place before the cut and the first place after it where every common pre-tokenizer splits text whatever
the context (a letter or digit before white space, a letter before punctuation, …, see `_SAFE`). Encoding is independent on the two
sides of such a place, so the ids equal those of encoding each part in full; a test shows it on thousands of cuts, and `CharCutter`
probes it for the tokenizer at hand. Cells repeat, so their parts are kept in a table.

Positions are flat indices into the tokens of a batch. The ids of a part are three ranges of at most: stream, encoded, stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from heads_lightning.objectives.base import Vocabulary, gather_ranges
from heads_lightning.registry import ConfigError


class Parts(NamedTuple):
    """Ids of prefix, middle and suffix of P pieces, as ranges of `concatenate([tokens, extra])`."""

    starts_P7: np.ndarray
    """int64 [P, 7]: prefix 2 ranges (stream, extra), middle 3 (extra, stream, extra), suffix 2 (extra, stream)."""
    lengths_P7: np.ndarray
    extra: np.ndarray
    """Ids that are not in the stream: what was encoded anew."""


class Cutter(ABC):
    """Cuts pieces in three at two places, each uniform over all places of a piece, both ends included."""

    spare: int = 0
    """Positions that re-tokenisation usually adds to a piece."""

    @abstractmethod
    def cut(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        """The three parts of the pieces tokens[start:end], none of them empty.

        Args:
            tokens: flat ids.
            starts, ends: int64 [P].
            draws_P2: float64 [P, 2], uniform in [0, 1): where to cut, in any order.
        """


class TokenCutter(Cutter):
    """Cuts between tokens."""

    def cut(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        at_P2 = starts[:, None] + (draws_P2 * (ends - starts + 1)[:, None]).astype(np.int64)
        at_P2.sort(axis=1)
        return _ranges(starts, ends, at_P2, at_P2, np.zeros((len(starts), 4, 2), np.int64), tokens[:0])


def _ranges(
    starts: np.ndarray, ends: np.ndarray, left_P2: np.ndarray, right_P2: np.ndarray, encoded_P42: np.ndarray, extra: np.ndarray
) -> Parts:
    """Parts from what each cut keeps: the stream up to left and from right on, and four encoded ranges (start, length) between."""
    zero = np.zeros_like(starts)
    middle = np.maximum(left_P2[:, 1] - right_P2[:, 0], 0)
    (pre, pre_n), (mid_a, mid_a_n), (mid_b, mid_b_n), (suf, suf_n) = ((encoded_P42[:, k, 0], encoded_P42[:, k, 1]) for k in range(4))
    return Parts(
        np.stack([starts, pre, mid_a, right_P2[:, 0], mid_b, suf, right_P2[:, 1]], axis=1),
        np.stack([left_P2[:, 0] - starts, pre_n, mid_a_n, middle + zero, mid_b_n, suf_n, ends - right_P2[:, 1]], axis=1),
        extra,
    )


_REACH = 10
"""Tokens looked at on each side of a cut at once; longer cells (minified code, unspaced scripts) are found one by one."""

_LETTER, _DIGIT, _MARK, _SPACE, _NEWLINE, _SPECIAL, _ANY = (1 << k for k in range(7))
_SAFE = {
    # What may begin after a token that ends in …, so that a pre-token boundary lies between. The expressions of GPT-2, GPT-4 (cl100k,
    # o200k), Llama 3, Qwen and DeepSeek agree on these. Left out, since they do not: an apostrophe (contractions), punctuation before
    # letters (` ?\p{P}\p{L}+`) and before line ends (`\p{P}+[\r\n]*`), anything that is not ASCII.
    _LETTER: _DIGIT | _MARK | _SPACE | _NEWLINE,
    _DIGIT: _LETTER | _MARK | _SPACE | _NEWLINE,
    _MARK: _DIGIT | _SPACE,
}


def _kind(byte: int) -> int:
    """Class of one byte of text; 0 for what nothing is known about."""
    char = chr(byte)
    if byte >= 128 or (byte < 32 and char not in "\t\n\r"):
        return 0
    if char.isalpha():
        return _LETTER
    if char.isdigit():
        return _DIGIT
    return {" ": _SPACE, "\t": _SPACE, "\n": _NEWLINE, "\r": _NEWLINE, "'": 0, "\x7f": 0}.get(char, _MARK)


class CharCutter(Cutter):
    """Cuts between characters (code points), never inside one.

    A window may begin or end inside a character: those bytes keep single-byte tokens, since they are no text to encode.
    """

    spare = 4
    table_size = 1 << 17
    """Entries of the tables of encoded cells and texts; a full table is emptied. Affects speed alone."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes = [*vocabulary.token_bytes] + [b""] * (vocabulary.size - len(vocabulary.token_bytes))
        self._encode_text = vocabulary.encode
        self._byte_ids = {text: token for token, text in enumerate(self._bytes) if len(text) == 1}
        if not all(bytes([b]) in self._byte_ids for b in range(128, 256)):
            raise ConfigError("objective.cut=char needs a byte-level tokenizer (a token for each byte); use objective.cut=token")
        self._single = max(map(len, self._bytes)) <= 1  # nothing is ever merged: a cut changes no ids
        self._byte_tables()
        self._clear()

    def _byte_tables(self) -> None:
        leads = [[k for k, byte in enumerate(text) if byte & 0xC0 != 0x80] for text in self._bytes]
        self._chars_V = np.array([len(x) for x in leads], np.int32)
        self._lead = np.array([k for x in leads for k in x], np.int64)
        self._lead_start_V = np.cumsum(self._chars_V, dtype=np.int64) - self._chars_V
        self._begin_V = np.array([(_kind(text[0]) if text else _SPECIAL) | _ANY for text in self._bytes], np.uint8)
        self._end_V = np.array([(_SAFE.get(_kind(text[-1]), 0) if text else _ANY) | _SPECIAL for text in self._bytes], np.uint8)

    def cut(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        at_P2, byte_P2 = self._places(tokens, starts, ends, draws_P2)
        if self._single:
            return _ranges(starts, ends, at_P2, at_P2, np.zeros((len(starts), 4, 2), np.int64), tokens[:0])
        left_P2, right_P2, near = self._find_cells(tokens, starts, ends, at_P2, byte_P2)
        encoded_P42, extra = self._encode_cells(tokens, at_P2, byte_P2, left_P2, right_P2, near)
        return _ranges(starts, ends, left_P2, right_P2, encoded_P42, extra)

    def _places(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two places a piece, in order: the token that each falls in (or the piece's end), and before which byte of it."""
        chars = self._chars_V[tokens]
        count = np.cumsum(chars, dtype=np.int64)
        before = count[starts] - chars[starts]
        places_P2 = (draws_P2 * (count[ends - 1] - before + 1)[:, None]).astype(np.int64)
        places_P2.sort(axis=1)
        places_P2 += before[:, None]
        at_P2 = np.minimum(np.searchsorted(count, places_P2, side="right"), ends[:, None])
        inside = at_P2 < ends[:, None]
        token_P2 = np.where(inside, at_P2, 0)
        nth = self._lead_start_V[tokens[token_P2]] + places_P2 - (count[token_P2] - chars[token_P2])
        return at_P2, np.where(inside, self._lead[np.where(inside, nth, 0)], 0)

    def _find_cells(
        self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, at_P2: np.ndarray, byte_P2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cell [left, right) of each cut, empty where the cut falls between cells; and the tokens around it, int [P, 2, 2 reach]."""
        around = at_P2[..., None] + np.arange(-_REACH, _REACH)
        near = tokens[np.clip(around, 0, len(tokens) - 1)]
        safe = (self._end_V[near[..., :-1]] & self._begin_V[near[..., 1:]]) != 0
        border = around[..., 1:]  # safe[…, k] is about the place before the token at border[…, k]
        safe |= (border <= starts[:, None, None]) | (border >= ends[:, None, None])
        before, after = safe[..., _REACH - 1 :: -1], safe[..., _REACH:]
        left_P2, right_P2 = at_P2 - before.argmax(axis=2), at_P2 + 1 + after.argmax(axis=2)
        between = (byte_P2 == 0) & before[..., 0]
        right_P2[between] = at_P2[between]
        for piece, k in zip(*np.nonzero(~(before.any(axis=2) & after.any(axis=2)) & ~between), strict=True):
            left_P2[piece, k], right_P2[piece, k] = self._find_long_cell(tokens, starts[piece], ends[piece], at_P2[piece, k])
        return left_P2, right_P2, near

    def _find_long_cell(self, tokens: np.ndarray, start: int, end: int, at: int) -> tuple[int, int]:
        left, right = at, at + 1
        while left > start and not self._end_V[tokens[left - 1]] & self._begin_V[tokens[left]]:
            left -= 1
        while right < end and not self._end_V[tokens[right - 1]] & self._begin_V[tokens[right]]:
            right += 1
        return left, right

    def _encode_cells(
        self, tokens: np.ndarray, at_P2: np.ndarray, byte_P2: np.ndarray, left_P2: np.ndarray, right_P2: np.ndarray, near: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the parts of every cell: ranges [P, 4, 2] as _ranges wants them, and the ids that they point into."""
        full_P2 = right_P2 > left_P2
        both_P = full_P2.all(axis=1) & (left_P2[:, 0] == left_P2[:, 1])  # one cell holds both cuts: cells are the same or apart
        full_P2[:, 1] &= ~both_P
        piece, k = np.nonzero(full_P2)
        jobs = _Jobs(*(x[piece, k] for x in (left_P2, right_P2, at_P2, byte_P2)), np.full(len(piece), -1), np.full(len(piece), -1))
        both = both_P[piece]
        jobs.at2[both], jobs.byte2[both] = at_P2[piece[both], 1], byte_P2[piece[both], 1]
        found_J32 = self._look_up(tokens, jobs, near[piece, k])
        ranges_P42 = np.zeros((len(at_P2), 4, 2), np.int64)
        ranges_P42[piece, 2 * k], ranges_P42[piece, 2 * k + 1] = found_J32[:, 0], found_J32[:, 1]
        ranges_P42[piece[both], 3] = found_J32[both, 2]
        lengths = ranges_P42[..., 1].reshape(-1)
        extra = self._pool[gather_ranges(ranges_P42[..., 0].reshape(-1), lengths)].astype(tokens.dtype)
        ranges_P42[..., 0] = (len(tokens) + np.cumsum(lengths) - lengths).reshape(-1, 4)
        return ranges_P42, extra

    def _look_up(self, tokens: np.ndarray, jobs: _Jobs, near_J: np.ndarray) -> np.ndarray:
        """Ranges of the pool [J, 3, 2]: the ids left of the (first) cut of each cell, right of it, and right of a second cut."""
        if len(self._cells) + len(jobs.at) > self.table_size or len(self._texts) > self.table_size:
            self._clear()
        position = jobs.at[:, None] + np.arange(-_REACH, _REACH)
        key = np.empty((len(jobs.at), 2 * _REACH + 3), np.int32)
        key[:, :-3] = np.where((position >= jobs.left[:, None]) & (position < jobs.right[:, None]), near_J, -1)
        key[:, -3], key[:, -2], key[:, -1] = jobs.byte, np.where(jobs.at2 < 0, -1, jobs.at2 - jobs.at), jobs.byte2
        long = (jobs.left < jobs.at - _REACH) | (jobs.right > jobs.at + _REACH)
        key[long, 0], key[long, 1] = -2, np.flatnonzero(long)  # the key holds too little of it: never shared
        packed, width, get = key.tobytes(), key.shape[1] * 4, self._cells.get
        entries = [get(packed[i : i + width], -1) for i in range(0, len(packed), width)]
        for j, entry in enumerate(entries):
            if entry < 0:
                name = packed[j * width : (j + 1) * width]
                entries[j] = self._cells.get(name, -1)
                if entries[j] < 0:
                    entries[j] = self._encode_cell(tokens, jobs, j)
                    if not long[j]:
                        self._cells[name] = entries[j]
        return self._entries[entries]

    def _clear(self) -> None:
        self._texts: dict[bytes, list[int]] = {}
        self._cells: dict[bytes, int] = {}
        self._entries = np.zeros((1024, 3, 2), np.int64)
        self._pool = np.zeros(8192, np.int64)
        self._num_entries = self._num_pool = 0

    def _encode_cell(self, tokens: np.ndarray, jobs: _Jobs, j: int) -> int:
        """Encode the parts of a cell; the number of its new entry."""
        left, right, at, at2 = int(jobs.left[j]), int(jobs.right[j]), int(jobs.at[j]), int(jobs.at2[j])
        texts = [self._bytes[token] for token in tokens[left:right].tolist()]
        text = b"".join(texts)
        cuts = [0, sum(map(len, texts[: at - left])) + int(jobs.byte[j])]
        if at2 >= 0:
            cuts.append(sum(map(len, texts[: at2 - left])) + int(jobs.byte2[j]))
        entry = self._num_entries
        self._num_entries += 1
        if entry == len(self._entries):
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        for part, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(text)], strict=True)):
            ids = self._encode(text[start:end])
            while self._num_pool + len(ids) > len(self._pool):
                self._pool = np.concatenate([self._pool, np.zeros_like(self._pool)])
            self._pool[self._num_pool : self._num_pool + len(ids)] = ids
            self._entries[entry, part] = self._num_pool, len(ids)
            self._num_pool += len(ids)
        return entry

    def _encode(self, text: bytes) -> list[int]:
        """Ids of a text; of bytes that are no whole characters (at a window's edge), those of single bytes."""
        ids = self._texts.get(text)
        if ids is None:
            head = 0
            while head < len(text) and text[head] & 0xC0 == 0x80:
                head += 1
            tail = len(text)
            try:
                body = text[head:].decode()
            except UnicodeDecodeError as error:
                tail = head + error.start
                body = text[head:tail].decode()
            ids = self._texts[text] = [*self._single_bytes(text[:head]), *self._encode_text(body), *self._single_bytes(text[tail:])]
        return ids

    def _single_bytes(self, text: bytes) -> list[int]:
        return [self._byte_ids[text[k : k + 1]] for k in range(len(text))]


class _Jobs(NamedTuple):
    """Cells to look up: the cell, the cut in it, and a second cut (−1: none)."""

    left: np.ndarray
    right: np.ndarray
    at: np.ndarray
    byte: np.ndarray
    at2: np.ndarray
    byte2: np.ndarray
