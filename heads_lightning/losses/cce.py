"""`cce`: Apple's cut cross-entropy (Wijmans et al., arXiv 2411.09009): tiles of logits never leave the GPU's cache; they are computed again
in the backward pass, so four products instead of three, and no chunk in memory.

An optional package under Apple's own licence (pip install cut-cross-entropy). Its exact mode is used: the default one skips small
gradients, which costs accuracy in pre-training. What it does not do is computed by `chunked`, and the log says so once.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heads_lightning.losses import chunked
from heads_lightning.losses.base import (
    Feature,
    LossOptions,
    LossSum,
    Projection,
    features_of,
    mask_ignored,
    matmul_dtype,
    report_fallback,
)
from heads_lightning.registry import ConfigError

FEATURES = frozenset(
    {
        Feature.bias,
        Feature.softcap,
        Feature.padded_vocabulary,
        Feature.token_weights,
        Feature.per_token,
        Feature.frozen_hidden,
    }
)
MASKED = -100


def unavailable() -> str | None:
    """The package has to be installed and its Triton kernels need a GPU."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return (
            "head.loss_implementation=cce needs the package cut-cross-entropy, which is not installed here "
            "(pip install cut-cross-entropy); head.loss_implementation=chunked computes the same loss"
        )
    if not torch.cuda.is_available():
        return (
            "head.loss_implementation=cce needs a GPU, and this machine has none; head.loss_implementation=chunked computes the same loss"
        )
    return None


def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    if reason := unavailable():
        raise ConfigError(reason)
    missing = features_of(hidden_ND, projection, options, weights_N) - FEATURES
    if missing:
        report_fallback("cce", missing)
        return chunked.linear_cross_entropy_sum(hidden_ND, projection, labels_N, options, weights_N)
    ignored_N = None if options.all_targets else labels_N == options.ignore_index
    hidden_ND, labels_N, weights_N = mask_ignored(hidden_ND, labels_N, weights_N, options)
    if ignored_N is not None:
        labels_N = torch.where(ignored_N, MASKED, labels_N)
    if hidden_ND.shape[0] == 0:
        total = hidden_ND.sum() + 0 * projection.weight_VD.sum()
        total = hidden_ND.sum(1).float() if options.per_token else total.float()
        return LossSum(total, total.detach(), None)
    loss_N = _call(hidden_ND, projection, labels_N).float()
    if weights_N is not None:
        loss_N = loss_N * weights_N
    total = loss_N if options.per_token else loss_N.sum()
    return LossSum(total, total.detach(), None)


def _call(hidden_ND: Tensor, projection: Projection, labels_N: Tensor) -> Tensor:
    dtype = matmul_dtype(hidden_ND, projection.weight_VD)
    bias_V = None if projection.bias_V is None else projection.bias_V[: projection.classes].to(dtype)
    return _cut_cross_entropy()(
        hidden_ND.to(dtype),
        projection.weight_VD[: projection.classes].to(dtype),
        labels_N,
        bias=bias_V,
        ignore_index=MASKED,
        softcap=projection.softcap,
        reduction="none",
        impl="cce_exact",
    )


@cache
def _cut_cross_entropy() -> Any:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return linear_cross_entropy
