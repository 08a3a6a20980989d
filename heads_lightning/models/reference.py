"""Reference models: what a policy is held against while it learns."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy in evaluation mode. Of `num_shared_layers` layers, and what stands before them, the very parameters are shared.

    Shared parameters are frozen in `model` too, so that an optimizer step changes neither.

    Args:
        model: to copy; not sharded.
        num_shared_layers: first layers to share. None: a copy of everything.
        pattern: how a layer is named, e.g. "transformer.h.{layer}". None: found by the usual names (h, layers, layer, block, blocks).

    Raises:
        ValueError: no parameter belongs to the first layer that is not shared.
    """
    shared = [] if num_shared_layers is None else _parameters_before(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


def _parameters_before(model: nn.Module, layer: int, pattern: str | None) -> list[nn.Parameter]:
    named = list(model.named_parameters())
    wanted = rf"(^|\.)(h|layers|layer|block|blocks)\.{layer}\." if pattern is None else rf"{re.escape(pattern.format(layer=layer))}(\.|$)"
    first = next((i for i, (name, _) in enumerate(named) if re.search(wanted, name)), None)
    if first is None:
        raise ValueError(f"no parameter of {type(model).__name__} belongs to layer {layer}; give pattern, e.g. 'transformer.h.{{layer}}'")
    return [parameter for _, parameter in named[:first]]
