"""Loss implementations: the same cross-entropy of a linear projection, computed in several ways. One file each, named like the option.

`linear_cross_entropy` is the whole package as one function; heads call `loss_module(name).linear_cross_entropy_sum`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from heads_lightning.batch import IGNORE
from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.losses.base import Feature, LossImplementation, LossOptions, LossSum, Projection, VocabShard
from heads_lightning.losses.targets import Reduction, check_reduction, divisor, expected_grad, reduce_loss, select_rows
from heads_lightning.registry import ConfigError

__all__ = [
    "Feature",
    "LossImplementation",
    "LossOptions",
    "LossSum",
    "Projection",
    "VocabShard",
    "linear_cross_entropy",
    "loss_module",
    "unavailable",
]


_loaded: dict[str, ModuleType] = {}


def loss_module(name: LMLossImplementation | str) -> ModuleType:
    """The module of an implementation: `linear_cross_entropy_sum`, `unavailable()`, `FEATURES`. Imported only when asked for."""
    module = _loaded.get(name)
    if module is None:  # (a look-up can be part of a compiled graph, an import cannot)
        module = _loaded[name] = _import(name)
    return module


def _import(name: LMLossImplementation | str) -> ModuleType:
    try:
        option = LMLossImplementation(name)
    except ValueError:
        raise ConfigError(
            f"head.loss_implementation={name} does not exist; available: {', '.join(m.value for m in LMLossImplementation)}"
        ) from None
    return importlib.import_module(f"heads_lightning.losses.{option.value}")


def unavailable(name: LMLossImplementation | str) -> str | None:
    """Why the implementation cannot run on this machine, and the override that does; None when it can."""
    return loss_module(name).unavailable()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    implementation: LMLossImplementation | str = LMLossImplementation.auto,
    ignore_index: int = IGNORE,
    reduction: Reduction = "mean",
    z_loss_multiplier: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
    num_classes: int | None = None,
    shard: VocabShard | None = None,
    num_targets: int | None = None,
    div_factor: float | Tensor | None = None,
    token_metrics: bool = False,
) -> LossSum:
    """Cross-entropy of softmax(hidden @ weight.T + bias), with its gradient, without the logits.

    Args:
        hidden: [..., D], any floating type.
        weight: [V, D].
        labels: int64 [...], aligned with hidden: nothing is shifted.
        bias: [V].
        implementation: how it is computed; the result is the same within rounding.
        ignore_index: label of positions that do not count; they are dropped before the product.
        reduction: `mean` over the targets (their class weights summed, where given), `sum`, or `none` (the shape of labels).
        z_loss_multiplier: m of m·logsumexp(logits)²; 0 is off.
        label_smoothing: share of the target probability spread over all classes.
        softcap: bound c of the logits, c·tanh(logits / c).
        class_weights: fp32 [V].
        weights: fp32, shape of labels: weight of each position's loss. They do not change the divisor of `mean`.
        num_classes: rows of weight that are real; the rest is padding that is never predicted.
        shard: weight and bias are this rank's rows of a vocabulary that a process group shares (`vocab_parallel.vocab_shard`); every rank
            passes the same hidden states and labels and returns the same loss. `default`, `chunked` and `auto`.
        num_targets: number of labels that are not ignore_index, when the host knows it: no waiting for the device.
        div_factor: also divides the result; 0 counts as 1, so that nothing over nothing is 0.
        token_metrics: also return the number of hits and the summed entropy.

    Returns:
        LossSum, reduced. Only `total` carries a gradient.

    Raises:
        ValueError: a label is out of range, shapes disagree, or num_targets is wrong.
    """
    projection = Projection(weight, bias, softcap, num_classes, shard)
    check_reduction(reduction)
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"labels {list(labels.shape)} and weight {list(weight.shape)} do not fit hidden states {list(hidden.shape)}")
    rows = select_rows(labels, weights, projection.classes, ignore_index, num_targets)
    divided_by = divisor(reduction, rows, ignore_index, class_weights, div_factor)
    options = LossOptions(
        ignore_index=ignore_index,
        z_loss_multiplier=z_loss_multiplier,
        label_smoothing=label_smoothing,
        class_weights_V=class_weights,
        per_token=reduction == "none",
        token_metrics=token_metrics,
        all_targets=rows.all_targets,
        expected_grad=1.0 if reduction == "none" else expected_grad(divided_by),
    )
    hidden_ND = rows.select(hidden.reshape(-1, hidden.shape[-1]))
    compute = loss_module(implementation).linear_cross_entropy_sum
    return reduce_loss(compute(hidden_ND, projection, rows.labels_N, options, rows.weights_N), rows, labels.shape, reduction, divided_by)
