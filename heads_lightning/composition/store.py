"""Where configuration comes from: the `conf/` folder, the registry, plugins. This file hands all three to Hydra.

Every option of every registry becomes an entry of Hydra's store, so a part that registers itself is an option of the command line
with no YAML at all; files in `conf/` add sizes and recipes on top.
"""

import re
import warnings
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import hydra
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from heads_lightning import configs  # noqa: F401  registers the built-in options
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMLossImplementation
from heads_lightning.registry import ConfigError, Registry, load_plugins

SHIPPED = {"loss_implementation": LMLossImplementation.auto}
"""Fields that a composed experiment starts with another value than the dataclass: a library call gets what it asks for, a run gets
the best that the machine has. It lives here and not in conf/train.yaml since not every option of `head` has the field."""

SWEEPERS = ("grid", "optuna")
"""Our own sweepers (`hydra/sweeper=…`): lists of values multiplied, and cells proposed from those before."""

plugin_origins: dict[str, str] = {}
"""Modules loaded as plugins, and where each was named."""


def conf_dir() -> Path:
    """The shipped `conf` folder: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"the folder conf/ is missing beside {package}; install the package again")


def version_base() -> dict[str, Any]:
    """The argument `version_base` for Hydra: 1.4 warns about any value, 1.5 drops the argument."""
    major, minor = (int(part) for part in hydra.__version__.split(".")[:2])
    return {"version_base": "1.3"} if (major, minor) < (1, 4) else {}


@cache
def prepare_store() -> None:
    """Load plugins and store every registered option, once per process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugin_origins.update(load_plugins())
    for warning in caught:
        warnings.warn_explicit(str(warning.message), UserWarning, "heads_lightning", 0)
    store_options()


def store_options() -> None:
    """Put every option that is registered now into Hydra's store. May be repeated."""
    _add("", "schema", ExperimentConfig)
    for kind in SWEEPERS:
        # after Hydra has scanned its plugins: one of them may have an option of this name, too
        Plugins.instance()
        node = {"_target_": "hydra_plugins.heads_lightning_sweeps.HeadsSweeper", "kind": kind}
        ConfigStore.instance().store(group="hydra/sweeper", name=kind, node=node, provider="heads_lightning")
    for group, registry in Registry.groups.items():
        for name, cls in registry.items():
            _add(group, name, cls)
    for group, options in sections().items():
        for name, section in options.items():
            _add(group, name, section)


class Unmade:
    """An option in Hydra's store; the copy that the store hands out is its tree. A run loads ten, and making all costs 40 ms."""

    def __init__(self, option: Any) -> None:
        self.option = option

    def __deepcopy__(self, memo: dict[int, Any]) -> DictConfig:
        """The option as OmegaConf has it, with the values of SHIPPED."""
        node = OmegaConf.structured(self.option)
        for field, value in SHIPPED.items():
            if field in node:
                node[field] = value
        return node


class OptionNode(ConfigNode):
    """An entry of Hydra's store. Nothing writes to it, and Hydra copies the whole store for every composition."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptionNode":
        return self


def _add(group: str, name: str, option: Any) -> None:
    """What ConfigStore.store does, without making the tree."""
    folder = ConfigStore.instance().repo
    for part in group.split("/") if group else ():
        folder = folder.setdefault(part, {})
    cls = option if isinstance(option, type) else type(option)
    folder[f"{name}.yaml"] = OptionNode(f"{name}.yaml", cast(DictConfig, Unmade(option)), group or None, None, cls.__module__)


PLAIN_TYPES = {"int", "float", "str", "bool", "None", "list", "dict", "Any"}


def _may_be_section(field: Field[Any]) -> bool:
    """False for most fields, by their annotation as it is written: reading the types of every option takes 10 ms of each command."""
    return field.default is None and not set(re.findall(r"\w+", str(field.type))) <= PLAIN_TYPES


def sections() -> dict[str, dict[str, Any]]:
    """Groups inside a group, `head/layer_norm`: fields that hold settings of their own and may be null.

    OmegaConf 2.3 fails inside when a field of a null section is set, so such a section is chosen like an option, by its `name`.
    """
    found: dict[str, dict[str, Any]] = {}
    for group, registry in Registry.groups.items():
        for cls in [c for _, c in registry.items() if any(_may_be_section(f) for f in fields(c))]:
            for field, hint in get_type_hints(cls).items():
                section = next((arg for arg in get_args(hint) if is_dataclass(arg)), None)
                if isinstance(section, type) and type(None) in get_args(hint):
                    members = get_type_hints(section)["name"]
                    found[f"{group}/{field}"] = {member.value: section(name=member) for member in members}  # pyright: ignore[reportCallIssue]
    return found
