"""Where each value of a composed configuration comes from: a dataclass, a file of conf/, a recipe, the command line.

Hydra keeps the list of what it merged, not who set which value; the list is replayed here, file by file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from heads_lightning.composition.compose import compose_tree, initialized, search_path, to_experiment
from heads_lightning.composition.describe import RECIPES
from heads_lightning.composition.mistakes import explained, parse
from heads_lightning.composition.saved import leaves, plain
from heads_lightning.composition.store import SHIPPED, conf_dir
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import Registry


class Value(NamedTuple):
    """One value of a composed configuration."""

    key: str
    """Dotted name."""
    value: Any
    """Plain value, interpolations resolved."""
    origin: str
    """`default`, `conf/train.yaml`, `experiment=NAME`, `command line`, …"""


def traced(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str = "train"
) -> tuple[ExperimentConfig, list[Value]]:
    """The composed experiment, and every value of it with its origin."""
    config = to_experiment(compose_tree(overrides, config_dir=config_dir, config_name=config_name), overrides)
    origins = _replayed(overrides, config_dir, config_name)
    values = []
    for key, value in leaves(plain(config)):
        field = key.split(".")[-1]
        default = "shipped default" if field in SHIPPED and SHIPPED[field] == value else "default"
        values.append(Value(key, value, _nearest_origin(key, origins) or default))
    return config, values


def _nearest_origin(key: str, origins: dict[str, str]) -> str | None:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return None


def _replayed(overrides: Sequence[str], config_dir: str | Path | None, config_name: str) -> dict[str, str]:
    """{dotted name: origin} of everything that a file or an override sets; what is missing is a default."""
    origins: dict[str, str] = {}
    with initialized(config_dir), explained(overrides, config_dir):
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list(config_name, [*overrides, *search_path(overrides, config_dir)], RunMode.RUN).defaults
    for default in merged:
        path = default.config_path or ""
        if path.startswith("hydra/"):
            continue
        file = _file(path, config_dir)
        if file is not None:
            prefix = f"{default.package}." if default.package else ""
            origins |= dict.fromkeys((f"{prefix}{key}" for key in _set_by(file)), _file_label(path, config_dir))
    for override in parse(overrides):
        key = override.key_or_group
        origins[f"{key}.name" if key in Registry.groups else key.replace("/", ".")] = "command line"
    return origins


def _set_by(file: Path) -> list[str]:
    """Dotted names of what a file sets; GROUP.name for an option that it chooses with `override /GROUP: OPTION`."""
    import yaml

    tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    chosen = [key.removeprefix("override /") for item in tree.get("defaults", []) if isinstance(item, dict) for key in item]
    values = {key: value for key, value in tree.items() if key not in ("defaults", "hydra")}
    return [*(f"{group}.name" for group in chosen if group in Registry.groups), *(key for key, _ in leaves(values))]


def _file(path: str, config_dir: str | Path | None) -> Path | None:
    folders = [conf_dir(), *([Path(config_dir)] if config_dir else [])]
    return next((folder / f"{path}.yaml" for folder in folders if (folder / f"{path}.yaml").is_file()), None)


def _file_label(path: str, config_dir: str | Path | None) -> str:
    if path.startswith(f"{RECIPES}/"):
        return path.replace("/", "=", 1)
    file = _file(path, config_dir)
    shipped = file is None or file.is_relative_to(conf_dir())
    return f"conf/{path}.yaml" if shipped else str(file)
