"""Fill in the middle (arXiv 2207.14255): a text is cut in three, its middle is moved to the end, and the next token is predicted.

A transformed piece is laid out as one of (p prefix, m middle, s suffix; an end-of-document marker that opens a document stays in front)

    PSM             [EOD] PRE p SUF s MID m END
    SPM, variant 1  [EOD] SUF s PRE p MID m END
    SPM, variant 2  [EOD] PRE SUF s MID p m END
    suffix first    [EOD] SUF s PRE p m END

Choices:
- `level=context` cuts after the window is chosen: the window is split at documents, room for sentinels is reserved before it is filled,
  and when that is still too little the last piece covers less text *before* it is cut. A transformed piece is therefore always whole:
  no middle is ever truncated and END is always a target. What the last piece gave up is skipped (about 1 % of tokens); positions left
  over are padding.
- Nothing learns to predict that a piece is transformed: the label of the marker before a transformed piece is IGNORE, as is END's own.
- `loss_on=middle` keeps of a transformed piece the targets of m and END alone. Pieces left to right keep all their targets.
- `level=document` transforms whole documents in the stream, as most public pipelines do; windows then break most of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from heads_lightning.batch import IGNORE, PADDING, Attention, Examples
from heads_lightning.configs.objective import FIMConfig, FIMCut, FIMLevel, FIMLoss, SPMLayout
from heads_lightning.objectives.base import (
    Objective,
    Ramp,
    SampleRandom,
    Vocabulary,
    Window,
    counting,
    document_segments,
    gather_ranges,
)
from heads_lightning.objectives.cuts import CharCutter, Cutter, Measured, TokenCutter
from heads_lightning.objectives.fim_layout import fim_sentinels
from heads_lightning.registry import ConfigError

_PLAIN, _PSM, _SPM1, _SPM2, _SUFFIX_FIRST = range(5)
_SPM = {SPMLayout.variant1: _SPM1, SPMLayout.variant2: _SPM2, SPMLayout.suffix_first: _SUFFIX_FIRST}
# Ranges of a piece: 0 the marker, 1 to 7 the parts (see cuts.Parts), PRE, SUF, MID, END; and what follows the last piece of a row: one
# token to look ahead at, and padding. The middle and END come last.
_MARKER, _PRE, _SUF, _MID, _END, _AHEAD, _PADDING = 0, 8, 9, 10, 11, 12, 13
_PREFIX, _MIDDLE, _SUFFIX, _REST = (1, 2), (3, 6, 4), (5, 7), (_END, _AHEAD, _PADDING)
_ORDER = np.array(
    [
        [_MARKER, *_PREFIX, *_SUFFIX, _PRE, _SUF, _MID, *_MIDDLE, *_REST],  # plain: all text is range 1, the parts and sentinels are empty
        [_MARKER, _PRE, *_PREFIX, _SUF, *_SUFFIX, _MID, *_MIDDLE, *_REST],
        [_MARKER, _SUF, *_SUFFIX, _PRE, *_PREFIX, _MID, *_MIDDLE, *_REST],
        [_MARKER, _PRE, _SUF, *_SUFFIX, _MID, *_PREFIX, *_MIDDLE, *_REST],
        [_MARKER, _SUF, *_SUFFIX, _PRE, *_PREFIX, _MID, *_MIDDLE, *_REST],  # its MID is empty
    ]
)
_SENTINELS = np.array([[-4], [-3], [-2], [-1]])
"""Where PRE, SUF, MID and END are: at the end of the source."""
OVERHEAD = len(_SENTINELS)
"""Tokens that a transformed piece has beside its text: three sentinels and the end of the middle."""


class _Pieces(NamedTuple):
    """Pieces of documents in a batch of windows, in order. Positions are flat indices into the windows."""

    rows: np.ndarray
    numbers: np.ndarray
    """In their rows, from 0."""
    starts: np.ndarray
    bodies: np.ndarray
    """After the end-of-document marker, if there is one."""
    ends: np.ndarray
    """Of what is covered of the piece."""
    limits: np.ndarray
    """Of the piece in its window."""

    def take(self, which: np.ndarray) -> _Pieces:
        return _Pieces(*(x[which] for x in self))

    def offsets(self, sizes_P: np.ndarray) -> np.ndarray:
        """Where each piece begins in its row, from what pieces take up. (The pieces of a row are the first ones of it, all of them.)"""
        before_P = np.cumsum(sizes_P) - sizes_P
        return before_P - before_P[counting(len(before_P)) - self.numbers]


class _Plan(NamedTuple):
    """What becomes of the pieces: ranges of `_source`, in the order of _Pieces; _ORDER is that of the output."""

    modes_P: np.ndarray
    starts_KP: np.ndarray
    """int64 [14, P]."""
    lengths_KP: np.ndarray
    extra: np.ndarray
    """Ids that are not in the windows."""

    def take(self, which: np.ndarray) -> _Plan:
        return _Plan(self.modes_P[which], self.starts_KP[:, which], self.lengths_KP[:, which], self.extra)

    def replace(self, which: np.ndarray, new: _Plan, num_tokens: int) -> _Plan:
        """The plan with the pieces `which` (in place) as in `new`, whose encoded ids are appended."""
        self.modes_P[which] = new.modes_P
        self.starts_KP[:, which] = new.starts_KP + np.where(new.starts_KP >= num_tokens, len(self.extra), 0)
        self.lengths_KP[:, which] = new.lengths_KP
        return self._replace(extra=np.concatenate([self.extra, new.extra]))

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths [14 · P] in the order of the output."""
        count = len(self.modes_P)
        at = (_ORDER[self.modes_P] * count + counting(count)[:, None]).reshape(-1)
        return self.starts_KP.reshape(-1)[at], self.lengths_KP.reshape(-1)[at]


