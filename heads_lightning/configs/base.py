"""What every option shares: its name, the guard on that name, and the enums that several groups use."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from heads_lightning.registry import ConfigError, nearest


class DType(StrEnum):
    """Element type of parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class NormType(StrEnum):
    """Kind of normalisation layer."""

    rms = "rms"
    """Root mean square, no mean, no bias (Zhang & Sennrich 2019)."""
    layer_norm = "layer_norm"
    """Mean and variance (Ba et al. 2016)."""


@dataclass
class LayerNormConfig:
    """A normalisation layer."""

    name: NormType = NormType.rms
    """Kind of norm."""
    eps: float = 1e-5
    """Added to the variance before the root."""
    bias: bool = False
    """Learned shift (layer_norm only)."""

    def num_params(self, d_model: int) -> int:
        """Learned numbers of one such layer."""
        return d_model * (2 if self.bias and self.name == NormType.layer_norm else 1)


@dataclass
class Option:
    """Base of every option of every group. `name` is a discriminator: saved configs rebuild from it; it never selects by itself."""

    group: ClassVar[str] = ""

    name: str = ""
    """Name of the option; fixed. Choose an option with `GROUP=NAME`."""

    def __post_init__(self) -> None:
        self.name = str(getattr(self.name, "value", self.name))
        expected = next(f.default for f in fields(self) if f.name == "name")
        expected = str(getattr(expected, "value", expected))
        if self.name != expected:
            raise ConfigError(
                f"{self.group}.name={self.name} does not fit the options of {self.group}={expected}; "
                f"choose it with {self.group}={self.name}"
            )

    def require(self, ok: bool, field: str, allowed: str) -> None:
        """Refuse the value of `field` unless `ok`: one line with what was given, what is allowed and where."""
        if not ok:
            raise ConfigError(f"{self.group}.{field}={getattr(self, field)} is out of range; {self.group}={self.name} allows {allowed}")


O = TypeVar("O", bound=Option)


def from_mapping(cls: type[O], settings: Mapping[str, Any], place: str, *, without: Collection[str] = ()) -> O:
    """An option from plain values, each checked against the type of its field; `without`: fields that cannot be given here."""
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.name not in ("name", *without)}
    values = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{place}.{key} does not exist.{nearest(key, known)} Available: {', '.join(known)}")
        values[key] = _parse(known[key], value, f"{place}.{key}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{cls.group}.", f"{place}.", 1)) from None


def _parse(kind: Any, value: Any, place: str) -> Any:
    """`value` as a member of the enum, or a number, that the field is; other types as they are."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if value not in list(kind):
            raise ConfigError(f"{place}={value} is not possible; it is {', '.join(kind)}")
        return kind(value)
    members = [member for member in get_args(kind) if member is not NoneType]
    if members:  # X | None
        return None if value is None else _parse(members[0], value, place)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{place}={value} is not possible; it is a {kind.__name__}")
        return kind(value)
    return value
