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
    document_segments,
    gather_ranges,
    require_roles,
)
from heads_lightning.objectives.cuts import CharCutter, Cutter, Measured, TokenCutter
from heads_lightning.registry import ConfigError

_PLAIN, _PSM, _SPM1, _SPM2, _SUFFIX_FIRST = range(5)
_SPM = {SPMLayout.variant1: _SPM1, SPMLayout.variant2: _SPM2, SPMLayout.suffix_first: _SUFFIX_FIRST}
# Ranges of a piece: 0 marker, 1-2 prefix, 3-5 middle, 6-7 suffix, 8 PRE, 9 SUF, 10 MID, 11 END. The middle and END are always last.
_MARKER, _PRE, _SUF, _MID, _END = 0, 8, 9, 10, 11
_ORDER = np.array(
    [
        [_MARKER, 1, 2, 6, 7, _PRE, _SUF, _MID, 3, 4, 5, _END],  # plain: the whole text is range 1, the rest is empty
        [_MARKER, _PRE, 1, 2, _SUF, 6, 7, _MID, 3, 4, 5, _END],
        [_MARKER, _SUF, 6, 7, _PRE, 1, 2, _MID, 3, 4, 5, _END],
        [_MARKER, _PRE, _SUF, 6, 7, _MID, 1, 2, 3, 4, 5, _END],
        [_MARKER, _SUF, 6, 7, _PRE, 1, 2, _MID, 3, 4, 5, _END],  # its MID is empty
    ]
)
OVERHEAD = 4
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


class _Plan(NamedTuple):
    """What becomes of the pieces: ranges of `concatenate([tokens, extra])`, in the order of the output."""

    modes_P: np.ndarray
    starts_PK: np.ndarray
    lengths_PK: np.ndarray
    extra: np.ndarray


