"""Where a piece of text is cut in three, and the ids of the three parts.

Cutting between tokens is arithmetic. Cutting between characters changes ids near the cut, because the two sides are tokenised as if
each stood alone. Tokenising whole parts again would cost a thousand times the rest; here only the *cell* around a cut is encoded:
the tokens between the last place before the cut and the first place after it where every common pre-tokenizer splits text whatever
the context (a letter or digit before white space, a letter before punctuation, …, see `_SAFE`). Encoding is independent on the two
sides of such a place, so the ids equal those of encoding each part in full; a test shows it on thousands of cuts, and `CharCutter`
probes it for the tokenizer at hand.

Positions are flat indices into the tokens of a batch. The ids of a part are three ranges of at most: stream, encoded, stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from heads_lightning.objectives.base import Vocabulary
from heads_lightning.objectives.cells import CellEncoder, Cuts
from heads_lightning.objectives.syntax import SyntaxPlaces
from heads_lightning.registry import ConfigError


class Parts(NamedTuple):
    """Ids of prefix, middle and suffix of P pieces, as ranges of `concatenate([tokens, extra])`."""

    starts_7P: np.ndarray
    """int64 [7, P]: 0 is the prefix's in the stream, 1 to 4 are what is encoded left and right of the two cuts, 5 is the middle's in the
    stream, 6 the suffix's. So the prefix is 0, 1; the middle 2, 5, 3; the suffix 4, 6."""
    lengths_7P: np.ndarray
    extra: np.ndarray
    """Ids that are not in the stream: what was encoded anew."""


class Measured(NamedTuple):
    """Tokens, and what a cutter needs to know of all of them: computed once, however often pieces are cut."""

    tokens: np.ndarray
    places: np.ndarray
    """Places to cut at before each token, and in all. Empty: one place a token."""


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
        at_2P = starts + (draws_P2.T * (ends - starts + 1)).astype(np.int64)
        at_2P.sort(axis=0)
        return _parts(starts, ends, at_2P, at_2P)


