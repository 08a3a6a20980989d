"""`cce`: Apple's cut cross-entropy (Wijmans et al., arXiv 2411.09009): tiles of logits never leave the GPU's cache; they are computed again
in the backward pass, so four products instead of three, and no chunk in memory.

An optional package under Apple's own licence (pip install cut-cross-entropy; 25.1.1 is what the index has). Its default mode skips small
gradients, which costs accuracy in pre-training: here it skips none. It trains in 16 bits alone. The version of its repository knows more
than the one of the index; of that, an fp32 sum of the gradients is asked for where it exists.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor

from heads_lightning.losses.base import Feature, LossOptions, LossSum, Projection
from heads_lightning.losses.foreign import INTERPRETED, MASKED, guarded, loss_sum, operands, triton_unavailable

FEATURES = frozenset(
    {Feature.padded_vocabulary, Feature.token_weights, Feature.per_token, Feature.frozen_hidden}
    | (set() if INTERPRETED else {Feature.softcap})
)


def unavailable() -> str | None:
    """The package has to be installed and its Triton kernels need a GPU."""
    return triton_unavailable("cce", "cut_cross_entropy", "pip install cut-cross-entropy")


@guarded("cce", FEATURES, unavailable, on_gpu=True)
def linear_cross_entropy_sum(
    hidden_ND: Tensor, projection: Projection, labels_N: Tensor, options: LossOptions, weights_N: Tensor | None = None
) -> LossSum:
    """See LossImplementation."""
    hidden_ND, weight_VD, _ = operands(hidden_ND, projection)
    function, exact = _cut_cross_entropy()
    loss_N = function(hidden_ND, weight_VD, labels_N, ignore_index=MASKED, softcap=projection.softcap, reduction="none", **exact)
    return loss_sum(loss_N, None, weights_N, options)


@cache
def _cut_cross_entropy() -> tuple[Any, dict[str, Any]]:
    """The function, and the arguments that make it skip no gradient."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    has_exact_mode = "accum_c_fp32" in inspect.signature(linear_cross_entropy).parameters
    return linear_cross_entropy, {"impl": "cce_exact"} if has_exact_mode else {"impl": "cce", "filter_eps": None}
