"""Names → configuration classes: the one mechanism behind every option of every group.

A registry maps an option name (`head=normalized`) to the dataclass that describes it. Built-in parts and plugins register with
the same decorator; a taken name is an error that shows both places. Nothing here imports torch, so option lists, help and
validation cost milliseconds.
"""

import difflib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

C = TypeVar("C")
T = TypeVar("T")

PLUGIN_GROUP = "heads_lightning.plugins"
"""Entry-point group of third-party parts: importing the named module registers them."""
PLUGIN_VARIABLE = "HEADS_LIGHTNING_PLUGINS"
"""Comma-separated modules to load as plugins without installing them, for development."""
STRICT_VARIABLE = "HEADS_LIGHTNING_STRICT_PLUGINS"
"""Set to 1, a plugin that fails to import is an error instead of a warning."""


class ConfigError(ValueError):
    """A mistake of the user's: one line that says what was given, what is allowed and the override that works."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason that one line explains; nobody's typing mistake, and no fault of the program's."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the nearest of `known`, or nothing when none is near."""
    match = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.55)
    return f" Did you mean {match[0]!r}?" if match else ""


class Registry(Generic[C]):
    """The options of one config group, in the order in which they were registered.

    Args:
        group: the name of the Hydra config group, e.g. `head`.
        base: the dataclass that every option of the group extends.
    """

    groups: ClassVar[dict[str, "Registry[Any]"]] = {}
    """Every registry by group name: what `list`, the schema and Hydra's store are made from."""

    def __init__(self, group: str, base: type[C]) -> None:
        self.group = group
        self.base = base
        self._options: dict[str, type[C]] = {}
        Registry.groups[group] = self

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the dataclass the option `name`. Its field `name` must default to the same word."""

        def decorate(cls: type[T]) -> type[T]:
            taken = self._options.get(name)
            if taken is not None and _place(taken) != _place(cls):
                raise ConfigError(f"{self.group}={name} is registered twice: by {_place(taken)} and by {_place(cls)}; rename one of them")
            if not (is_dataclass(cls) and issubclass(cls, self.base)):
                raise TypeError(f"{cls.__qualname__} must be a dataclass that extends {self.base.__qualname__}")
            declared = next((f.default for f in fields(cls) if f.name == "name"), None)
            if str(getattr(declared, "value", declared)) != name:
                raise TypeError(f"{cls.__qualname__} is registered as {name!r} but its field `name` is {declared!r}")
            self._options[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> type[C]:
        try:
            return self._options[name]
        except KeyError:
            raise ConfigError(
                f"{self.group}={name} does not exist.{nearest(name, self._options)} Available: {', '.join(self._options)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __contains__(self, name: object) -> bool:
        return name in self._options

    def __len__(self) -> int:
        return len(self._options)

    def items(self) -> Iterable[tuple[str, type[C]]]:
        """(option name, config class) pairs."""
        return self._options.items()


def _place(cls: type) -> str:
    try:
        return f"{cls.__module__}.{cls.__qualname__} ({inspect.getsourcefile(cls)})"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def load_plugins() -> dict[str, str]:
    """Import every plugin; returns {module: where it was named}. A broken one is named in a warning (or raised, see STRICT_VARIABLE)."""
    wanted = {entry.value: f"package {entry.dist.name if entry.dist else '?'}" for entry in entry_points(group=PLUGIN_GROUP)}
    wanted |= {m.strip(): PLUGIN_VARIABLE for m in os.environ.get(PLUGIN_VARIABLE, "").split(",") if m.strip()}
    loaded = {}
    for module, origin in wanted.items():
        try:
            importlib.import_module(module.split(":")[0])
            loaded[module] = origin
        except Exception as error:
            message = f"plugin {module!r} ({origin}) failed to import: {type(error).__name__}: {error}"
            if os.environ.get(STRICT_VARIABLE) == "1" or isinstance(error, ConfigError):
                raise ConfigError(message) from error
            warnings.warn(message, stacklevel=2)
    return loaded
