"""Whole documents in rows: which piece of a shard stands in which row, from the lengths of the documents alone.

Choices. A document that fits a row is never cut; a longer one is cut into full rows, one after the other, and a rest. The rests and the
whole documents are packed best-fit decreasing (Ding et al., arXiv 2404.10830, 3.1): longest first, each into the fullest row that has
room for it. The table is made once, when a shard is opened: that row r is looked up and not searched for is what keeps resuming immediate.
Documents of one length are placed together, so that the work grows with the lengths there are and not with the documents.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from heads_lightning.batch import PADDING
from heads_lightning.objectives.base import Rows, gather_ranges


class Packing:
    """Rows of a shard.

    Args:
        offsets: int64 [documents + 1], positions of the markers in the shard: one before each document, and one at the end.
        width: positions of a row.
    """

    def __init__(self, offsets: np.ndarray, width: int) -> None:
        self._width = width
        lengths = np.diff(offsets)
        full, rest = np.divmod(lengths, width)
        cut = gather_ranges(np.zeros_like(full), full) * width + np.repeat(offsets[:-1], full)
        packed = np.flatnonzero(rest)
        row = best_fit(rest[packed], width) + len(cut)
        order = np.argsort(row, kind="stable")
        self._starts = np.concatenate([cut, (offsets[:-1] + full * width)[packed][order]])
        self._lengths = np.concatenate([np.full_like(cut, width), rest[packed][order]])
        pieces = np.bincount(row, minlength=len(cut))
        pieces[: len(cut)] = 1
        self._first = np.cumsum(np.append(0, pieces))

    def __len__(self) -> int:
        return len(self._first) - 1

    def read(self, tokens: np.ndarray, rows_B: np.ndarray) -> Rows:
        """Some rows of the shard `tokens`."""
        counts_B = self._first[rows_B + 1] - self._first[rows_B]
        which = gather_ranges(self._first[rows_B], counts_B)
        starts, lengths = self._starts[which], self._lengths[which]
        row = np.repeat(np.arange(len(rows_B)), counts_B)
        real_BS = np.arange(self._width) < np.bincount(row, lengths, len(rows_B))[:, None]
        at = gather_ranges(starts, lengths)
        read = Rows(np.zeros(real_BS.shape, np.int64), np.zeros(real_BS.shape, np.int64), np.full(real_BS.shape, PADDING, np.int32))
        read.tokens_BS[real_BS] = tokens[at]
        read.next_BS[real_BS] = tokens[at + 1]
        read.segments_BS[real_BS] = np.repeat(gather_ranges(np.zeros_like(counts_B), counts_B), lengths)
        return read


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """int64: the bin of each item, best-fit decreasing; bins are numbered in the order in which they are opened.

    Args:
        sizes: int, 1 to capacity.
        capacity: of every bin.
    """
    bins = np.empty(len(sizes), np.int64)
    opened = 0
    with_room: dict[int, np.ndarray] = {}  # bins, by the room that they have left
    has_bins = np.zeros(capacity + 1, bool)
    order = np.argsort(sizes, kind="stable")[::-1]
    lengths, counts = np.unique(sizes, return_counts=True)
    done = 0
    for size, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        for room in [*(np.flatnonzero(has_bins[size:]) + size).tolist(), capacity]:
            if done == end:
                break
            each = room // size  # a bin stays the fullest one until it has no more room
            needed = ceil((end - done) / each)
            if room == capacity:
                taken, opened = np.arange(opened, opened + needed), opened + needed
            else:
                taken, with_room[room] = np.split(with_room[room], [needed])
                has_bins[room] = len(with_room[room]) > 0
            filled = np.repeat(taken, each)[: end - done]
            bins[order[done : done + len(filled)]] = filled
            done += len(filled)
            last = each - (len(taken) * each - len(filled))  # items in the last one taken
            for left, some in ((room - each * size, taken[:-1]), (room - last * size, taken[-1:])):
                if left and len(some):
                    with_room[left] = np.concatenate([with_room.get(left, some[:0]), some])
                    has_bins[left] = True
    return bins
