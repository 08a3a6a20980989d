"""From positions to rows and back: labels are checked, rows without a target are dropped before anything is computed of them, sums are
divided once.

Masked language models label 15 % of the positions; dropping the rest first saves the other 85 % of the head's work. The number of
targets is known on the host (`Batch.num_targets`); given, no device has to be waited for.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from heads_lightning.losses.base import LossSum

Reduction = Literal["mean", "sum", "none"]
STATIC_ROWS = 64
"""Under torch.compile the number of rows is rounded up to a multiple of this, so that few shapes are compiled."""


class Rows(NamedTuple):
    """The rows of the loss, out of M positions."""

    index_N: Tensor | None
    """Position of each row; -1 for one that fills up a static shape. None: rows are positions, targets or not."""
    labels_N: Tensor
    weights_N: Tensor | None
    num_targets: int | None
    """Rows that have a target, where the host knows."""
    all_targets: bool
    """Every row has one."""

    def select(self, values_MD: Tensor) -> Tensor:
        """The rows of a tensor over positions."""
        if self.index_N is None:
            return values_MD
        return values_MD.index_select(0, self.index_N if self.all_targets else self.index_N.clamp(min=0))

    def scatter(self, values_N: Tensor, positions: int) -> Tensor:
        """The inverse: 0 at positions that are no row."""
        if self.index_N is None:
            return values_N
        index_N = self.index_N if self.all_targets else self.index_N.clamp(min=0)  # what fills up adds an exact 0
        return values_N.new_zeros(positions).index_add(0, index_N, values_N)


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse a label outside [0, num_classes) that is not ignore_index.

    On the CPU a ValueError names the first position. On a GPU, and under torch.compile, the check is an asynchronous device assertion:
    nothing waits for it, and a failure surfaces at a later call (and ends the process's CUDA context, as indexing out of range does).
    """
    if labels.is_meta:
        return
    _check_type(labels)
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if torch.compiler.is_compiling() or labels.device.type == "cuda":
        torch._assert_async(~outside.any(), f"a label is outside 0..{num_classes - 1} and is not ignore_index={ignore_index}")
    elif bool(outside.any()):
        position = tuple(outside.nonzero()[0].tolist())
        where = position[0] if len(position) == 1 else position
        raise ValueError(
            f"label {int(labels[position])} at position {where} is outside 0..{num_classes - 1} "
            f"(a vocabulary of {num_classes}) and is not ignore_index={ignore_index}"
        )


def _check_type(labels: Tensor) -> None:
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise ValueError(f"labels are ids of classes, whole numbers, and not {labels.dtype}")


def select_rows(labels: Tensor, weights: Tensor | None, num_classes: int, ignore_index: int, num_targets: int | None = None) -> Rows:
    """The rows that have a target, of labels and weights [...]; labels are checked, see check_labels.

    Under torch.compile their number is static: `num_targets` rounded up; without `num_targets` there, all rows stay and are masked later.
    """
    _check_type(labels)
    select = _static_rows if torch.compiler.is_compiling() else _rows
    rows = select(labels.reshape(-1).long(), None if weights is None else weights.reshape(-1), ignore_index, num_targets)
    looked_at = rows.all_targets and labels.device.type == "cpu" and _in_range(rows.labels_N, num_classes)
    if not looked_at:
        check_labels(labels, num_classes, ignore_index)
    return rows


def _in_range(labels_N: Tensor, num_classes: int) -> bool:
    if not labels_N.numel():
        return True
    least, most = labels_N.aminmax()
    return int(least) >= 0 and int(most) < num_classes


def _static_rows(labels_M: Tensor, weights_M: Tensor | None, ignore_index: int, num_targets: int | None) -> Rows:
    positions = labels_M.shape[0]
    everything = Rows(None, labels_M, weights_M, num_targets, all_targets=False)
    size = positions if num_targets is None else (num_targets + STATIC_ROWS - 1) // STATIC_ROWS * STATIC_ROWS
    if size >= positions:
        return everything
    index_N = torch.nonzero_static(labels_M != ignore_index, size=size, fill_value=-1).squeeze(1)
    rows = everything._replace(index_N=index_N)
    return rows._replace(
        labels_N=torch.where(index_N < 0, ignore_index, rows.select(labels_M)),
        weights_N=None if weights_M is None else rows.select(weights_M),
    )


