"""What can be set: options of each group, fields of each option, their types, defaults and documentation.

The documentation is the string under each field, read from the source once with `ast`; `list`, the JSON schema, the messages about
mistakes and tab completion all read it here.
"""

import ast
import inspect
import textwrap
import types
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from heads_lightning.composition.store import conf_dir, plugin_origins
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import Registry

RECIPES = "experiment"
"""The group of recipes: files alone, no dataclass."""


@dataclass(frozen=True)
class Field:
    """One setting."""

    name: str
    """Name inside its option."""
    hint: Any
    """Its type."""
    default: Any
    """Its default; MISSING where there is none."""
    owner: type
    """The dataclass that has it."""

    @property
    def doc(self) -> str:
        """The string under it, or under the field of the same name of a base."""
        return next((text for base in self.owner.__mro__ if (text := documents(base).get(self.name)) and is_dataclass(base)), "")

    @property
    def optional(self) -> bool:
        """Whether null is allowed."""
        return type(None) in get_args(self.hint)

    @property
    def type(self) -> Any:
        """The type without null."""
        if get_origin(self.hint) in (Union, types.UnionType):
            return next(arg for arg in get_args(self.hint) if arg is not type(None))
        return self.hint

    @property
    def members(self) -> dict[str, str]:
        """Members of an enum, with their documentation; empty for other types."""
        if not (isinstance(self.type, type) and issubclass(self.type, Enum)):
            return {}
        return {member.value: documents(self.type).get(member.name, "") for member in self.type}

    @property
    def type_name(self) -> str:
        """The type in words a user writes: `int`, `float or null`, `list of str`, `default | chunked`."""
        return type_name(self.type) + (" or null" if self.optional else "")


def type_name(hint: Any) -> str:
    """A type in a few words."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.value for member in hint)
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    return getattr(hint, "__name__", str(hint))


@cache
def documents(cls: type) -> dict[str, str]:
    """{name: the string under it} of a class's own annotated fields or enum members."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    name = None
    for node in getattr(body, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        else:
            if name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                found[name] = " ".join(node.value.value.split())
            name = None
    return found


@cache
def fields_of(cls: type) -> dict[str, Field]:
    """The settings of a dataclass by name."""
    hints = get_type_hints(cls)
    return {f.name: Field(f.name, hints[f.name], _default(f), cls) for f in fields(cls)}


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's settings (cheaper than `fields_of`: a mistake looks at every option there is)."""
    return [f.name for f in fields(cls)]


def _default(f: Any) -> Any:
    if f.default is not NO_DEFAULT:
        return f.default
    return f.default_factory() if f.default_factory is not NO_DEFAULT else MISSING


def summary(cls: type) -> str:
    """First sentence(s) of a class's documentation: its first paragraph in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def origin(cls: type) -> str:
    """Where an option comes from: empty for a built-in one, else `plugin MODULE (…)`."""
    if cls.__module__.startswith("heads_lightning."):
        return ""
    named = next((where for module, where in plugin_origins.items() if cls.__module__.startswith(module.split(":")[0])), "")
    return f"plugin {cls.__module__}" + (f" ({named})" if named else "")


def groups() -> list[str]:
    """Every group that the command line chooses from."""
    return [*(group for group in Registry.groups), RECIPES]


def group_options(group: str, config_dir: str | Path | None = None) -> dict[str, Path | type]:
    """Options of a group: registered dataclasses, then files of the shipped conf/ and of the user's folder."""
    options: dict[str, Path | type] = dict(Registry.groups[group].items()) if group in Registry.groups else {}
    for folder in (conf_dir(), *([Path(config_dir)] if config_dir else [])):
        options |= {path.stem: path for path in sorted((folder / group).glob("*.yaml"))}
    return options


def file_summary(path: Path) -> str:
    """The first comment of a conf file in one line; directives (`# @package`, `# yaml-language-server`) do not count."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @", "# yaml-language-server")):
            lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def owners(group: str, field: str) -> list[str]:
    """Options of `group` that have the field."""
    return [name for name, cls in Registry.groups[group].items() if field in field_names(cls)]


def option_name(cls: type) -> str:
    """The name that an option is registered under."""
    default = next(f.default for f in fields(cls) if f.name == "name")
    return str(getattr(default, "value", default))


def takes_own_keys(key: str) -> bool:
    """Whether `key` lies inside a field that is a mapping with keys of the user's own: extra.KEY, tracking.tags.KEY."""
    parent = key.rpartition(".")[0]
    group, _, name = parent.rpartition(".")
    if not group:
        return key.split(".")[0] == "extra"
    having = (
        [fields_of(cls)[name] for _, cls in Registry.groups[group].items() if name in fields_of(cls)] if group in Registry.groups else []
    )
    return key.split(".")[0] == "extra" or any(get_origin(field.type) is dict for field in having)


def all_fields() -> list[str]:
    """Dotted names of every field of every option."""
    names = [name for name, field in fields_of(ExperimentConfig).items() if name not in Registry.groups and not is_dataclass(field.type)]
    for group, registry in Registry.groups.items():
        names += list(dict.fromkeys(f"{group}.{name}" for _, cls in registry.items() for name in field_names(cls) if name != "name"))
    for name, field in fields_of(ExperimentConfig).items():
        if name not in Registry.groups and isinstance(field.type, type) and is_dataclass(field.type):
            names += [f"{name}.{inner}" for inner in field_names(field.type)]
    return names
