"""How the weights of two models correspond, declared once and applied in either direction.

A template names keys with placeholders (`model.layers.[layer].mlp.up_proj.weight`); bounds turn it into mappings, and a mapping turns some
tensors into others, always in this order:

    concatenate the sources → slice → unflatten → permute → flatten → split into the destinations

That pipeline read backwards has the same form, which is why `inverse()` exists. Names and order are those of OLMo-core's converter.
Choices: everything is checked on names and shapes before the first byte moves; nothing is skipped, overwritten or promoted in silence.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from heads_lightning.registry import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHOWN = 6
"""Names listed in a message before it says how many more there are."""


class ConversionError(RunError):
    """Two models do not correspond as declared; the message names keys and shapes."""


class NotInvertibleError(ValueError):
    """A template that loses what its inverse would need."""


class StateType(StrEnum):
    """What the keys of a state name."""

    weight = "weight"
    """Entries of a state dict."""
    module = "module"
    """Modules, whose outputs are compared when two models disagree."""


class TemplatePlaceholder(str):
    """A number in a key, written `[name]`. Beside LAYER and EXPERT any other may be made: TemplatePlaceholder("[head]")."""

    LAYER: ClassVar[TemplatePlaceholder]
    EXPERT: ClassVar[TemplatePlaceholder]

    def __new__(cls, text: str) -> TemplatePlaceholder:
        if not _PLACEHOLDER.fullmatch(text):
            raise ValueError(f"a placeholder is a word in square brackets, e.g. [head], not {text!r}")
        return super().__new__(cls, text)


_PLACEHOLDER = re.compile(r"\[[a-z_]+\]")
TemplatePlaceholder.LAYER = TemplatePlaceholder("[layer]")
TemplatePlaceholder.EXPERT = TemplatePlaceholder("[expert]")

Keys = str | tuple[str, ...]
Bounds = Mapping[TemplatePlaceholder, int]


@dataclass(frozen=True)
class StateMapping:
    """Some tensors that become others."""

    source_keys: tuple[str, ...]
    """Tensors read."""
    dest_keys: tuple[str, ...]
    """Tensors made."""
    state_type: StateType = StateType.weight
    """What the keys name."""
    source_concat_dim: int = 0
    """Dimension along which several sources are put together."""
    source_sizes: tuple[int, ...] | None = None
    """Lengths of the sources there, where they differ. None: all alike."""
    source_slice: tuple[int, int, int] | None = None
    """(dimension, start, stop) that is kept: rows of a padded vocabulary are cut off here."""
    unflatten_dim: tuple[int, tuple[int, ...]] | None = None
    """(dimension, sizes) that it becomes; one size may be -1."""
    dims_permutation: tuple[int, ...] | None = None
    """New order of the dimensions."""
    flatten_dims: tuple[int, int] | None = None
    """First and last of the dimensions that become one."""
    dest_chunk_dim: int = 0
    """Dimension along which the result is split into the destinations."""
    dest_sizes: tuple[int, ...] | None = None
    """Lengths of the destinations there. None: all alike."""
    keeps_type: bool = False
    """Never stored in another type than its own."""

    @property
    def is_rename(self) -> bool:
        """One tensor under another name, otherwise untouched."""
        operations = (self.source_slice, self.unflatten_dim, self.dims_permutation, self.flatten_dims)
        return len(self.source_keys) == len(self.dest_keys) == 1 and not any(operations)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The destinations, contiguous and detached. A mere rename shares its memory with the source; nothing else shares any.

        Raises:
            ConversionError: shapes or types do not allow it.
        """
        tensors = [tensor.detach() for tensor in tensors]
        if self.is_rename:
            return tensors
        self._check(tensors)
        try:
            return [dense(part) for part in self.take_apart(self.join(tensors))]
        except (RuntimeError, IndexError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{self._said(tensors)}: {str(error).splitlines()[0]}") from None

    def _check(self, tensors: Sequence[Tensor]) -> None:
        said = self._said(tensors)
        if any(tensor.ndim == 0 for tensor in tensors):
            raise ConversionError(f"{said}: a tensor without dimensions can only be renamed")
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ConversionError(f"{said}: sources of different types ({', '.join(str(t.dtype) for t in tensors)}) are not put together")
        if len(tensors) > 1 and self.source_concat_dim >= min(tensor.ndim for tensor in tensors):
            raise ConversionError(f"{said}: there is no dimension {self.source_concat_dim} along which to put them together")
        if len(tensors) > 1:
            got = tuple(tensor.shape[self.source_concat_dim] for tensor in tensors)
            if got != (self.source_sizes or got[:1] * len(got)):
                raise ConversionError(
                    f"{said}: lengths {got} along dimension {self.source_concat_dim} are not {self.source_sizes or 'alike'}"
                )

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sources as one tensor."""
        import torch

        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=self.source_concat_dim)

    def _reshaped(self, tensor: Tensor) -> Tensor:
        if self.source_slice is not None:
            dim, start, stop = self.source_slice
            if stop > tensor.shape[dim]:
                raise ConversionError(f"{self._said([tensor])}: {start} to {stop} is not within dimension {dim}")
            tensor = tensor.narrow(dim, start, stop - start)
        if self.unflatten_dim is not None:
            tensor = tensor.unflatten(*self.unflatten_dim)
        if self.dims_permutation is not None:
            tensor = tensor.permute(self.dims_permutation)
        return tensor.flatten(*self.flatten_dims) if self.flatten_dims is not None else tensor

    def take_apart(self, joined: Tensor) -> list[Tensor]:
        """The destinations as views, where they can be, of what `join` gives."""
        tensor, count, dim = self._reshaped(joined), len(self.dest_keys), self.dest_chunk_dim
        if count == 1:
            return [tensor]
        length = tensor.shape[dim]
        sizes = self.dest_sizes or (length // count,) * count
        if sum(sizes) != length:
            raise ConversionError(f"{self._said([tensor])}: dimension {dim} of {tuple(tensor.shape)} does not split into {count} × {sizes}")
        return list(tensor.split(list(sizes), dim=dim))

    def _said(self, tensors: Sequence[Tensor]) -> str:
        shapes = ", ".join(f"{key} {list(t.shape)}" for key, t in zip(self.source_keys, tensors, strict=False))
        return f"{shapes} → {listed(self.dest_keys)}"


def dense(view: Tensor, dtype: torch.dtype | None = None, into: Tensor | None = None) -> Tensor:
    """A contiguous copy that shares no memory with `view`.

    Rows of a transposed matrix are gathered first: torch has fast code to turn a whole matrix round, and none for a part of one.

    Args:
        view: any strides.
        dtype: element type of the copy. None: the same.
        into: a contiguous tensor of that shape and type to fill. None: a new one.
    """
    import torch

    if view.ndim == 2 and view.stride(0) == 1 < view.stride(1):
        view = view.t().contiguous().to(dtype or view.dtype).t()
    target = torch.empty(view.shape, dtype=dtype or view.dtype, device=view.device) if into is None else into
    return target.copy_(view)


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@dataclass(frozen=True)
class StateMappingTemplate:
    """A mapping with placeholders in its keys; a placeholder stands on both sides, unless one side is expanded by it."""

    source_template_keys: Keys
    """Key or keys read."""
    dest_template_keys: Keys
    """Key or keys made."""
    state_type: StateType = StateType.weight
    """What the keys name."""
    source_key_per_placeholder: TemplatePlaceholder | None = None
    """The one source key stands for one key per value of this placeholder, put together in order."""
    dest_key_per_placeholder: TemplatePlaceholder | None = None
    """The one destination key stands for one key per value of this placeholder."""
    source_concat_dim: int = 0
    """Dimension along which several sources are put together."""
    unflatten_dim: tuple[int, tuple[int | TemplatePlaceholder, ...]] | None = None
    """(dimension, sizes) that it becomes; a placeholder stands for its bound, one size may be -1."""
    dims_permutation: tuple[int, ...] | None = None
    """New order of the dimensions."""
    flatten_dims: tuple[int, int] | None = None
    """First and last of the dimensions that become one."""
    dest_chunk_dim: int = 0
    """Dimension along which the result is split into the destinations."""
    source_slice: tuple[int, int, int] | None = None
    """(dimension, start, stop) that is kept."""
    source_sizes: tuple[int, ...] | None = None
    """Lengths of several sources along source_concat_dim, where they differ."""
    dest_sizes: tuple[int, ...] | None = None
    """Lengths of several destinations along dest_chunk_dim, where they differ."""
    optional: bool = False
    """The sources may all be absent."""
    keeps_type: bool = False
    """Never stored in a type below its own: a recurrence in bf16 is another one, a value in bf16 has three digits."""

    def __post_init__(self) -> None:
        for side, keys, per in self._sides():
            if per is not None and not isinstance(keys, str):
                raise ValueError(f"{side}_key_per_placeholder={per} expands one key, not the tuple {keys}")

    def _sides(self) -> tuple[tuple[str, Keys, TemplatePlaceholder | None], ...]:
        return (
            ("source", self.source_template_keys, self.source_key_per_placeholder),
            ("dest", self.dest_template_keys, self.dest_key_per_placeholder),
        )

    @property
    def placeholders(self) -> tuple[frozenset[str], frozenset[str]]:
        """Placeholders left on the source side and on the destination side, after expansion."""
        return tuple(frozenset(_PLACEHOLDER.findall(" ".join(_tuple(keys)))) - {per} for _, keys, per in self._sides())  # pyright: ignore

    @property
    def bounds_needed(self) -> frozenset[str]:
        """Placeholders that this template cannot do without."""
        sizes = self.unflatten_dim[1] if self.unflatten_dim else ()
        expanded = {per for _, _, per in self._sides() if per is not None}
        return frozenset().union(*self.placeholders, expanded, (s for s in sizes if isinstance(s, str)))

    def to_mapping(self, placeholder_values: Mapping[TemplatePlaceholder, int | None], placeholder_bounds: Bounds) -> StateMapping | None:
        """The mapping for these values, or None where the template does not apply to them.

        Args:
            placeholder_values: value of each placeholder that keys hold; None counts as not given.
            placeholder_bounds: how many values each placeholder has.

        Raises:
            ValueError: a key is to be expanded by a placeholder that it does not hold.
        """
        values = {str(name): value for name, value in placeholder_values.items() if value is not None}
        sizes = self.unflatten_dim[1] if self.unflatten_dim else ()
        expanded = [per for _, _, per in self._sides() if per is not None]
        if any(name not in placeholder_bounds for name in (*expanded, *(s for s in sizes if isinstance(s, str)))):
            return None
        sides = [self._expanded(keys, per, placeholder_bounds) for _, keys, per in self._sides()]
        if any(left != frozenset(values) for left in self.placeholders):
            return None
        source, dest = (tuple(_filled(key, values) for key in keys) for keys in sides)
        unflatten = None if self.unflatten_dim is None else (self.unflatten_dim[0], _numbers(sizes, placeholder_bounds))
        return StateMapping(
            source_keys=source,
            dest_keys=dest,
            state_type=self.state_type,
            source_concat_dim=self.source_concat_dim,
            source_sizes=self.source_sizes,
            source_slice=self.source_slice,
            unflatten_dim=unflatten,
            dims_permutation=self.dims_permutation,
            flatten_dims=self.flatten_dims,
            dest_chunk_dim=self.dest_chunk_dim,
            dest_sizes=self.dest_sizes,
            keeps_type=self.keeps_type,
        )

    def _expanded(self, keys: Keys, per: TemplatePlaceholder | None, bounds: Bounds) -> tuple[str, ...]:
        if per is None:
            return _tuple(keys)
        assert isinstance(keys, str)
        if per not in keys:
            raise ValueError(f"the key {keys} is to be expanded by {per}, which it does not hold")
        return tuple(keys.replace(per, str(i)) for i in range(bounds[per]))

    def mappings(self, bounds: Bounds) -> Iterator[StateMapping]:
        """One mapping for each combination of values below the bounds; none where a bound is not given."""
        if not self.bounds_needed <= {str(name) for name in bounds}:
            return
        left, right = self.placeholders
        if left != right:
            raise ConversionError(
                f"{self.source_template_keys} → {self.dest_template_keys}: {listed(left ^ right)} stands on one side alone; "
                f"expand it with source_key_per_placeholder or dest_key_per_placeholder"
            )
        names = sorted(left)
        for numbers in itertools.product(*(range(bounds[TemplatePlaceholder(name)]) for name in names)):
            values = {TemplatePlaceholder(name): number for name, number in zip(names, numbers, strict=True)}
            mapping = self.to_mapping(values, bounds)
            assert mapping is not None
            yield mapping

    def inverse(self) -> StateMappingTemplate:
        """The same correspondence read backwards.

        Raises:
            NotInvertibleError: something is cut off, or sizes of flattened dimensions are not known from the declaration.
        """
        if self.source_slice is not None:
            raise NotInvertibleError(f"{self.source_template_keys}: what source_slice={self.source_slice} cuts off cannot come back")
        order = self.dims_permutation
        return replace(
            self,
            source_template_keys=self.dest_template_keys,
            dest_template_keys=self.source_template_keys,
            source_key_per_placeholder=self.dest_key_per_placeholder,
            dest_key_per_placeholder=self.source_key_per_placeholder,
            source_concat_dim=self.dest_chunk_dim,
            source_sizes=self.dest_sizes,
            dest_chunk_dim=self.source_concat_dim,
            dest_sizes=self.source_sizes,
            unflatten_dim=None if self.flatten_dims is None else (self.flatten_dims[0], self._flattened_sizes()),
            dims_permutation=None if order is None else tuple(order.index(i) for i in range(len(order))),
            flatten_dims=None if self.unflatten_dim is None else _span(*self.unflatten_dim),
        )

    def _flattened_sizes(self) -> tuple[int | TemplatePlaceholder, ...]:
        """Sizes of the dimensions that flatten_dims makes one, as far as unflatten_dim says them; -1 for one that it does not."""
        assert self.flatten_dims is not None
        start, sizes = self.unflatten_dim or (0, ())
        known = {start + i: size for i, size in enumerate(sizes)}
        first, last = self.flatten_dims
        if min(first, last, start) < 0:
            raise NotInvertibleError(f"{self.source_template_keys}: dimensions counted from the end cannot be turned round")
        before = [self.dims_permutation[i] if self.dims_permutation else i for i in range(first, last + 1)]
        found = tuple(known.get(dim, -1) for dim in before)
        if found.count(-1) > 1:
            raise NotInvertibleError(f"{self.source_template_keys}: flatten_dims={self.flatten_dims} forgets the sizes {found}")
        return found


def _tuple(keys: Keys) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else tuple(keys)


def _filled(key: str, values: Mapping[str, int]) -> str:
    for name, value in values.items():
        key = key.replace(name, str(value))
    return key


def _numbers(sizes: Sequence[int | TemplatePlaceholder], bounds: Bounds) -> tuple[int, ...]:
    return tuple(bounds[size] if isinstance(size, TemplatePlaceholder) else int(size) for size in sizes)


def _span(dim: int, sizes: Sequence[object]) -> tuple[int, int]:
    return dim, dim + len(sizes) - 1
