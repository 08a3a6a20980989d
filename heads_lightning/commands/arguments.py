"""`KEY=VALUE` arguments of a command that is not a Hydra application, read into a dataclass with the same messages as overrides."""

import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

from omegaconf import MISSING

from heads_lightning.composition.describe import Field, fields_of
from heads_lightning.composition.mistakes import expected
from heads_lightning.registry import ConfigError, nearest

T = TypeVar("T")
SYNONYMS = {"run": "checkpoint", "model": "checkpoint", "ckpt": "checkpoint", "ckpt_path": "checkpoint", "max_tokens": "max_new_tokens"}
"""Words that people write for an argument."""


def read(cls: type[T], arguments: Sequence[str], *, flags: Sequence[str] = ()) -> tuple[T, list[str]]:
    """(the dataclass filled in, what follows `--`). Fields without a default must be given.

    Args:
        cls: the dataclass.
        arguments: of the command line, without the flags that the command reads itself.
        flags: those flags, for whoever misspells one.
    """
    assert is_dataclass(cls)
    words, _, free = _partition(list(arguments))
    fields, values = _spelled(cls), {}
    for word in words:
        key, equals, text = word.lstrip("-").partition("=")
        if not equals and word.startswith("--") and key in fields and fields[key].type is bool:
            equals, text = "=", "true"  # --json
        if not equals:
            near = nearest(word, [*flags, *(f"--{name}" for name in fields)]) if word.startswith("-") else ""
            if "checkpoint" in fields and not word.startswith("-"):
                near = f" Did you mean checkpoint={word}?"
            raise ConfigError(f"`{word}` is not an argument; write KEY=VALUE, with KEY one of {', '.join(fields)}.{near}")
        if not text and fields.get(key) is not None and key in ("checkpoint", "from", "out"):
            raise ConfigError(f"`{word}` is empty (an unset variable of the shell?); write {key}=VALUE")
        if key not in fields:
            close = [SYNONYMS[key]] if SYNONYMS.get(key) in fields else difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
            raise ConfigError(f"{key} does not exist.{f' Did you mean {close[0]}?' if close else ''} Available: {', '.join(fields)}")
        values[key] = _converted(key, fields[key], text)
    for name, field in fields.items():
        if field.default == MISSING and name not in values:
            raise ConfigError(f"{name} is needed: {name}=VALUE. {field.doc}")
    return cls(**{fields[key].name: value for key, value in values.items()}), free


def _spelled(cls: type) -> dict[str, Field]:
    """Fields by the word that the user writes: `from_` is `from`, which Python keeps for itself."""
    return {name.rstrip("_"): field for name, field in fields_of(cls).items()}


def _partition(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in arguments:
        return arguments, False, []
    cut = arguments.index("--")
    return arguments[:cut], True, arguments[cut + 1 :]


def _converted(key: str, field: Field, text: str) -> Any:
    """`text` as the field's type, or a refusal that says what the field takes."""
    if field.optional and text == "null":
        return None
    if field.members:
        if text in field.members:
            return field.type(text)
    elif field.type is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif field.type in (int, float):
        try:
            return field.type(text)
        except ValueError:
            pass
    else:
        return text
    raise ConfigError(f"`{key}={text}` is not allowed: {expected(key, field, text)}")


def describe(cls: type) -> list[str]:
    """The arguments in lines for `--help`."""
    lines = ["arguments (KEY=VALUE):"]
    for name, field in _spelled(cls).items():
        default = "needed" if field.default == MISSING else "null" if field.default is None else str(field.default)
        lines += textwrap.wrap(f"{name:18} {field.type_name}, {default}: {field.doc}", 110, initial_indent="  ", subsequent_indent=" " * 21)
    return lines