class FIM(Objective):
    """Next-token prediction on pieces of documents, a share of them with the middle moved to the end."""

    attention: ClassVar[Attention] = Attention.causal
    parts = ("left_to_right", "infill")

    def __init__(self, config: FIMConfig, vocabulary: Vocabulary) -> None:
        self.layouts = config.layouts(vocabulary.fim_format)
        self._sentinels = fim_sentinels(vocabulary, self.layouts.spm)
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
        pieces, plan = self._fit(self.cutter.measure(tokens), pieces, draws_P4, sequence_length)
        return self._assemble(tokens, pieces, plan, len(tokens_BR), sequence_length)

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
        return self._source(tokens, plan, 0)[gather_ranges(plan.starts_PK.reshape(-1), plan.lengths_PK.reshape(-1))]

    def _plan(self, text: Measured, pieces: _Pieces, draws_P4: np.ndarray) -> _Plan:
        """Cut and lay out the pieces whose first draw is 0; one without text stays as it is."""
        has_text = pieces.ends > pieces.bodies
        layout = np.where(draws_P4[:, 1] < self.layouts.spm_rate, self._spm, _PSM)
        modes = np.where((draws_P4[:, 0] == 0) & has_text, layout, _PLAIN)
        starts_PK = np.zeros((len(modes), 12), np.int64)
        lengths_PK = np.zeros((len(modes), 12), np.int64)
        starts_PK[:, 0], lengths_PK[:, 0] = pieces.starts, pieces.bodies - pieces.starts
        starts_PK[:, 1], lengths_PK[:, 1] = pieces.bodies, pieces.ends - pieces.bodies
        which = np.flatnonzero(modes)
        parts = self.cutter.cut(text, pieces.bodies[which], pieces.ends[which], draws_P4[which, 2:])
        starts_PK[which, 1:8], lengths_PK[which, 1:8] = parts.starts_P7, parts.lengths_P7
        starts_PK[:, 8:] = np.arange(-OVERHEAD, 0)  # the sentinels are at the end of the source
        lengths_PK[which, 8:] = 1
        lengths_PK[modes == _SUFFIX_FIRST, _MID] = 0
        order = _ORDER[modes]
        return _Plan(modes, np.take_along_axis(starts_PK, order, 1), np.take_along_axis(lengths_PK, order, 1), parts.extra)

    def _source(self, tokens: np.ndarray, plan: _Plan, padding: int) -> np.ndarray:
        """What the ranges of a plan index: [tokens, extra, padding, PRE, SUF, MID, END]; the last two from its end, by negative indices."""
        tail = np.array([self.vocabulary.padding] * padding + [*self._sentinels])
        return np.concatenate([tokens, plan.extra, tail.astype(tokens.dtype)])

    def _fit(self, text: Measured, pieces: _Pieces, draws_P4: np.ndarray, room: int) -> tuple[_Pieces, _Plan]:
        """Pieces that fill at most `room` positions a row: the last one covers less text, before it is cut, until it fits."""
        spare = min(self.cutter.spare, room // 16)
        reserved = (OVERHEAD + spare) * ((draws_P4[:, 0] == 0) & (pieces.ends > pieces.bodies))
        lengths = pieces.ends - pieces.starts + reserved  # mostly enough: few pieces are cut twice
        kept = np.flatnonzero(_offsets(pieces.rows, lengths) < room)
        pieces, draws_P4 = pieces.take(kept), draws_P4[kept]
        self._shorten(pieces, draws_P4, lengths[kept], room, 0)
        plan = self._plan(text, pieces, draws_P4)
        while True:
            lengths = plan.lengths_PK.sum(axis=1)
            kept = np.flatnonzero(_offsets(pieces.rows, lengths) < room)
            if len(kept) < len(lengths):
                pieces, draws_P4, lengths = pieces.take(kept), draws_P4[kept], lengths[kept]
                plan = plan._replace(modes_P=plan.modes_P[kept], starts_PK=plan.starts_PK[kept], lengths_PK=plan.lengths_PK[kept])
            over = self._shorten(pieces, draws_P4, lengths, room, spare)
            if not len(over):
                return pieces, plan
            plan = _replace_rows(plan, over, self._plan(text, pieces.take(over), draws_P4[over]), len(text.tokens))

    def _shorten(self, pieces: _Pieces, draws_P4: np.ndarray, lengths: np.ndarray, room: int, spare: int) -> np.ndarray:
        """Shorten, in place, the pieces that end beyond `room`, by `spare` more than needed; returns which these were.

        A piece that would keep no text between its sentinels is left to right instead, and covers all the room.
        """
        offsets = _offsets(pieces.rows, lengths)
        over = np.flatnonzero(offsets + lengths > room)
        left = room - offsets[over]
        ends = pieces.ends[over] - (lengths[over] - left) - spare
        plain = (draws_P4[over, 0] == 1) | (ends <= pieces.bodies[over])
        pieces.ends[over] = np.where(plain, np.minimum(pieces.starts[over] + left, pieces.limits[over]), ends)
        draws_P4[over[plain], 0] = 1.0
        return over

    def _assemble(self, tokens: np.ndarray, pieces: _Pieces, plan: _Plan, num_rows: int, width: int) -> Examples:
        lengths_P = plan.lengths_PK.sum(axis=1)
        last_P = np.append(pieces.rows[1:] != pieces.rows[:-1], True)
        places_P = _offsets(pieces.rows, lengths_P) + pieces.rows * width  # where each piece begins in the output
        padding_P = np.where(last_P, (pieces.rows + 1) * width - places_P - lengths_P, 0)
        plain_P = plan.modes_P == _PLAIN
        # one token more than the input: the last label of a row that ends left to right
        ahead_P = (last_P & plain_P).astype(np.int64)
        starts = np.column_stack([plan.starts_PK, pieces.ends, np.full(len(lengths_P), -OVERHEAD - width - 1)])
        lengths = np.column_stack([plan.lengths_PK, ahead_P, padding_P + last_P - ahead_P])
        source = self._source(tokens, plan, width + 1)
        ids = source[gather_ranges(starts.reshape(-1), lengths.reshape(-1))].reshape(num_rows, width + 1)
        tokens_BS, labels_BS = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        padded = gather_ranges(places_P[last_P] + lengths_P[last_P], padding_P[last_P])
        tokens_BS.reshape(-1)[padded] = self.vocabulary.padding
        labels_BS.reshape(-1)[padded] = IGNORE
        part_BS = self._mark_infill(labels_BS, pieces, plan, places_P, lengths_P)
        numbers = np.column_stack([pieces.numbers, np.full(len(lengths_P), PADDING)]).astype(np.int32)
        segments = np.repeat(numbers.reshape(-1), np.column_stack([lengths_P, padding_P]).reshape(-1))
        return Examples(tokens_BS, labels_BS, segments.reshape(num_rows, width), part_BS=part_BS)

    def _mark_infill(self, labels_BS: np.ndarray, pieces: _Pieces, plan: _Plan, places_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """int8 [B, S]: 1 where the target is of a middle or its END. Drops, in place, the labels that transformed pieces do not train."""
        labels = labels_BS.reshape(-1)
        which = np.flatnonzero(plan.modes_P)
        ends = places_P[which] + lengths_P[which]
        count = plan.lengths_PK[which, 8:11].sum(axis=1) + 1
        labels[ends - 1] = IGNORE
        if self.config.loss_on is FIMLoss.middle:
            labels[gather_ranges(places_P[which], lengths_P[which] - 1 - count)] = IGNORE
        else:
            labels[places_P[which[pieces.bodies[which] > pieces.starts[which]]]] = IGNORE
        part_BS = np.zeros(labels_BS.shape, np.int8)
        part_BS.reshape(-1)[gather_ranges(ends - 1 - count, count)] = 1
        return part_BS

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


def _cutter(cut: FIMCut, vocabulary: Vocabulary) -> Cutter:
    if cut is FIMCut.token:
        return TokenCutter()
    return CharCutter(vocabulary, lines=cut in (FIMCut.line, FIMCut.syntax), nodes=cut is FIMCut.syntax)


def fim_sentinels(vocabulary: Vocabulary, spm: SPMLayout) -> tuple[int, int, int, int]:
    """PRE, SUF, MID, END; where the layout has no MID, SUF stands for it and is not used."""
    if spm == SPMLayout.suffix_first and vocabulary.fim_middle is None:
        pre, suf, end = require_roles(vocabulary, ("fim_prefix", "fim_suffix", "fim_end"), "fim")
        return pre, suf, suf, end
    pre, suf, mid, end = require_roles(vocabulary, FIMConfig.special_tokens, "fim")
    return pre, suf, mid, end


_CHUNK = 1 << 20
"""Tokens of the stream that are rewritten at once."""


def split_pieces(tokens_BR: np.ndarray, end_of_document: int) -> _Pieces:
    """The pieces of documents in windows whose last token is only looked ahead at."""
    num_rows, width = tokens_BR.shape
    opens = tokens_BR == end_of_document
    opens[:, 0], opens[:, -1] = True, False
    starts = np.flatnonzero(opens)
    rows = starts // width
    ends = np.minimum(np.append(starts[1:], num_rows * width), rows * width + width - 1)
    numbers = np.arange(len(starts)) - np.searchsorted(rows, rows)
    bodies = starts + (tokens_BR.reshape(-1)[starts] == end_of_document)
    return _Pieces(rows, numbers, starts, bodies, ends, ends.copy())


def _offsets(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Where each piece begins in its row."""
    before = np.cumsum(lengths) - lengths
    return before - before[np.searchsorted(rows, rows)]


def _replace_rows(plan: _Plan, which: np.ndarray, new: _Plan, num_tokens: int) -> _Plan:
    """`plan` with the pieces `which` (in place) as in `new`, whose encoded ids are appended."""
    plan.modes_P[which] = new.modes_P
    plan.starts_PK[which] = new.starts_PK + np.where(new.starts_PK >= num_tokens, len(plan.extra), 0)
    plan.lengths_PK[which] = new.lengths_PK
    return plan._replace(extra=np.concatenate([plan.extra, new.extra]))


def fim_prompt(
    prefix_ids: np.ndarray,
    suffix_ids: np.ndarray,
    vocabulary: Vocabulary,
    layout: str = "psm",
    spm_variant: SPMLayout = SPMLayout.variant2,
    document_start: bool = True,
    mode: int | None = None,
) -> np.ndarray:
    """int64 ids after which the middle follows, laid out as in training.

    Args:
        prefix_ids, suffix_ids: int, each tokenised as a text that stands alone.
        layout: `psm` or `spm`.
        spm_variant: which of the layouts called SPM.
        document_start: whether the prefix begins at the document's beginning (then a marker stands in front).
        mode: the mode token that pieces of this kind opened with in a mixture.
    """
    pre, suf, mid, _ = ([token] for token in fim_sentinels(vocabulary, spm_variant))
    opening = [mode] if mode is not None else [vocabulary.end_of_document] * document_start
    if layout not in ("psm", "spm"):
        raise ConfigError(f"layout={layout} of an infilling prompt does not exist; it is psm or spm")
    if layout == "psm":
        parts = [pre, prefix_ids, suf, suffix_ids, mid]
    elif spm_variant == SPMLayout.variant1:
        parts = [suf, suffix_ids, pre, prefix_ids, mid]
    elif spm_variant == SPMLayout.suffix_first:
        parts = [suf, suffix_ids, pre, prefix_ids]
    else:
        parts = [pre, suf, suffix_ids, mid, prefix_ids]
    return np.concatenate([opening, *parts]).astype(np.int64)


def invert(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The ids of a piece in the order of the source: prefix, middle, suffix; sentinels and end marker dropped, its opening marker kept.

    A piece that is not transformed comes back as it is. The bytes are those of the source; ids around the cuts may differ.
    """
    ids = np.asarray(ids)
    body = int(len(ids) > 0 and ids[0] == vocabulary.end_of_document)  # which may be the end of a middle, too
    where = {
        role: body + np.flatnonzero(ids[body:] == getattr(vocabulary, f"fim_{role}")) for role in ("prefix", "suffix", "middle", "end")
    }
    if not len(where["prefix"]):
        return ids
    suffix_first = not len(where["middle"]) and len(where["suffix"]) == 1 and where["suffix"][0] < where["prefix"][0]
    if suffix_first:
        where["middle"] = where["suffix"]  # is not there
    if any(len(found) != 1 for found in where.values()) or where["end"][0] != len(ids) - 1:
        places = {role: found.tolist() for role, found in where.items()}
        raise ValueError(f"not one whole infilling piece: sentinels at {places}")
    pre, suf, mid, end = (int(found[0]) for found in where.values())
    if suffix_first:
        return np.concatenate([ids[:body], ids[pre + 1 : end], ids[suf + 1 : pre]])
    if pre < suf:  # PSM, and SPM variant 2: that is PSM with nothing between PRE and SUF, and prefix and middle in one
        return np.concatenate([ids[:body], ids[pre + 1 : suf], ids[mid + 1 : end], ids[suf + 1 : mid]])
    return np.concatenate([ids[:body], ids[pre + 1 : mid], ids[mid + 1 : end], ids[suf + 1 : pre]])
