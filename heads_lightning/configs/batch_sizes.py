"""How many sequences each optimizer step reads: arithmetic, so that a position in the data is a number on any count of ranks."""

from __future__ import annotations

from typing import NamedTuple


class BatchSizes(NamedTuple):
    """A global batch that doubles from `start` up to `full` during the warm-up, each size for as many steps."""

    full: int
    """Sequences of a step after the warm-up: `start` times a power of two."""
    start: int
    """Sequences of the first steps; `full` without a warm-up."""
    warmup_steps: int
    """Steps before the first full one."""
    sequence_length: int
    """Positions of a sequence."""

    def at(self, step: int) -> int:
        """Sequences of step number `step` (0 is the first)."""
        return next(size for first, size in reversed(self._stages()) if step >= first)

    def sequences(self, steps: int) -> int:
        """Sequences of the first `steps` steps."""
        stages = self._stages()
        ends = [first for first, _ in stages[1:]] + [steps]
        return sum(size * max(min(end, steps) - first, 0) for (first, size), end in zip(stages, ends, strict=True))

    def tokens(self, steps: int) -> int:
        """Positions of the first `steps` steps."""
        return self.sequences(steps) * self.sequence_length

    def steps(self, tokens: int) -> int:
        """Steps that it takes to read so many positions, rounded up."""
        wanted, stages = -(-tokens // self.sequence_length), self._stages()
        first, size = next((stage for stage in reversed(stages) if self.sequences(stage[0]) < wanted), stages[0])
        return first + -(-(wanted - self.sequences(first)) // size)

    def _stages(self) -> list[tuple[int, int]]:
        """(first step, sequences of a step) of each size."""
        doublings = (self.full // self.start).bit_length() - 1
        return [(self.warmup_steps * number // max(doublings, 1), self.start << number) for number in range(doublings + 1)]