class FIM(Objective):
    """Next-token prediction on pieces of documents, a share of them with the middle moved to the end."""

    attention: ClassVar[Attention] = Attention.causal
    parts = ("left_to_right", "infill")

    def __init__(self, config: FIMConfig, vocabulary: Vocabulary) -> None:
        self.layouts = config.layouts(vocabulary.fim_format)
        needs_middle = self.layouts.spm is not SPMLayout.suffix_first or self.layouts.spm_rate < 1
        self._sentinels = fim_sentinels(vocabulary, needs_middle=needs_middle)
        self.config = config
        self.vocabulary = vocabulary
        self.cutter = _cutter(config.cut, vocabulary)
        self.rewrites_stream = config.level is FIMLevel.document
        if self.rewrites_stream and self.layouts.spm is SPMLayout.suffix_first:
            raise ConfigError("objective.level=document cannot tell where a middle begins in objective.spm=suffix_first; use level=context")
        self._rate = Ramp(config.rate if config.rate_start is None else config.rate_start, config.rate, config.rate_tokens)
        self._spm = _SPM[self.layouts.spm]

    def window(self, sequence_length: int) -> Window:
        stride = sequence_length if self.rewrites_stream else sequence_length - self.reserve(sequence_length)
        return Window(stride=stride, length=stride + 1)

    def reserve(self, sequence_length: int) -> int:
        """Positions kept for sentinels, end markers and re-tokenisation: of one piece, and of one more in each 1024 tokens."""
        if self._rate.largest == 0:
            return 0
        return min(sequence_length // 8, (OVERHEAD + self.cutter.spare) * (1 + sequence_length // 1024))

    def examples(self, tokens_BR: np.ndarray, rng: SampleRandom, sequence_length: int) -> Examples:
        if self.rewrites_stream:
            return self._examples_of_rewritten(tokens_BR)
        pieces = split_pieces(tokens_BR, self.vocabulary.end_of_document)
        draws_P4 = rng.uniform_at(pieces.rows[:, None], 4 * pieces.numbers[:, None] + np.arange(4))
        draws_P4[:, 0] = draws_P4[:, 0] >= self._rate.at(rng)[pieces.rows]  # decided once: 0 transform, 1 leave
        tokens = tokens_BR.reshape(-1)
        fitted = self._fit(self.cutter.measure(tokens), pieces, draws_P4, sequence_length)
        return self._assemble(tokens, *fitted, len(tokens_BR), sequence_length)

    def counters(self) -> dict[str, int]:
        return self.cutter.counters()

    def rewrite(self, stream: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Transform whole documents; each depends on (seed, epoch, its number in the stream) alone."""
        if not self.rewrites_stream:
            return super().rewrite(stream, seed, epoch)
        starts = np.flatnonzero(stream == self.vocabulary.end_of_document)
        if len(stream) and (not len(starts) or starts[0]):
            starts = np.concatenate([[0], starts])
        ends = np.append(starts[1:], len(stream))
        draws_P4 = SampleRandom(seed, epoch, np.arange(len(starts))).uniform(4)
        draws_P4[:, 0] = draws_P4[:, 0] >= self.config.rate
        edges = np.unique(np.searchsorted(starts, np.arange(0, len(stream) + _CHUNK, _CHUNK)))  # whole documents, bounded memory
        return np.concatenate(
            [stream[:0]]
            + [
                self._rewrite_documents(stream[starts[a] : ends[b - 1]], starts[a:b] - starts[a], ends[a:b] - starts[a], draws_P4[a:b])
                for a, b in pairwise(edges)
            ]
        )

    def _rewrite_documents(self, tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, draws_P4: np.ndarray) -> np.ndarray:
        bodies = starts + (tokens[starts] == self.vocabulary.end_of_document)
        pieces = _Pieces(np.arange(len(starts)), np.zeros_like(starts), starts, bodies, ends, ends)
        plan = self._plan(self.cutter.measure(tokens), pieces, draws_P4)
        return self._source(tokens, plan.extra, 0)[gather_ranges(*plan.ranges())]

    def _plan(self, text: Measured, pieces: _Pieces, draws_P4: np.ndarray) -> _Plan:
        """Cut and lay out the pieces whose first draw is 0; one without text stays as it is."""
        layout_P = np.where(draws_P4[:, 1] < self.layouts.spm_rate, self._spm, _PSM)
        modes_P = np.where((draws_P4[:, 0] == 0) & (pieces.ends > pieces.bodies), layout_P, _PLAIN)
        which = np.flatnonzero(modes_P)
        parts = self.cutter.cut(text, pieces.bodies[which], pieces.ends[which], draws_P4[which, 2:])
        starts_KP, lengths_KP = np.zeros((2, 14, len(modes_P)), np.int64)
        starts_KP[_MARKER], lengths_KP[_MARKER] = pieces.starts, pieces.bodies - pieces.starts
        if len(which) == len(modes_P):
            starts_KP[1:_PRE], lengths_KP[1:_PRE], lengths_KP[_PRE:_AHEAD] = parts.starts_7P, parts.lengths_7P, 1
        else:
            starts_KP[1], lengths_KP[1] = pieces.bodies, pieces.ends - pieces.bodies
            starts_KP[1:_PRE, which], lengths_KP[1:_PRE, which] = parts.starts_7P, parts.lengths_7P
            lengths_KP[_PRE:_AHEAD] = modes_P > 0
        starts_KP[_PRE:_AHEAD] = _SENTINELS
        if self._spm == _SUFFIX_FIRST:
            lengths_KP[_MID] = modes_P == _PSM
        return _Plan(modes_P, starts_KP, lengths_KP, parts.extra)

    def _source(self, tokens: np.ndarray, extra: np.ndarray, padding: int) -> np.ndarray:
        """What the ranges of a plan index: [tokens, extra, padding, PRE, SUF, MID, END]; the last two from its end, by negative indices."""
        tail = np.full(padding + OVERHEAD, self.vocabulary.padding, tokens.dtype)
        tail[padding:] = self._sentinels
        return np.concatenate([tokens, extra.astype(tokens.dtype), tail])

    def _fit(self, text: Measured, pieces: _Pieces, draws_P4: np.ndarray, room: int) -> tuple[_Pieces, _Plan, np.ndarray, np.ndarray]:
        """Pieces that fill at most `room` positions a row, where they begin in it, and how many they fill.

        The last one covers less text, before it is cut, until it fits.
        What re-tokenising adds beyond the room kept for it comes off the far end of the suffix; only where that is shorter is a piece cut
        anew.
        """
        spare = min(self.cutter.spare, room // 16)
        reserved = (OVERHEAD + spare) * ((draws_P4[:, 0] == 0) & (pieces.ends > pieces.bodies))
        sizes_P = pieces.ends - pieces.starts + reserved
        offsets_P = pieces.offsets(sizes_P)
        kept = np.flatnonzero(offsets_P < room)
        if len(kept) < len(offsets_P):
            pieces, draws_P4, sizes_P, offsets_P = pieces.take(kept), draws_P4[kept], sizes_P[kept], offsets_P[kept]
        self._shorten(pieces, draws_P4, offsets_P, sizes_P, room, 0)
        plan = self._plan(text, pieces, draws_P4)
        while True:
            sizes_P = plan.lengths_KP.sum(axis=0)
            offsets_P = pieces.offsets(sizes_P)
            kept = np.flatnonzero(offsets_P < room)
            if len(kept) < len(offsets_P):
                pieces, draws_P4, sizes_P, offsets_P = pieces.take(kept), draws_P4[kept], sizes_P[kept], offsets_P[kept]
                plan = plan.take(kept)
            sizes_P -= self._trim(pieces, plan, offsets_P + sizes_P - room)
            over = self._shorten(pieces, draws_P4, offsets_P, sizes_P, room, spare)
            if not len(over):
                return pieces, plan, offsets_P, sizes_P
            plan = plan.replace(over, self._plan(text, pieces.take(over), draws_P4[over]), len(text.tokens))

    def _trim(self, pieces: _Pieces, plan: _Plan, beyond_P: np.ndarray) -> np.ndarray:
        """Take what is beyond the room off the far end of the text, in place, where that much of the stream stands there: int64 [P]."""
        taken_P = np.maximum(beyond_P, 0)
        over = taken_P.nonzero()[0]
        last = np.where(plan.modes_P[over] > 0, _SUFFIX[-1], _PREFIX[0])
        taken_P[over] *= plan.lengths_KP[last, over] >= taken_P[over]
        plan.lengths_KP[last, over] -= taken_P[over]
        pieces.ends[over] -= taken_P[over]
        return taken_P

    def _shorten(
        self, pieces: _Pieces, draws_P4: np.ndarray, offsets_P: np.ndarray, sizes_P: np.ndarray, room: int, spare: int
    ) -> np.ndarray:
        """Shorten, in place, the pieces that end beyond `room`, by `spare` more than needed; returns which these were.

        A piece that would keep no text between its sentinels is left to right instead, and covers all the room.
        """
        over = np.flatnonzero(offsets_P + sizes_P > room)
        if len(over):
            left = room - offsets_P[over]
            ends = pieces.ends[over] - (sizes_P[over] - left) - spare
            plain = (draws_P4[over, 0] == 1) | (ends <= pieces.bodies[over])
            pieces.ends[over] = np.where(plain, np.minimum(pieces.starts[over] + left, pieces.limits[over]), ends)
            draws_P4[over[plain], 0] = 1.0
        return over

    def _assemble(
        self, tokens: np.ndarray, pieces: _Pieces, plan: _Plan, offsets_P: np.ndarray, sizes_P: np.ndarray, num_rows: int, width: int
    ) -> Examples:
        places_P = offsets_P + pieces.rows * width  # where each piece begins in the output
        last = np.append((pieces.numbers == 0).nonzero()[0][1:], len(sizes_P)) - 1  # of each row
        padding_P = np.zeros_like(sizes_P)
        padding_P[last] = width - offsets_P[last] - sizes_P[last]
        ids = self._ids(tokens, pieces, plan, last, padding_P, width).reshape(num_rows, width + 1)
        tokens_BS, labels_BS = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        padded = gather_ranges(places_P[last] + sizes_P[last], padding_P[last])
        tokens_BS.reshape(-1)[padded] = self.vocabulary.padding
        labels_BS.reshape(-1)[padded] = IGNORE
        first, second, third = _MIDDLE
        infill_P = plan.lengths_KP[first] + plan.lengths_KP[second] + plan.lengths_KP[third] + 1  # targets of a middle and its END
        infill_P *= plan.modes_P > 0
        self._drop_labels(labels_BS.reshape(-1), pieces, plan.modes_P, places_P, sizes_P, infill_P)
        # runs of a piece: other targets, infill targets, END (which has none of its own) and padding
        runs_P3 = np.empty((len(sizes_P), 3), np.int64)
        runs_P3[:, 1], runs_P3[:, 2] = infill_P, padding_P + (infill_P > 0)
        runs_P3[:, 0] = sizes_P + padding_P - infill_P - runs_P3[:, 2]
        parts_P3 = np.zeros(runs_P3.shape, np.int8)
        parts_P3[:, 1] = 1
        runs_P2, numbers_P2 = np.empty((len(sizes_P), 2), np.int64), np.empty((len(sizes_P), 2), np.int32)
        runs_P2[:, 0], runs_P2[:, 1] = sizes_P, padding_P
        numbers_P2[:, 0], numbers_P2[:, 1] = pieces.numbers, PADDING
        shape = num_rows, width
        return Examples(tokens_BS, labels_BS, _runs(numbers_P2, runs_P2).reshape(shape), part_BS=_runs(parts_P3, runs_P3).reshape(shape))

    def _ids(self, tokens: np.ndarray, pieces: _Pieces, plan: _Plan, last: np.ndarray, padding_P: np.ndarray, width: int) -> np.ndarray:
        """Ids of all rows, each one longer than its positions: where a row ends left to right, the last label is a token of no piece."""
        ahead = plan.modes_P[last] == _PLAIN
        plan.starts_KP[_AHEAD, last], plan.lengths_KP[_AHEAD, last] = pieces.ends[last], ahead
        plan.starts_KP[_PADDING], plan.lengths_KP[_PADDING, last] = -OVERHEAD - width - 1, padding_P[last] + ~ahead
        return self._source(tokens, plan.extra, width + 1).take(gather_ranges(*plan.ranges()))

    def _drop_labels(
        self, labels: np.ndarray, pieces: _Pieces, modes_P: np.ndarray, places_P: np.ndarray, sizes_P: np.ndarray, infill_P: np.ndarray
    ) -> None:
        """Drop, in place, the labels that transformed pieces do not train."""
        which = modes_P.nonzero()[0]
        places = places_P[which]
        ends = places + sizes_P[which]
        labels[ends - 1] = IGNORE
        if self.config.loss_on is FIMLoss.middle:
            labels[gather_ranges(places, ends - places - 1 - infill_P[which])] = IGNORE
        else:
            labels[places[pieces.bodies[which] > pieces.starts[which]]] = IGNORE

    def _examples_of_rewritten(self, tokens_BR: np.ndarray) -> Examples:
        """Next-token examples of a stream with whole documents transformed. Where a middle begins after a prefix (SPM variant 2) is not
        in the ids: here everything from MID to END counts as infilling."""
        pre, suf, mid, end = self._sentinels
        tokens_BS, labels_BS = tokens_BR[:, :-1].astype(np.int64), tokens_BR[:, 1:].astype(np.int64)
        eod = self.vocabulary.end_of_document
        segments_BS = document_segments(tokens_BS, eod)
        sentinel = np.isin(tokens_BS, [pre, suf, mid, end])
        marks = sentinel | (tokens_BS == eod)
        last = np.maximum.accumulate(np.where(marks, np.arange(tokens_BS.shape[1]), 0), axis=1)
        infill = np.take_along_axis(tokens_BS, last, 1) == mid
        labels_BS[(tokens_BS == end) | ((tokens_BS == eod) & np.isin(labels_BS, [pre, suf]))] = IGNORE
        if self.config.loss_on is FIMLoss.middle:
            opening = np.diff(segments_BS, axis=1, prepend=-1) != 0
            transformed = np.logical_or.reduceat(sentinel.reshape(-1), np.flatnonzero(opening))[np.cumsum(opening) - 1]
            labels_BS[transformed.reshape(infill.shape) & ~infill] = IGNORE
        return Examples(tokens_BS, labels_BS, segments_BS, part_BS=infill.astype(np.int8))


def _runs(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each value as often as its length says."""
    return values.reshape(-1).repeat(lengths.reshape(-1))


def _cutter(cut: FIMCut, vocabulary: Vocabulary) -> Cutter:
    if cut is FIMCut.token:
        return TokenCutter()
    return CharCutter(vocabulary, lines=cut in (FIMCut.line, FIMCut.syntax), nodes=cut is FIMCut.syntax)


_CHUNK = 1 << 20
"""Tokens of the stream that are rewritten at once."""


def split_pieces(tokens_BR: np.ndarray, end_of_document: int) -> _Pieces:
    """The pieces of documents in windows whose last token is only looked ahead at."""
    num_rows, width = tokens_BR.shape
    opens = tokens_BR == end_of_document
    opens[:, 0], opens[:, -1] = True, False
    starts = np.flatnonzero(opens)
    rows = starts // width
    numbers = counting(len(starts)) - np.flatnonzero(starts == rows * width)[rows]
    ends = np.empty_like(starts)
    ends[:-1], ends[-1:] = starts[1:], num_rows * width
    np.minimum(ends, rows * width + (width - 1), out=ends)
    bodies = starts + (tokens_BR.reshape(-1)[starts] == end_of_document)
    return _Pieces(rows, numbers, starts, bodies, ends, ends.copy())
