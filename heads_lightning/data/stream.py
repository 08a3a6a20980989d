"""The order of samples: arithmetic, so that any sample can be made at any time, in any process, without the ones before it.

Sample n is window `n % windows` of epoch `n // windows`, after a permutation of the windows that is computed, not stored. Each epoch
shifts all windows of a shard by a random number of tokens, so that no token is at the edge of a window for ever. Windows do not cross
shards. What is random in the transform is keyed by (seed, epoch, window), so order, batch, worker and rank counts change nothing.

Where an objective reads whole documents, the windows are the rows of a table (data.packing), the same in every epoch; the rest holds.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from heads_lightning.batch import Examples
from heads_lightning.data.packing import Packing
from heads_lightning.data.shards import Shard
from heads_lightning.objectives.base import Objective, Rows, SampleRandom

_ROUNDS = 10
"""Fewer show in a chi-square of where each of a handful of windows goes."""
_LEAST_BITS = 4
_BLOCK = 4096
"""Samples whose places are computed together: permuting 32 indices costs as much as reading 32 windows, 4,096 not much more."""


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of 0 … size-1 takes the indices: int64, the same shape, no table.

    A Feistel network over the next power of two (16 at least), walked until it lands below `size` again (Black & Rogaway 2002, section 3).

    Args:
        indices: int, each below size.
        size: of the permuted range.
        key: which permutation.
    """
    bits = max(_LEAST_BITS, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    masks = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    keys = hash64(np.uint64(key % 2**64) + np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    result = np.array(indices, np.uint64).ravel()
    walking = np.arange(len(result))
    while len(walking):
        right, left = result[walking] & masks[0], result[walking] >> low
        for i in range(0, _ROUNDS, 2):
            left ^= hash64(right ^ keys[i]) & masks[1]
            right ^= hash64(left ^ keys[i + 1]) & masks[0]
        result[walking] = (left << low) | right
        walking = walking[result[walking] >= np.uint64(size)]
    return result.astype(np.int64).reshape(np.shape(indices))


def hash64(x: np.ndarray | np.uint64) -> np.ndarray:
    """MurmurHash3's finaliser: a bijection of uint64."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        return x ^ (x >> np.uint64(33))


def sample_key(*numbers: int | str) -> int:
    """64 bits that depend on every number; no two uses of randomness share a key, because each starts with its own word."""
    key = 0
    for number in numbers:
        word = zlib.crc32(number.encode()) if isinstance(number, str) else number
        key = (key + word * 0x9E3779B97F4A7C15 + 1) % 2**64
        key = ((key ^ (key >> 33)) * 0xFF51AFD7ED558CCD) % 2**64  # as _hash, in integers of Python: a few at a time
        key = ((key ^ (key >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
        key ^= key >> 33
    return key


class SampleStream:
    """An endless, numbered sequence of examples from the shards of a split.

    Args:
        shards: of the split; those shorter than a window are never used.
        objective: makes the examples.
        sequence_length: positions of an example.
        seed: of order, phases and transforms.
        shift: False: windows start at the same places in every epoch, the first at 0 (for validation).
        trained_before: positions that training has read before sample 0, for what follows a schedule. None: schedules have ended.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        objective: Objective,
        *,
        sequence_length: int,
        seed: int,
        shift: bool = True,
        trained_before: int | None = None,
    ) -> None:
        self._trained_before = trained_before
        self._shards, self._objective, self._sequence_length = shards, objective, sequence_length
        self._seed, self._shift = seed, shift
        self._window = objective.window(sequence_length)
        self._packings = [Packing(shard.offsets, sequence_length) for shard in shards] if objective.whole_documents else None
        counts = [len(p) for p in self._packings] if self._packings else [self._count(len(shard.tokens)) for shard in shards]
        self._first_window = np.cumsum([0, *counts])
        self._block: tuple[int, int, np.ndarray] = (-1, -1, np.zeros(0, np.int64))
        self._rewritten: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @property
    def windows(self) -> int:
        """Samples of one epoch."""
        return int(self._first_window[-1])

    def examples(self, first_sample: int, count: int, trained: np.ndarray | None = None) -> Examples:
        """Samples first_sample … first_sample + count - 1, in order.

        Args:
            first_sample, count: which.
            trained: int [count], positions trained before each, where that does not follow from its number (a mixture of streams).
        """
        if trained is None and self._trained_before is not None:
            trained = self._trained_before + (first_sample + np.arange(count)) * self._sequence_length
        runs, done = [], 0
        for epoch, indices_B in self._epochs(first_sample, count):
            runs.append(self._of_epoch(epoch, indices_B, None if trained is None else trained[done : done + len(indices_B)]))
            done += len(indices_B)
        return runs[0] if len(runs) == 1 else concatenate(runs)

    def _epochs(self, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, windows) of consecutive samples."""
        while count > 0:
            epoch, place = divmod(first, self.windows)
            taken = min(count, self.windows - place)
            yield epoch, self._order(epoch, place, place + taken)
            first, count = first + taken, count - taken

    def _order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Windows at the places start … stop-1 of an epoch."""
        blocks = range(start // _BLOCK, (stop - 1) // _BLOCK + 1)
        return np.concatenate([self._block_of(epoch, b)[max(start - b * _BLOCK, 0) : stop - b * _BLOCK] for b in blocks])

    def _block_of(self, epoch: int, block: int) -> np.ndarray:
        cached = self._block
        if cached[:2] != (epoch, block):
            places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.windows))
            cached = self._block = epoch, block, permute(places, self.windows, sample_key("order", self._seed, epoch))
        return cached[2]

    def _of_epoch(self, epoch: int, indices_B: np.ndarray, trained: np.ndarray | None) -> Examples:
        rng = SampleRandom(self._seed, epoch, indices_B, trained)
        if self._packings is not None:
            return self._objective.examples_of_documents(self._read_documents(self._packings, indices_B), rng)
        runs = list(self._by_shard(indices_B))
        if len(runs) == 1:
            tokens_BR = self._read(epoch, runs[0][0], indices_B)
        else:
            tokens_BR = np.empty((len(indices_B), self._window.length), self._shards[0].tokens.dtype)
            for shard, rows in runs:
                tokens_BR[rows] = self._read(epoch, shard, indices_B[rows])
        return self._objective.examples(tokens_BR, rng, self._sequence_length)

    def _by_shard(self, indices_B: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Shards that windows are in, and which of the windows."""
        shards_B = np.searchsorted(self._first_window, indices_B, side="right") - 1
        for shard in np.unique(shards_B).tolist():
            yield shard, np.flatnonzero(shards_B == shard)

    def _read_documents(self, packings: Sequence[Packing], indices_B: np.ndarray) -> Rows:
        shape = len(indices_B), self._sequence_length
        read = Rows(np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int32))
        for shard, rows in self._by_shard(indices_B):
            some = packings[shard].read(self._shards[shard].tokens, indices_B[rows] - self._first_window[shard])
            for whole, part in zip(read, some, strict=True):
                whole[rows] = part
        return read

    def _read(self, epoch: int, shard: int, windows_B: np.ndarray) -> np.ndarray:
        """[B, R]: windows of one shard, copied from the file in one go."""
        stream, length = self._stream(epoch, shard), self._window.length
        starts_B = (windows_B - self._first_window[shard]) * self._window.stride + self._phase(epoch, shard, len(stream))
        return sliding_window_view(stream, length)[starts_B]

    def _count(self, stream_tokens: int) -> int:
        """Windows of a shard: as many as leave room to shift them by any number of tokens below the stride, but one if one fits."""
        if stream_tokens < self._window.length:
            return 0
        spare = self._window.stride - 1 if self._shift else 0
        return max(1, (stream_tokens - self._window.length - spare) // self._window.stride + 1)

    def _phase(self, epoch: int, shard: int, stream_tokens: int) -> int:
        """Tokens that all windows of a shard are shifted by in this epoch: anything that the shard has room for."""
        if not self._shift:
            return 0
        windows = int(self._first_window[shard + 1] - self._first_window[shard])
        room = stream_tokens - self._window.length - (windows - 1) * self._window.stride
        return sample_key("phase", self._seed, epoch, shard) % (room + 1)

    def _stream(self, epoch: int, shard: int) -> np.ndarray:
        tokens = self._shards[shard].tokens
        return self._rewrite(epoch, shard, tokens) if self._objective.rewrites_stream else tokens

    def _rewrite(self, epoch: int, shard: int, tokens: np.ndarray) -> np.ndarray:
        """The shard as this epoch sees it. Kept for two epochs, because a step may straddle them: as much memory as twice the data."""
        key = (epoch, shard)
        if key not in self._rewritten:
            rewritten = self._objective.rewrite(tokens, sample_key("rewrite", self._seed, shard) >> 1, epoch)
            assert len(rewritten) >= len(tokens), "a rewritten stream must not be shorter"
            self._rewritten[key] = rewritten.astype(tokens.dtype)
            for old in [k for k in self._rewritten if abs(k[0] - epoch) > 1]:
                del self._rewritten[old]
        return self._rewritten[key]


def concatenate(parts: Sequence[Examples]) -> Examples:
    """One batch of several; optional arrays are there in all or in none."""
    columns = zip(*parts, strict=True)
    return Examples._make(None if column[0] is None else np.concatenate(column) for column in columns)


def rows_of(examples: Examples, start: int, stop: int) -> Examples:
    """Some rows of a batch, as views."""
    return Examples._make(None if array is None else array[start:stop] for array in examples)
