"""What every option shares: its name, the guard on that name, and the enums that several groups use."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import ClassVar

from heads_lightning.registry import ConfigError


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
