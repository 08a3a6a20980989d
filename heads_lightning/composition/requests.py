"""`FIELD=VALUE …` of the small commands to a typed request; mistakes in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from heads_lightning.registry import ConfigError, nearest

R = TypeVar("R")


def parse_request(kind: type[R], arguments: Sequence[str]) -> R:
    """The request that `arguments` (before any `--`) describe.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or a required field left out.
    """
    names = [f.name for f in fields(kind)]  # pyright: ignore[reportArgumentType]
    tree: Any = OmegaConf.structured(kind)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not FIELD=VALUE; fields: {', '.join(names)}")
        if key not in names:
            raise ConfigError(f"{key} does not exist.{nearest(key, names)} Fields: {', '.join(names)}")
        try:
            setattr(tree, key, None if value in ("null", "None") else value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from None
    missing = [name for name in names if OmegaConf.is_missing(tree, name)]
    if missing:
        raise ConfigError(f"{missing[0]} is needed, e.g. {missing[0]}=runs/NAME/DATE")
    return OmegaConf.to_object(tree)  # pyright: ignore[reportReturnType]
