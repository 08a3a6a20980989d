"""Streams of several groups of shards, by weight, as arithmetic: sample n is the k-th sample of one group, both computed from n alone.

Choices. Samples come in blocks of 1,024; each block has the same whole number of samples of a group (its quota), in an order of its own.
So shares are exact over every block, and the k-th sample of a group is a sum and a look into one block. Where a group may be passed over a
limited number of times, a block has what is left of it, and the blocks after it have none: its share goes to the others by their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from heads_lightning.batch import Examples
from heads_lightning.configs.data import Share
from heads_lightning.data.stream import SampleStream, concatenate, hash64, sample_key
from heads_lightning.registry import RunError

BLOCK = 1024


class _Phase(NamedTuple):
    """Blocks with the same quotas."""

    first_block: int
    blocks: int | None
    """None: for ever."""
    quotas: tuple[int, ...]
    before: tuple[int, ...]
    """Samples of each group before the phase."""


class MixedStream:
    """An endless, numbered sequence of examples from several streams; ends where every group has been read as often as it may be.

    Args:
        streams: of the groups; all of one objective and length.
        shares: of each, in the same order.
        sequence_length: positions of an example.
        seed: of the order within blocks.
        trained_before: positions that training has read before sample 0.
    """

    def __init__(
        self,
        streams: Sequence[SampleStream],
        shares: Sequence[Share],
        *,
        sequence_length: int,
        seed: int,
        trained_before: int | None = None,
    ) -> None:
        self._streams, self._seed = streams, seed
        self._sequence_length, self._trained_before = sequence_length, trained_before
        caps = [None if share.max_epochs is None else int(share.max_epochs * s.windows) for share, s in zip(shares, streams, strict=True)]
        self._phases = plan([share.weight for share in shares], caps)
        self._block = lru_cache(maxsize=16)(self._make_block)

    @property
    def windows(self) -> int:
        """Samples of one pass over everything."""
        return sum(stream.windows for stream in self._streams)

    @property
    def samples(self) -> int | None:
        """Samples there are. None: endless."""
        last = self._phases[-1]
        return None if last.blocks is None else sum(last.before) + last.blocks * sum(last.quotas)

    def examples(self, first_sample: int, count: int) -> Examples:
        """Samples first_sample … first_sample + count - 1, in order."""
        groups, numbers = self.places(first_sample, count)
        trained = None
        if self._trained_before is not None:
            trained = self._trained_before + (first_sample + np.arange(count)) * self._sequence_length
        parts, rows = [], []
        for group in np.unique(groups).tolist():
            which = np.flatnonzero(groups == group)  # their numbers are consecutive
            of_group = None if trained is None else trained[which]
            parts.append(self._streams[group].examples(int(numbers[which[0]]), len(which), of_group))
            rows.append(which)
        back = np.argsort(np.concatenate(rows))
        whole = parts[0] if len(parts) == 1 else concatenate(parts)
        return Examples._make(None if array is None else array[back] for array in whole)

    def places(self, first_sample: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [count] each: the group of every sample, and its number within the group."""
        if self.samples is not None and first_sample + count > self.samples:
            raise RunError(
                f"data.parts: every source has been read max_epochs times after {self.samples} sequences; raise one of the max_epochs"
            )
        groups, numbers = [], []
        for block in range(first_sample // BLOCK, (first_sample + count - 1) // BLOCK + 1):
            inside = slice(max(first_sample - block * BLOCK, 0), first_sample + count - block * BLOCK)
            group, number = self._block(block)
            groups.append(group[inside])
            numbers.append(number[inside])
        return np.concatenate(groups), np.concatenate(numbers)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        phase = next(phase for phase in reversed(self._phases) if block >= phase.first_block)
        quotas = np.array(phase.quotas)
        group = np.repeat(np.arange(len(quotas)), quotas)
        key = sample_key("mixture", self._seed, block)
        group = group[np.argsort(hash64(np.uint64(key) + np.arange(len(group), dtype=np.uint64)), kind="stable")]
        number = np.empty(len(group), np.int64)
        for k, quota in enumerate(phase.quotas):
            number[group == k] = phase.before[k] + (block - phase.first_block) * quota + np.arange(quota)
        return group, number


def plan(weights: Sequence[float], caps: Sequence[int | None]) -> list[_Phase]:
    """Phases in which the quotas stay the same: until a group is used up, one block with what is left of it, and on without it."""
    left = list(caps)
    active = [True] * len(weights)
    used = [0] * len(weights)
    phases: list[_Phase] = []
    block = 0

    def add(blocks: int | None, quotas: Sequence[int]) -> None:
        nonlocal block
        phases.append(_Phase(block, blocks, tuple(quotas), tuple(used)))
        if blocks is None:
            return
        block += blocks
        for k, quota in enumerate(quotas):
            used[k] += blocks * quota
            remaining = left[k]
            left[k] = None if remaining is None else remaining - blocks * quota

    while any(active):
        quotas = apportion(BLOCK, [w * a for w, a in zip(weights, active, strict=True)])
        full = [remaining // quota for remaining, quota in zip(left, quotas, strict=True) if remaining is not None and quota]
        if not full:
            add(None, quotas)
            break
        if min(full):
            add(min(full), quotas)
        ending = _last_block(weights, left, active)
        if sum(ending):
            add(1, ending)
        active = [a and remaining != 0 for a, remaining in zip(active, left, strict=True)]
    return phases


def _last_block(weights: Sequence[float], left: Sequence[int | None], active: Sequence[bool]) -> list[int]:
    """Quotas of a block in which some groups end: they give what they have, the others fill it, as far as they can."""
    fixed: dict[int, int] = {}
    while True:
        open_weights = [w * (a and k not in fixed) for k, (w, a) in enumerate(zip(weights, active, strict=True))]
        quotas = apportion(BLOCK - sum(fixed.values()), open_weights)
        over = {k: remaining for k, remaining in enumerate(left) if remaining is not None and quotas[k] > remaining}
        if not over:
            return [fixed.get(k, quota) for k, quota in enumerate(quotas)]
        fixed |= over


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights, of sum `total` (0 if all weights are): the largest remainders round up."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    exact = [total * w / whole for w in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts
