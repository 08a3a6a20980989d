"""Templates applied to whole states. What does not correspond completely is an error that names keys and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from heads_lightning.conversion.mapping import SHOWN, Bounds, ConversionError, StateMapping, StateMappingTemplate, StateType, listed

if TYPE_CHECKING:
    from torch import Tensor


class StateConverter:
    """Applies templates to whole states.

    Args:
        mapping_templates: the correspondence, weights and modules together.
    """

    def __init__(self, mapping_templates: Iterable[StateMappingTemplate]) -> None:
        self.mapping_templates = list(mapping_templates)

    def inverse(self) -> StateConverter:
        """The converter in the other direction."""
        return StateConverter([template.inverse() for template in self.mapping_templates])

    def get_mappings(
        self, state_dict: Mapping[str, object], placeholder_bounds: Bounds | None = None, state_type: StateType = StateType.weight
    ) -> list[StateMapping]:
        """The mappings that apply to a state.

        Args:
            state_dict: tensors by name; their names, shapes and types count, so they may lie on meta. For modules any values.
            placeholder_bounds: how many values each placeholder has. Templates with another placeholder do not apply.
            state_type: which templates are meant.

        Raises:
            ConversionError: for weights, a source missing or never used, a destination made twice, or a value that is no tensor.
        """
        bounds = placeholder_bounds or {}
        if state_type == StateType.weight:
            _check_tensors(state_dict)
        found: list[StateMapping] = []
        missing: list[str] = []
        for template in self.mapping_templates:
            if template.state_type != state_type:
                continue
            for mapping in template.mappings(bounds):
                absent = [key for key in mapping.source_keys if key not in state_dict]
                if not absent:
                    found.append(mapping)
                elif not (template.optional and len(absent) == len(mapping.source_keys)):
                    missing += absent
        if state_type == StateType.weight:
            self._check_complete(state_dict, found, missing, bounds)
        return found

    def _check_complete(self, state_dict: Mapping[str, object], found: list[StateMapping], missing: list[str], bounds: Bounds) -> None:
        used = {key for mapping in found for key in mapping.source_keys}
        unused = [key for key in state_dict if key not in used]
        made = Counter(key for mapping in found for key in mapping.dest_keys)
        twice = [
            f"{key} (from {' and from '.join(listed(m.source_keys) for m in found if key in m.dest_keys)})"
            for key, n in made.items()
            if n > 1
        ]
        unbound = sorted(frozenset().union(*(t.bounds_needed for t in self.mapping_templates)) - {str(name) for name in bounds})
        problems = []
        if missing:
            problems.append(f"the source lacks {listed(set(missing))}")
        if unused:
            hint = f" (no bound was given for {', '.join(unbound)})" if unbound else _bounds_hint(unused, bounds)
            problems.append(f"these of the source correspond to nothing: {listed(_with_shape(key, state_dict) for key in unused)}{hint}")
        if twice:
            problems.append(f"made twice: {'; '.join(twice[:SHOWN])}")
        if problems:
            raise ConversionError("; ".join(problems))

    def convert(
        self, state_dict: Mapping[str, Tensor], placeholder_bounds: Bounds | None = None, state_type: StateType = StateType.weight
    ) -> dict[str, Tensor]:
        """The converted state, checked as a whole on meta first. Arguments and errors as in get_mappings."""
        mappings = self.get_mappings(state_dict, placeholder_bounds, state_type)
        for mapping in mappings:
            mapping.apply([state_dict[key].detach().to("meta") for key in mapping.source_keys])
        converted: dict[str, Tensor] = {}
        for mapping in mappings:
            converted |= zip(mapping.dest_keys, mapping.apply([state_dict[key] for key in mapping.source_keys]), strict=True)
        return converted


def _check_tensors(state_dict: Mapping[str, object]) -> None:
    import torch

    others = [f"{key} ({type(value).__name__})" for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(f"not tensors: {listed(others)}")


def _with_shape(key: str, state_dict: Mapping[str, object]) -> str:
    return f"{key} {list(getattr(state_dict[key], 'shape', ()))}"


def _bounds_hint(unused: Sequence[str], bounds: Bounds) -> str:
    """Where a number in an unused key is not below a bound, say so: the usual reason."""
    largest = max((int(n) for key in unused for n in re.findall(r"\.(\d+)\.", key)), default=-1)
    small = [f"{name} has the bound {bound}" for name, bound in bounds.items() if largest >= bound]
    return f" ({', '.join(small)})" if small else ""
