"""An ExperimentConfig as plain YAML, and back, without Hydra.

A saved file holds values alone: it rebuilds through the `name` of each option and the registry, so it can name no code to execute,
and what this version does not know is refused by name instead of ignored.
"""

import hashlib
import json
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from heads_lightning.configs.base import Option
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, Registry, nearest

S = TypeVar("S")

RUN_ONLY = ("run_root", "name", "resume", "data.cache_dir", "data.prepare_processes", "trainer.progress_bar", "tracking")
"""Fields and sections that change where and how a run shows itself, not what it computes: left out of `config_hash`."""
NOT_SAVED = ("sweep",)
"""Sections of the command that started a run, not of the run."""


def plain(value: Any) -> Any:
    """The value as nested dicts, lists and scalars."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def saved(config: ExperimentConfig) -> dict[str, Any]:
    """What of an experiment is kept with its run, as nested dicts."""
    return {key: value for key, value in plain(config).items() if key not in NOT_SAVED}


def to_yaml(config: ExperimentConfig) -> str:
    """Plain YAML, readable by `yaml.safe_load` and by `from_yaml`."""
    import yaml

    return yaml.safe_dump(saved(config), sort_keys=False, allow_unicode=True, width=120)


def from_yaml(source: str | Path) -> ExperimentConfig:
    """The experiment of a saved file (a Path) or of its text (a str); checked like a composed one.

    Raises:
        ConfigError: not YAML, not a mapping, or an option, field or value that this version does not know.
    """
    import yaml

    from heads_lightning.composition.store import prepare_store
    from heads_lightning.composition.validation import validate

    where = str(source) if isinstance(source, Path) else "the saved configuration"
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        # the same language read by a C library where it was built with one: a fifth of the time
        tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} is not a saved configuration: it holds {type(tree).__name__}, not fields and values")
    prepare_store()
    config = _rebuild(ExperimentConfig, tree, "", where)
    validate(config)
    return config


def section_from(cls: type[S], tree: dict[str, Any], where: str) -> S:
    """A section of an experiment (a dataclass) from its nested dict; `where` says in refusals what was read."""
    from heads_lightning.composition.store import prepare_store

    prepare_store()
    return _rebuild(cls, tree, "", where)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _rebuild(cls: type, tree: dict[str, Any], path: str, where: str) -> Any:
    cls = _chosen(cls, tree, path, where)
    known = [f.name for f in fields(cls)]
    for key in tree:
        if key not in known:
            raise ConfigError(f"{where}: {path}{key} is not known to this version.{nearest(str(key), known)}")
    return cls(**{key: _value(_hints(cls)[key], value, f"{path}{key}", where) for key, value in tree.items()})


def _chosen(cls: type, tree: dict[str, Any], path: str, where: str) -> type:
    """The registered option that `name` stands for; `cls` itself where there is nothing to choose."""
    if not (issubclass(cls, Option) and cls.group in Registry.groups):
        return cls
    if "name" not in tree:
        raise ConfigError(f"{where}: {path}name is missing; it says which option of {cls.group} to rebuild")
    try:
        return Registry.groups[cls.group][tree["name"]]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, path: str, where: str) -> Any:
    """`value` as the type that the field declares, or a refusal."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = [arg for arg in get_args(hint) if arg is not type(None)]
    if hint is Any:
        return value
    if get_origin(hint) is list and isinstance(value, list):
        return [_value(get_args(hint)[0], item, f"{path}[{i}]", where) for i, item in enumerate(value)]
    if get_origin(hint) is dict and isinstance(value, dict):
        return {key: _value(get_args(hint)[1], item, f"{path}.{key}", where) for key, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _rebuild(hint, value, f"{path}.", where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        members = [m.value for m in hint]
        if value in members:
            return hint(value)
        raise ConfigError(f"{where}: {path}={value} does not exist.{nearest(str(value), members)} Available: {', '.join(members)}")
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, path, where)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: {path}={value!r} is not of type {getattr(hint, '__name__', hint)}")


def _number(value: int | str, path: str, where: str) -> float:
    try:  # YAML 1.1 reads 1e-5 (no dot) as a string
        return float(value)
    except ValueError:
        raise ConfigError(f"{where}: {path}={value!r} is not a number") from None


def flatten(config: ExperimentConfig) -> dict[str, str]:
    """Every value as text by its dotted name, e.g. {"head.bias": "null"}: what a tracker stores as parameters."""
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in leaves(saved(config))}


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every scalar, list and empty mapping of a nested dict."""
    if isinstance(tree, dict) and (tree or not path):
        return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else str(key))]
    return [(path, tree)]


def config_hash(config: ExperimentConfig) -> str:
    """16 hex digits that are equal for two configs that compute the same thing; RUN_ONLY fields do not count."""
    values = {key: value for key, value in leaves(saved(config)) if not f"{key}.".startswith(tuple(f"{name}." for name in RUN_ONLY))}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
