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
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from heads_lightning.objectives.base import Vocabulary, gather_ranges
from heads_lightning.objectives.syntax import SyntaxPlaces
from heads_lightning.registry import ConfigError


class Parts(NamedTuple):
    """Ids of prefix, middle and suffix of P pieces, as ranges of `concatenate([tokens, extra])`."""

    starts_P7: np.ndarray
    """int64 [P, 7]: prefix 2 ranges (stream, extra), middle 3 (extra, stream, extra), suffix 2 (extra, stream)."""
    lengths_P7: np.ndarray
    extra: np.ndarray
    """Ids that are not in the stream: what was encoded anew."""


class Measured(NamedTuple):
    """Tokens, and what a cutter needs to know of all of them: computed once, however often pieces are cut."""

    tokens: np.ndarray
    places: np.ndarray
    """Running count of the places to cut at. Empty: one place a token."""


class Cutter(ABC):
    """Cuts pieces in three at two places, each uniform over all places of a piece, both ends included."""

    spare: int = 0
    """Positions that re-tokenisation usually adds to a piece."""

    def measure(self, tokens: np.ndarray) -> Measured:
        """Flat ids, ready to be cut."""
        return Measured(tokens, tokens[:0])

    @abstractmethod
    def cut(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        """The three parts of the pieces tokens[start:end], none of which is empty.

        Args:
            text: flat ids, measured.
            starts, ends: int64 [P].
            draws_P2: float64 [P, 2], uniform in [0, 1): where to cut, in any order.
        """

    def counters(self) -> dict[str, int]:
        """What was counted so far, by name."""
        return {}


class TokenCutter(Cutter):
    """Cuts between tokens."""

    def cut(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        at_P2 = starts[:, None] + (draws_P2 * (ends - starts + 1)[:, None]).astype(np.int64)
        at_P2.sort(axis=1)
        return _ranges(starts, ends, at_P2, at_P2, np.zeros((len(starts), 4, 2), np.int64), text.tokens[:0])


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


_REACH = 8
"""Tokens looked at on each side of a cut at once; longer cells (minified code, unspaced scripts) are found one by one."""

_LETTER, _DIGIT, _MARK, _SPACE, _NEWLINE, _SPECIAL, _ANY = (1 << k for k in range(7))
_SAFE = {
    # What may begin after a token that ends in …, so that a pre-token boundary lies between. The expressions of GPT-2, GPT-4 (cl100k,
    # o200k), Llama 3, Qwen and DeepSeek agree on these. Left out, since they do not: an apostrophe (contractions), anything that is not
    # ASCII. Punctuation before letters (`[^\r\n\p{L}\p{N}]?\p{L}+`) and before line ends (`\p{P}+[\r\n]*`) is added where no token of
    # the vocabulary spans the two: such a tokenizer, like GPT-2's, keeps them apart.
    _LETTER: _DIGIT | _MARK | _SPACE | _NEWLINE,
    _DIGIT: _LETTER | _MARK | _SPACE | _NEWLINE,
    _MARK: _DIGIT | _SPACE,
}


_PROBE = "def readAll(self, x1=12345):\n    return {'a': 3.5}  # don't, it's; naïve “text”\n\n\tx += y[0:2]; 日本 語!\r\n (a)/b\n"
"""A text with every kind of neighbours."""


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
    """Cuts between characters (code points), never inside one; or between lines; or around a node of the syntax tree.

    A window may begin or end inside a character: those bytes keep single-byte tokens, since they are no text to encode.
    """

    spare = 4
    table_size = 1 << 17
    """Entries of the tables of encoded cells and texts; a full table is emptied. Affects speed alone."""

    def __init__(self, vocabulary: Vocabulary, *, lines: bool = False, nodes: bool = False) -> None:
        """`lines`: cut only where a line begins, and at the ends of a piece. `nodes`: around a node, where a piece parses."""
        self._lines = lines
        self._bytes = [*vocabulary.token_bytes] + [b""] * (vocabulary.size - len(vocabulary.token_bytes))
        self._encode_text = vocabulary.encode
        self._byte_ids = {text: token for token, text in enumerate(self._bytes) if len(text) == 1}
        if not all(bytes([b]) in self._byte_ids for b in range(128, 256)):
            raise ConfigError("objective.cut=char needs a byte-level tokenizer (a token for each byte); use objective.cut=token")
        self._single = max(map(len, self._bytes)) <= 1  # nothing is ever merged: a cut changes no ids
        self._byte_tables()
        self._clear()
        self._nodes: SyntaxPlaces | None = None
        self._probe()
        if nodes:
            self._nodes = SyntaxPlaces(self._bytes)

    def counters(self) -> dict[str, int]:
        return {} if self._nodes is None else {"parsed": self._nodes.parsed, "unparsed": self._nodes.unparsed}

    def _probe(self) -> None:
        """Refuse a tokenizer for which local encoding is not exact (merges across words, or text changed by normalisation)."""
        ids = np.array(self._encode_text(_PROBE), np.int64)
        count = len(_PROBE) + 1
        draws = np.random.default_rng(0).random((2 * count, 2))
        draws[:count, 0] = (np.arange(count) + 0.5) / count  # every place between characters once
        ends = np.full(len(draws), len(ids))
        parts = self.cut(self.measure(ids), np.zeros_like(ends), ends, draws)
        source = np.concatenate([ids, parts.extra]).tolist()
        texts = b"".join(self._bytes[token] for token in ids.tolist())
        exact = texts == _PROBE.encode()
        for starts, lengths in zip(parts.starts_P7.tolist(), parts.lengths_P7.tolist(), strict=True):
            spans = [source[a : a + n] for a, n in zip(starts, lengths, strict=True)]
            for part in (spans[0] + spans[1], spans[2] + spans[3] + spans[4], spans[5] + spans[6]):
                text = b"".join(self._bytes[token] for token in part)
                exact = exact and self._encode_text(text.decode()) == part
        if not exact:
            raise ConfigError(
                "objective.cut=char does not fit this tokenizer: text cut at a place does not keep its ids away from it; "
                "use objective.cut=token"
            )

    def _byte_tables(self) -> None:
        if self._lines:  # places are after line ends
            places = [[k + 1 for k, byte in enumerate(text) if byte == ord("\n")] for text in self._bytes]
        else:  # before the first bytes of characters
            places = [[k for k, byte in enumerate(text) if byte & 0xC0 != 0x80] for text in self._bytes]
        self._size_V = np.array([len(text) for text in self._bytes], np.int64)
        self._count_V = np.array([len(x) for x in places], np.int32)
        self._place = np.array([*(k for x in places for k in x), 0], np.int64)
        self._place_end_V = np.cumsum(self._count_V, dtype=np.int64)
        self._ends_V = np.array([not text.endswith(b"\n") for text in self._bytes], np.int32)
        kinds = [_kind(byte) for byte in range(256)]
        inside = {(kinds[a], kinds[b]) for text in set(self._bytes) for a, b in pairwise(text)}
        safe = _SAFE | {_MARK: _SAFE[_MARK] | sum(kind for kind in (_LETTER, _NEWLINE) if (_MARK, kind) not in inside)}
        self._begin_V = np.array([(kinds[text[0]] if text else _SPECIAL) | _ANY for text in self._bytes], np.uint8)
        self._end_V = np.array([(safe.get(kinds[text[-1]], 0) if text else _ANY) | _SPECIAL for text in self._bytes], np.uint8)

    def measure(self, tokens: np.ndarray) -> Measured:
        count = self._count_V[tokens]
        return Measured(tokens, np.cumsum(count, dtype=np.int32 if len(tokens) < 1 << 24 else np.int64))

    def cut(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        at_P2, byte_P2 = self._places(text, starts, ends, draws_P2)
        if self._nodes is not None:
            self._nodes.put(text.tokens, starts, ends, draws_P2, at_P2, byte_P2)
        if self._single:
            return _ranges(starts, ends, at_P2, at_P2, np.zeros((len(starts), 4, 2), np.int64), text.tokens[:0])
        left_P2, right_P2, near = self._find_cells(text.tokens, starts, ends, at_P2, byte_P2)
        encoded_P42, extra = self._encode_cells(text.tokens, at_P2, byte_P2, left_P2, right_P2, near)
        return _ranges(starts, ends, left_P2, right_P2, encoded_P42, extra)

    def _places(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two places a piece, in order: the token that each falls in (or the piece's end), and before which byte of it."""
        tokens, count = text
        before = count[starts] - self._count_V[tokens[starts]]
        inner = count[ends - 1] - before
        # between characters: before each, and the end; between lines: the start, after each line end, and the end if it is not one
        open_end = self._ends_V[tokens[ends - 1]] if self._lines else 0
        places_P2 = (draws_P2 * (inner + 1 + open_end)[:, None]).astype(count.dtype)
        places_P2.sort(axis=1)
        places_P2 -= self._lines
        at_P2 = np.minimum(np.searchsorted(count, places_P2 + before[:, None], side="right"), ends[:, None])
        at_P2 = np.where(places_P2 < 0, starts[:, None], at_P2)
        inside = (at_P2 < ends[:, None]) & (places_P2 >= 0)
        token_P2 = at_P2 * inside
        id_P2 = tokens[token_P2]
        nth = places_P2 + before[:, None] - count[token_P2] + self._place_end_V[id_P2]
        byte_P2 = self._place[nth * inside] * inside
        if not self._lines:
            return at_P2, byte_P2
        whole = inside & (byte_P2 == self._size_V[id_P2])  # after the token's last byte is before the next token
        return at_P2 + whole, byte_P2 * ~whole

    def _find_cells(
        self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, at_P2: np.ndarray, byte_P2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cell [left, right) of each cut, empty where the cut falls between cells; and the tokens around it, [P, 2, 2 reach]."""
        border = at_P2[..., None] + np.arange(1 - _REACH, _REACH)  # safe[…, k] is about the place before the token at border[…, k]
        near = tokens.take(at_P2[..., None] + np.arange(-_REACH, _REACH), mode="clip")
        safe = (self._end_V[near[..., :-1]] & self._begin_V[near[..., 1:]]) != 0
        safe |= (border <= starts[:, None, None]) | (border >= ends[:, None, None])
        before, after = safe[..., _REACH - 1 :: -1], safe[..., _REACH:]
        left_P2, right_P2 = at_P2 - before.argmax(axis=2), at_P2 + 1 + after.argmax(axis=2)
        between = (byte_P2 == 0) & before[..., 0]
        right_P2[between] = at_P2[between]
        for piece, k in zip(*np.nonzero(~(before.any(axis=2) & after.any(axis=2)) & ~between), strict=True):
            cell = self._find_long_cell(tokens, int(starts[piece]), int(ends[piece]), int(at_P2[piece, k]))
            left_P2[piece, k], right_P2[piece, k] = cell
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
        left, right, at, byte = (x[piece, k] for x in (left_P2, right_P2, at_P2, byte_P2))
        both = both_P[piece]
        jobs = _Jobs(left, right, at, byte, np.where(both, at_P2[piece, 1], -1), np.where(both, byte_P2[piece, 1], -1))
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
        left, right = (jobs.left - jobs.at)[:, None], (jobs.right - jobs.at)[:, None]
        relative = np.arange(-_REACH, _REACH)
        key = np.empty((len(jobs.at), 2 * _REACH + 3), np.int32)
        key[:, :-3] = np.where((relative >= left) & (relative < right), near_J, -1)
        key[:, -3], key[:, -2], key[:, -1] = jobs.byte, np.where(jobs.at2 < 0, -1, jobs.at2 - jobs.at), jobs.byte2
        long = np.flatnonzero((left[:, 0] < -_REACH) | (right[:, 0] > _REACH))
        key[long, 0], key[long, 1] = -2, long  # the key holds too little of such a cell: never shared
        packed, width, cells = key.tobytes(), key.shape[1] * 4, self._cells
        names = [packed[i : i + width] for i in range(0, len(packed), width)]
        missing = [j for j, name in enumerate(names) if name not in cells]
        if missing:
            self._encode_missing(tokens, jobs, names, missing)
        found = self._entries[[cells[name] for name in names]]
        for j in long.tolist():
            del cells[names[j]]
        return found

    def _clear(self) -> None:
        self._texts: dict[bytes, list[int]] = {}
        self._cells: dict[bytes, int] = {}
        self._entries = np.zeros((0, 3, 2), np.int64)
        self._pool = np.zeros(0, np.int64)
        self._num_entries = self._num_pool = 0

    def _encode_missing(self, tokens: np.ndarray, jobs: _Jobs, names: list[bytes], missing: list[int]) -> None:
        """Add the cells of the jobs `missing` to the table."""
        pool: list[int] = []
        ranges: list[tuple[int, int]] = []
        for j in missing:
            if names[j] in self._cells:
                continue  # twice in one batch
            self._cells[names[j]] = self._num_entries + len(ranges) // 3
            for text in self._cell_texts(tokens, *(int(x[j]) for x in jobs)):
                ids = self._texts.get(text)
                if ids is None:
                    ids = self._texts[text] = self._encode(text)
                ranges.append((self._num_pool + len(pool), len(ids)))
                pool += ids
        self._entries = _put(self._entries, self._num_entries, np.array(ranges, np.int64).reshape(-1, 3, 2))
        self._pool = _put(self._pool, self._num_pool, np.array(pool, np.int64))
        self._num_entries += len(ranges) // 3
        self._num_pool += len(pool)

    def _cell_texts(self, tokens: np.ndarray, left: int, right: int, at: int, byte: int, at2: int, byte2: int) -> tuple[bytes, ...]:
        """The cell's bytes before its first cut, between its cuts, and after: (before, after, nothing) when it has one."""
        texts = [self._bytes[token] for token in tokens[left:right].tolist()]
        text = b"".join(texts)
        first = sum(map(len, texts[: at - left])) + byte
        if at2 < 0:
            return text[:first], text[first:], b""
        second = sum(map(len, texts[: at2 - left])) + byte2
        return text[:first], text[first:second], text[second:]

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


def _put(array: np.ndarray, at: int, values: np.ndarray) -> np.ndarray:
    """`array` with `values` from `at` on; made longer, at least twice, when it is too short."""
    if at + len(values) > len(array):
        array = np.concatenate([array[:at], np.zeros((at + 2 * len(values) + 1024, *array.shape[1:]), array.dtype)])
    array[at : at + len(values)] = values
    return array


class _Jobs(NamedTuple):
    """Cells to look up: the cell, the cut in it, and a second cut (−1: none)."""

    left: np.ndarray
    right: np.ndarray
    at: np.ndarray
    byte: np.ndarray
    at2: np.ndarray
    byte2: np.ndarray
