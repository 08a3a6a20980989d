"""Sums of losses and counts of a run, divided once by whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heads_lightning.batch import IGNORE, Batch
from heads_lightning.heads.base import HeadLoss
from heads_lightning.precision import widest_float


class Totals:
    """Sums of losses and counts, kept as tensors until somebody reads them: adding never synchronises with the device."""

    def __init__(self, num_parts: int = 0, num_statistics: int = 0) -> None:
        self.num_parts = num_parts
        self.num_statistics = num_statistics
        self.clear()

    def clear(self) -> None:
        """Back to zero."""
        self._tensors: dict[str, Tensor] = {}
        self.by_step: list[tuple[Tensor, int, Tensor]] = []
        """Of each finished step: loss summed and targets on this rank, norm of the gradient."""
        self._of_step: dict[str, Tensor] = {}
        self._targets_of_step = 0
        self.targets_seen = 0
        """Those of skipped steps too."""
        self.targets = 0
        self.positions = 0
        self.padding = 0
        self.steps = 0
        self.good_steps = 0

    def add(self, output: HeadLoss, batch: Batch) -> None:
        """Add a training micro-batch."""
        for name, value in output.sums.items():
            _accumulate(self._of_step, name, value)
        self._targets_of_step += batch.counted
        self.positions += batch.tokens_BS.numel()
        self.padding += batch.num_padding

    def finish_step(self, norm: Tensor, *, counts: bool = True) -> None:
        """Count an optimizer step with this gradient norm. One that is skipped (not `counts`) has no part in the means."""
        if counts:
            for name, value in self._of_step.items():
                _accumulate(self._tensors, name, value)
            _accumulate(self._tensors, "grad_norm", norm)
            self.targets += self._targets_of_step
            self.good_steps += 1
        self.targets_seen += self._targets_of_step
        if "loss" in self._of_step:
            self.by_step.append((self._of_step["loss"], self._targets_of_step, norm))
        self._of_step, self._targets_of_step = {}, 0
        self.steps += 1

    def add_tokens(self, output: HeadLoss, batch: Batch) -> None:
        """Add a micro-batch whose losses are per target."""
        losses_BS = _wide(output.loss)  # times the weights, where there are any
        if output.statistics is not None:
            _accumulate(self._tensors, "statistics", output.statistics)
        _accumulate(self._tensors, "loss", losses_BS.sum())
        self.targets += batch.counted
        self._add_parts(self._tensors, output, batch)

    def add_parts(self, output: HeadLoss, batch: Batch) -> None:
        """Add to the loss of each part in a training micro-batch, from losses that are per target."""
        self._add_parts(self._of_step, output, batch)

    def _add_parts(self, sums: dict[str, Tensor], output: HeadLoss, batch: Batch) -> None:
        losses_BS = _wide(output.loss)
        for i in range(self.num_parts):
            inside_BS = (batch.labels_BS != IGNORE) & _part_is(batch, i)
            _accumulate(sums, f"part_loss_{i}", losses_BS.masked_fill(~inside_BS, 0.0).sum())
            # a part is reported as the mean over its own targets, each with its weight: a weight of the whole part cancels
            counts_BS = inside_BS if batch.weights_BS is None else inside_BS * batch.weights_BS
            _accumulate(sums, f"part_targets_{i}", _wide(counts_BS).sum())

    def read(self) -> dict[str, float]:
        """The sums as numbers (this is where the host waits for the device)."""
        return {name: float(value) for name, value in self._tensors.items() if value.ndim == 0}

    def part_means(self, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
        """`loss_NAME` of every part that has targets, from what `read` gave, summed over the ranks."""
        targets = [sums.get(f"part_targets_{i}", 0.0) for i in range(self.num_parts)]
        return {f"loss_{name}": sums[f"part_loss_{i}"] / targets[i] for i, name in enumerate(names) if targets[i]}

    def over_ranks(self, total: Callable[[list[float]], list[float]]) -> Sums:
        """Sums over all ranks. `total` sums a list of numbers over them."""
        values = self.read()
        flat = [values.get("loss", 0.0), float(self.targets)]
        flat += [values.get(f"part_loss_{i}", 0.0) for i in range(self.num_parts)]
        flat += [values.get(f"part_targets_{i}", 0.0) for i in range(self.num_parts)]
        # a rank without a batch has none
        flat += self._tensors["statistics"].tolist() if "statistics" in self._tensors else [0.0] * self.num_statistics
        flat = total(flat)
        k = self.num_parts
        return Sums(flat[0], int(flat[1]), flat[2 : 2 + k], flat[2 + k : 2 + 2 * k], flat[2 + 2 * k :])


class Sums(NamedTuple):
    """Sums over all ranks: losses (in nats over a vocabulary), counts of targets, and what the head counts."""

    loss: float
    targets: int
    part_losses: list[float]
    part_targets: list[float]
    statistics: list[float]


def _part_is(batch: Batch, part: int) -> Tensor:
    if batch.part_BS is None:
        return torch.full_like(batch.labels_BS, part == 0, dtype=torch.bool)
    return batch.part_BS == part


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(widest_float(value.device))


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    held = sums.get(name)
    sums[name] = _wide(value) if held is None else held + value.detach()