def _parts(
    starts: np.ndarray,
    ends: np.ndarray,
    left_2P: np.ndarray,
    right_2P: np.ndarray,
    encoded: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Parts:
    """Parts from what each cut keeps: the stream up to left and from right on.

    `encoded`: starts and lengths [4, P] of what stands between, left and right of each cut, and the ids that they point into.
    """
    starts_7P, lengths_7P = np.empty((2, 7, len(starts)), np.int64)
    starts_7P[0], starts_7P[5], starts_7P[6] = starts, right_2P[0], right_2P[1]
    lengths_7P[0], lengths_7P[5], lengths_7P[6] = left_2P[0] - starts, left_2P[1] - right_2P[0], ends - right_2P[1]
    if encoded is None:
        starts_7P[1:5] = lengths_7P[1:5] = 0
        return Parts(starts_7P, lengths_7P, starts[:0])
    starts_7P[1:5], lengths_7P[1:5], extra = encoded
    return Parts(starts_7P, lengths_7P, extra)


_REACH = 8
"""Tokens looked at on each side of a cut at once; longer cells (minified code, unspaced scripts) are found one by one."""
_AROUND = np.arange(-_REACH, _REACH)
_BITS = np.arange(1 << 2 * _REACH)[:, None] >> np.arange(2 * _REACH) & 1
_BITS[:, -1] = 1  # of the two tokens that it would be between, one is another cut's
_BEFORE = np.where(_BITS[:, :_REACH].any(axis=1), _BITS[:, _REACH - 1 :: -1].argmax(axis=1), _REACH)
_AFTER = _BITS[:, _REACH:].argmax(axis=1) + 1
"""Tokens from a cut back to a place where pre-tokens part, and on to one, by the places that do: bit k is the one before the token
at + k + 1 - reach. The reach where there is none."""

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

    def __init__(self, vocabulary: Vocabulary, *, lines: bool = False, nodes: bool = False) -> None:
        """`lines`: cut only where a line begins, and at the ends of a piece. `nodes`: around a node, where a piece parses."""
        self._lines = lines
        self._bytes = [*vocabulary.token_bytes] + [b""] * (vocabulary.size - len(vocabulary.token_bytes))
        self._encode_text = vocabulary.encode
        self.cells = CellEncoder(self._bytes, vocabulary.encode)
        if not self.cells.knows_all_bytes:
            raise ConfigError("objective.cut=char needs a byte-level tokenizer (a token for each byte); use objective.cut=token")
        self._single = max(map(len, self._bytes)) <= 1  # nothing is ever merged: a cut changes no ids
        self._byte_tables()
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
        for starts, lengths in zip(parts.starts_7P.T.tolist(), parts.lengths_7P.T.tolist(), strict=True):
            spans = [source[a : a + n] for a, n in zip(starts, lengths, strict=True)]
            for part in (spans[0] + spans[1], spans[2] + spans[5] + spans[3], spans[4] + spans[6]):
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
        self._place_first_V = np.cumsum(self._count_V, dtype=np.int64) - self._count_V
        self._ends_V = np.array([not text.endswith(b"\n") for text in self._bytes], np.int32)
        kinds = [_kind(byte) for byte in range(256)]
        inside = {(kinds[a], kinds[b]) for text in set(self._bytes) for a, b in pairwise(text)}
        safe = _SAFE | {_MARK: _SAFE[_MARK] | sum(kind for kind in (_LETTER, _NEWLINE) if (_MARK, kind) not in inside)}
        begin_V = np.array([(kinds[text[0]] if text else _SPECIAL) | _ANY for text in self._bytes], np.uint16)
        end_V = np.array([(safe.get(kinds[text[-1]], 0) if text else _ANY) | _SPECIAL for text in self._bytes], np.uint16)
        self._edges_V = begin_V | end_V << 8
        """uint16 [V]: low byte, the kind that a token begins with; high byte, the kinds before which a pre-token ends with it."""

    def measure(self, tokens: np.ndarray) -> Measured:
        places = np.zeros(len(tokens) + 1, np.int32 if len(tokens) < 1 << 24 else np.int64)
        np.cumsum(self._count_V.take(tokens), out=places[1:])
        return Measured(tokens, places)

    def cut(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> Parts:
        at_2P, byte_2P = self._places(text, starts, ends, draws_P2)
        if self._nodes is not None:
            self._nodes.put(text.tokens, starts, ends, draws_P2, at_2P.T, byte_2P.T)
        if self._single:
            return _parts(starts, ends, at_2P, at_2P)
        left_2P, right_2P = self._find_cells(text.tokens, starts, ends, at_2P, byte_2P)
        lengths_4P, ids = self.cells.encode(text.tokens, Cuts(left_2P, at_2P, byte_2P, right_2P))
        begins = len(text.tokens) + np.cumsum(lengths_4P) - lengths_4P.reshape(-1)
        np.maximum(left_2P[1], right_2P[0], out=left_2P[1])  # where one cell holds both cuts, nothing of the stream is between them
        return _parts(starts, ends, left_2P, right_2P, (begins.reshape(4, -1), lengths_4P, ids))

    def _places(self, text: Measured, starts: np.ndarray, ends: np.ndarray, draws_P2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two places a piece, in order: the token that each falls in (or the piece's end), and before which byte of it."""
        tokens, count = text
        before = count[starts]
        inner = count[ends] - before
        if self._lines:  # the start, after each line end, and the end if it is not one; characters: before each, and the end
            inner += self._ends_V[tokens[ends - 1]]
        place_2P = (draws_P2.T * (inner + 1)).astype(count.dtype)
        place_2P.sort(axis=0)
        wanted_2P = place_2P + (before - self._lines)
        at_2P = np.minimum(count[1:].searchsorted(wanted_2P, side="right"), ends)
        if self._lines:
            at_2P = np.where(place_2P == 0, starts, at_2P)
        inside_2P = at_2P < ends
        if self._lines:
            inside_2P &= place_2P > 0
        nth_2P = self._place_first_V[tokens.take(at_2P, mode="clip")] + (wanted_2P - count[at_2P])
        byte_2P = self._place.take(nth_2P, mode="clip") * inside_2P
        if not self._lines:
            return at_2P, byte_2P
        whole_2P = inside_2P & (byte_2P == self._size_V[tokens.take(at_2P, mode="clip")])  # after a token's last byte: before the next
        return at_2P + whole_2P, byte_2P * ~whole_2P

    def _find_cells(
        self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, at_2P: np.ndarray, byte_2P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cell [left, right) of each cut, empty where the cut falls between cells."""
        edges = self._edges_V.take(tokens.take(at_2P[..., None] + _AROUND, mode="clip")).reshape(-1)
        safe = np.zeros(edges.shape, bool)  # row by row, safe[k]: whether pre-tokens part before the token at + k + 1 - reach
        np.not_equal(edges[:-1] >> 8 & edges[1:], 0, out=safe[:-1])
        rows_2P = np.packbits(safe, bitorder="little").view("<u2").reshape(at_2P.shape)
        before_2P, after_2P = _BEFORE[rows_2P], _AFTER[rows_2P]
        left_2P, right_2P = np.maximum(at_2P - before_2P, starts), np.minimum(at_2P + after_2P, ends)
        between_2P = (byte_2P == 0) & ((left_2P == at_2P) | (at_2P == ends))
        unknown_2P = ((before_2P == _REACH) & (left_2P > starts)) | ((after_2P == _REACH) & (right_2P < ends))
        for k, piece in zip(*np.nonzero(unknown_2P & ~between_2P), strict=True):
            cell = self._find_long_cell(tokens, int(starts[piece]), int(ends[piece]), int(at_2P[k, piece]))
            left_2P[k, piece], right_2P[k, piece] = cell
        return np.where(between_2P, at_2P, left_2P), np.where(between_2P, at_2P, right_2P)

    def _find_long_cell(self, tokens: np.ndarray, start: int, end: int, at: int) -> tuple[int, int]:
        edges = self._edges_V
        left, right = at, at + 1
        while left > start and not edges[tokens[left - 1]] >> 8 & edges[tokens[left]]:
            left -= 1
        while right < end and not edges[tokens[right - 1]] >> 8 & edges[tokens[right]]:
            right += 1
        return left, right