def _rows(labels_M: Tensor, weights_M: Tensor | None, ignore_index: int, num_targets: int | None) -> Rows:
    """num_targets is taken at its word for shapes where the number would have to be waited for, so it must be true."""
    valid_M = labels_M != ignore_index
    everything = Rows(None, labels_M, weights_M, labels_M.shape[0], all_targets=True)
    if num_targets is not None and labels_M.device.type == "cuda":
        torch._assert_async(valid_M.sum() == num_targets, f"num_targets={num_targets} is not the number of targets")
        if num_targets == everything.num_targets:
            return everything
        index_N = torch.nonzero_static(valid_M, size=num_targets).squeeze(1)
    else:
        index_N = valid_M.nonzero().squeeze(1)
        if num_targets not in (None, index_N.shape[0]):
            raise ValueError(f"num_targets={num_targets}, but {index_N.shape[0]} labels are not ignore_index")
    if index_N.shape[0] == everything.num_targets:
        return everything
    rows = everything._replace(index_N=index_N, num_targets=index_N.shape[0])
    return rows._replace(labels_N=rows.select(labels_M), weights_N=None if weights_M is None else rows.select(weights_M))


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that does not exist."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"{reduction} is not a valid value for reduction; allowed: {', '.join(get_args(Reduction))}")


def divisor(
    reduction: Reduction, rows: Rows, ignore_index: int, class_weights_V: Tensor | None, div_factor: float | Tensor | None
) -> float | Tensor:
    """What the summed loss is divided by. A zero counts as 1: no targets give a loss of 0, not 0 ÷ 0."""
    result: float | Tensor = 1.0
    if reduction == "mean":
        result = _mean_divisor(rows, ignore_index, class_weights_V)
    if div_factor is not None:
        result = _nonzero(result) * _nonzero(div_factor)
    return _nonzero(result)


def _mean_divisor(rows: Rows, ignore_index: int, class_weights_V: Tensor | None) -> float | Tensor:
    if class_weights_V is None:
        return float(rows.num_targets) if rows.num_targets is not None else (rows.labels_N != ignore_index).sum()
    valid_N = rows.labels_N != ignore_index
    return torch.where(valid_N, class_weights_V[torch.where(valid_N, rows.labels_N, 0)], 0.0).sum()


def _nonzero(value: float | Tensor) -> float | Tensor:
    return torch.where(value == 0, 1, value) if isinstance(value, Tensor) else float(value) or 1.0


def expected_grad(divided_by: float | Tensor) -> float:
    """LossOptions.expected_grad for a sum that is divided so; 1 where the host cannot know without waiting for a device."""
    if not isinstance(divided_by, Tensor):
        return 1.0 / divided_by
    known = divided_by.numel() == 1 and divided_by.device.type == "cpu" and not torch.compiler.is_compiling()
    return 1.0 / float(divided_by) if known else 1.0


def reduce_loss(loss: LossSum, rows: Rows, shape: torch.Size, reduction: Reduction, divided_by: float | Tensor) -> LossSum:
    """The three losses, divided, and back in the shape of the labels for `none`. Metrics stay sums."""

    def place(value: Tensor | None) -> Tensor | None:
        return value if value is None or reduction != "none" else rows.scatter(value, shape.numel()).reshape(shape)

    def finish(value: Tensor | None) -> Tensor | None:
        placed = place(value)
        return placed if placed is None or (isinstance(divided_by, float) and divided_by == 1) else placed / divided_by

    total, cross_entropy = finish(loss.total), finish(loss.cross_entropy)
    assert total is not None
    assert cross_entropy is not None
    return LossSum(total, cross_entropy, finish(loss.z_loss), place(loss.correct), place(loss.entropy))
