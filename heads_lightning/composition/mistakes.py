"""A user's mistakes, each in one line: what was given, what is allowed, the nearest name, the override that works.

Overrides are read before Hydra composes (what Hydra would accept silently or answer with a grammar dump), and what Hydra and
OmegaConf raise is rewritten afterwards. Hydra's advice to "append with +key" is never passed on: it turns a typing mistake into a
setting that nothing reads.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from heads_lightning.composition.describe import (
    RECIPES,
    Field,
    all_fields,
    field_names,
    fields_of,
    group_options,
    groups,
    option_name,
    owners,
    takes_own_keys,
)
from heads_lightning.composition.store import SWEEPERS, sections
from heads_lightning.configs.base import Option
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, Registry

SYNONYMS = {
    "lr": "optimizer.learning_rate", "steps": "trainer.max_steps", "num_steps": "trainer.max_steps", "epochs": "trainer.max_steps",
    "max_epochs": "trainer.max_steps", "batch_size": "trainer.global_batch_size", "accumulate_grad_batches": "trainer.micro_batch_size",
    "seq_len": "data.sequence_length", "context_length": "data.sequence_length", "block_size": "data.sequence_length",
    "loss": "head.loss_implementation", "model": "backbone", "dataset": "data", "wandb": "tracking", "logger": "tracking",
    "gpus": "trainer.devices", "fim_rate": "objective.rate", "mask_rate": "objective.rate", "strategy": "trainer.parallel",
    "hidden_size": "backbone.d_model", "n_layer": "backbone.num_layers", "n_head": "backbone.num_heads", "checkpoint": "resume",
}  # fmt: skip
"""What other programs call it."""

LAUNCHERS = {
    "joblib": "hydra-joblib-launcher", "ray": "hydra-ray-launcher",
    "submitit_local": "hydra-submitit-launcher", "submitit_slurm": "hydra-submitit-launcher",
}  # fmt: skip
"""Packages that bring Hydra's launchers."""


@contextmanager
def explained(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Iterator[None]:
    """Inside, whatever Hydra or OmegaConf raise about the user's input comes out as a ConfigError of one line."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides, config_dir)) from error
    except (AssertionError, AttributeError, ValueError) as error:
        message = _unset_section(overrides) or (str(error) if isinstance(error, ValueError) else None)
        if message is None:
            raise
        raise ConfigError(_one_line(message)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml."):
            raise ConfigError(f"a configuration file is not YAML: {_one_line(str(error))}") from error
        raise


# ---------------------------------------------------------------------------------------------- before composing


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra reads them."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
            readable = bool(parsed[-1].key_or_group)
        except HydraException:
            readable = False
        if not readable:
            raise ConfigError(_unreadable(text))
    return parsed


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals and key in (*groups(), *all_fields()):
        return f"`{text}` has no value; write {text}=VALUE"
    if not equals or not key:
        return f"`{text}` is not an override; write KEY=VALUE.{_suggestion(key)}"
    if value[:1] == "(" and value[-1:] == ")":
        return f"`{text}` cannot be read: lists are written with brackets, {key}=[{value[1:-1]}]"
    if second := re.search(r"\s([\w./]+=)", value):
        first = f"{key}={value[: second.start()]}"
        return f"`{text}` is two overrides in one word; quote each by itself, or neither: {first} {second[1]}…"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"`{text}` cannot be read: quote a value that holds special characters, \"{key}='{quoted}'\""


def check_overrides(overrides: Sequence[str], config_dir: str | Path | None = None, *, sweep: bool = False) -> None:
    """Refuse what can be seen in the overrides alone; `sweep` allows lists of values."""
    for override in parse(overrides):
        key, text = override.key_or_group, str(override.input_line)
        if text.endswith("=") and not key.startswith("extra."):
            raise ConfigError(f"`{text}` is empty (an unset variable of the shell?); write {text}VALUE, or leave it out")
        if override.is_hydra_override():
            continue
        if override.is_add() or override.is_force_add():
            _check_addition(key, text)
        elif override.is_delete():
            if not key.startswith("extra."):
                raise ConfigError(f"`{text}`: nothing can be taken out; choose another option, or set a field to null where it may be")
        elif override.package is not None:
            raise ConfigError(f"`{text}`: options stay in their own group; write {key}={override.get_value_string()}")
        elif override.is_sweep_override() and not sweep:
            as_list = "" if key in groups() else f", or write {key}=[{override.get_value_string()}] for one list"
            raise ConfigError(f"`{text}` gives several values: add -m to run each of them{as_list}")
        elif key in groups():
            _check_option(override, config_dir)


def _check_addition(key: str, text: str) -> None:
    if takes_own_keys(key) or key in sections():
        return
    bare = text.lstrip("+")
    if key in groups() or key in all_fields():
        raise ConfigError(f"`{text}`: {key} exists already; write {bare}")
    raise ConfigError(f"`{text}`: no new settings can be added, since nothing would read them.{_suggestion(key)} "
                      f"Values of your own go under extra: +extra.{bare.split('.')[-1]}")  # fmt: skip


def _check_option(override: Override, config_dir: str | Path | None) -> None:
    group, value = override.key_or_group, override.value()
    options = group_options(group, config_dir)
    if override.is_sweep_override():
        chosen = [str(v) for v in override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    elif isinstance(value, list) and group == RECIPES:
        chosen = [str(v) for v in value]
    elif isinstance(value, str):
        chosen = [value]
    elif value is None and group == RECIPES:
        raise ConfigError(f"`{override.input_line}`: no recipe is taken unless one is given; leave it out")
    else:
        raise ConfigError(f"`{override.input_line}`: {group} is chosen by name. Available: {', '.join(options)}")
    for name in chosen:
        if name not in options and "${" not in name and name != "null":
            raise ConfigError(unknown_option(group, name, config_dir))


def unknown_option(group: str, name: str, config_dir: str | Path | None = None) -> str:
    """The refusal of an option that a group does not have."""
    options = group_options(group, config_dir)
    return f"{group}={name} does not exist.{_near(name, options, f'{group}=')} Available: {', '.join(options) or 'none'}"


# ------------------------------------------------------------------------------------------------ after Hydra's refusal


def explain(error: BaseException, overrides: Sequence[str], config_dir: str | Path | None = None) -> str:
    """One line for what Hydra or OmegaConf raised."""
    where = _file_of(error)
    cause = _cause(error)
    if isinstance(cause, MissingConfigException):
        return where + _missing_file(cause, config_dir)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        if where and str(cause.full_key) == RECIPES:
            return f"{where}a recipe begins with the line `# @package _global_`, then come its defaults and settings"
        return where + unknown_field(str(cause.full_key or cause.key), cause.object_type, overrides)
    if isinstance(cause, MissingMandatoryValue):
        return where + _missing_value(str(cause.full_key), cause.object_type)
    if isinstance(cause, ValidationError) and cause.full_key:
        return where + _wrong_value(cause, overrides)
    if isinstance(cause, InterpolationKeyError):
        return f"{where}{_given(str(cause.full_key), overrides)}: {_first(cause)}; it must be a dotted name of this configuration"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        field = field_at(str(cause.full_key), cause.object_type)
        if field is not None and "Cannot merge" in str(cause):
            return f"{where}{_given(str(cause.full_key), overrides)} is not allowed: {expected(str(cause.full_key), field, None)}"
        return f"{where}{_given(str(cause.full_key), overrides)}: {_first(cause)}"
    if group := re.search(r"Could not override '([^']+)'", str(cause)):
        return f"{where}{group[1]} is no group.{_near(group[1], groups())} Groups: {', '.join(groups())}"
    return where + re.sub(r" To append .*", "", _first(cause))


def _cause(error: BaseException) -> BaseException:
    """The OmegaConf error behind a Hydra error, else the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OmegaConfBaseException | MissingConfigException):
            return seen
        seen = seen.__cause__ or seen.__context__
    return error


def _file_of(error: BaseException) -> str:
    """`In conf file experiment/x.yaml: ` where a file, not the command line, holds the mistake."""
    found = re.match(r"In '([^']+)'", str(error))
    return "" if found is None or found[1] in ("train", "hydra/config") else f"In {found[1]}.yaml: "


def _missing_file(error: MissingConfigException, config_dir: str | Path | None) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    if group == "hydra/launcher":
        if name in LAUNCHERS:
            return f"{group}={name} is not installed: pip install {LAUNCHERS[name]}"
        return f"{group}={name} does not exist.{_near(name, LAUNCHERS, f'{group}=')} Known: basic, {', '.join(LAUNCHERS)}"
    known = SWEEPERS if group == "hydra/sweeper" else sections().get(group)
    if known is not None:
        return f"{group}={name} does not exist.{_near(name, known, f'{group}=')} Available: {', '.join(known)}"
    if group in groups():
        return unknown_option(group, name, config_dir)
    return f"there is no configuration file {error.missing_cfg_file}.yaml in conf/ or in --config-dir"


def unknown_field(key: str, owner: type | None, overrides: Sequence[str] = ()) -> str:
    """The refusal of a field that does not exist where it was set; `owner` is the class that lacks it."""
    parent, _, name = key.rpartition(".")
    if owner is dict:
        text = next((text for text in overrides if text.startswith(key.split(".")[0])), f"{key}=VALUE")
        return f"{key} is new: values of your own are added with a plus, +{text}"
    if owner is not None and issubclass(owner, Option) and parent in Registry.groups:
        chosen = f"{parent}={option_name(owner)}"
        having = [f"{parent}={option}" for option in owners(parent, name)]
        if having:
            return f"{key} belongs to {' or '.join(having)}; you chose {chosen}"
        known = [f for f in field_names(owner) if f != "name"]
        near = _near(name, known, f"{parent}.") or _suggestion(key)
        return f"{key} does not exist.{near or f' {chosen} has: ' + (', '.join(known) or 'no fields')}"
    if owner is not None and is_dataclass(owner) and parent:
        return f"{key} does not exist.{_near(name, fields_of(owner), f'{parent}.')} {parent} has: {', '.join(fields_of(owner))}"
    return f"{key} does not exist.{_suggestion(key)} See: heads-lightning list"


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    """` Did you mean PREFIX + NAME?` for the nearest name, or nothing. Stricter than registry.nearest: short words resemble anything."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.65) or [n for n in names if len(word) > 2 and n.startswith(word)][:1]
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _suggestion(key: str) -> str:
    """` Did you mean X?` over everything that can be set; fields of the same name in any group come first."""
    name = key.split(".")[-1]
    known = all_fields()
    exact = [field for field in known if field.split(".")[-1] == name] or ([SYNONYMS[name]] if name in SYNONYMS else [])
    if exact:
        return f" Did you mean {' or '.join(exact)}?"
    if options := [f"{group}={key}" for group in groups() if key in group_options(group)]:
        return f" Did you mean {' or '.join(options)}?"
    if "." not in key and (group := _near(key, groups())):
        return group
    by_leaf = {field.split(".")[-1]: field for field in reversed(known)}
    leaf = _near(name, by_leaf).removeprefix(" Did you mean ").removesuffix("?")
    return f" Did you mean {by_leaf[leaf]}?" if leaf else ""


def nearest_flag(message: str, flags: Sequence[str]) -> str:
    """The refusal of arguments that Hydra's parser does not know, from that parser's own message."""
    word = next((w for w in message.split() if w.startswith("-")), "")
    key = word.lstrip("-").split("=")[0].replace("-", "_")
    known = [field for field in all_fields() if field.split(".")[-1] == key] + [g for g in groups() if g == key]
    if not word or not message.startswith("unrecognized"):
        return message
    if known:
        return f"{word.split('=')[0]} is not a flag; settings are written {known[0]}=VALUE"
    return f"{word.split('=')[0]} is not a flag.{_near(word.split('=')[0], flags)} Settings are written GROUP.FIELD=VALUE"


def _missing_value(key: str, owner: type | None) -> str:
    parent, _, name = key.rpartition(".")
    if key in Registry.groups:
        return f"{key} is not chosen; write {key}=OPTION. Available: {', '.join(Registry.groups[key])}"
    doc = fields_of(owner)[name].doc if owner is not None and is_dataclass(owner) and name in fields_of(owner) else ""
    chosen = f" by {parent}={option_name(owner)}" if owner is not None and issubclass(owner, Option) else ""
    return f"{key} is needed{chosen}: set {key}=VALUE.{f' {doc}' if doc else ''}"


def _wrong_value(error: ValidationError, overrides: Sequence[str]) -> str:
    key = str(error.full_key)
    inner = next((text for text in overrides if text.startswith(f"{key}.")), None)
    if inner:
        return f"`{inner}`: {key} holds a single value and has no fields of its own"
    field = field_at(key, error.object_type)
    given = _given(key, overrides, getattr(error, "value", None))
    if field is None:
        return f"{given}: {_first(error)}"
    return f"{given} is not allowed: {expected(key, field, getattr(error, 'value', None))}"


def field_at(key: str, owner: type | None) -> Field | None:
    """The field that a dotted name stands for, given the class that holds it."""
    section, _, name = re.sub(r"\[.*", "", key).rpartition(".")
    if owner is not None and is_dataclass(owner):
        return fields_of(owner).get(name)
    # an entry of a list, which knows no class: any option of the group that has the list
    having = (
        (fields_of(Registry.groups[section][option]).get(name) for option in owners(section, name)) if section in Registry.groups else ()
    )
    return next(iter(having), None)


def expected(key: str, field: Field, value: Any) -> str:
    """What a field takes, with an override that works."""
    null = " or null" if field.optional else ""
    if field.members:
        return f"{key} takes {', '.join(field.members)}{null}.{_near(str(value), field.members, f'{key}=')}"
    if field.type is int:
        whole = _as_whole(value)
        return f"{key} takes a whole number{null}" + (f"; write {key}={whole}" if whole is not None else "")
    if field.type is float:
        return f"{key} takes a number{null}"
    if field.type is bool:
        return f"{key} takes true or false{null}"
    if (group := key.replace(".", "/")) in sections():
        return f"its options are chosen with a slash, {' or '.join(f'{group}={name}' for name in sections()[group])}"
    if is_dataclass(field.type):
        return f"{key} has fields of its own: {', '.join(f'{key}.{name}' for name in fields_of(field.type))}"
    if field.type_name.startswith("list"):
        key = key.partition("[")[0]
        example = ",".join(map(str, field.default)) if isinstance(field.default, list) and field.default else "…"
        alone = value is not None and not isinstance(value, str | dict) and "[" not in str(value)
        return f"{key} takes a {field.type_name}, e.g. {key}=[{value if alone else example}]"
    return f"{key} takes {field.type_name}"


def _as_whole(value: Any) -> int | None:
    try:
        number = float(str(value).replace(",", "").replace("_", "").lower().removesuffix("k"))
    except ValueError:
        return None
    if str(value).lower().endswith("k"):
        number *= 1000
    return int(number) if number.is_integer() else None


def refuse_loose_values(config: ExperimentConfig, overrides: Sequence[str]) -> None:
    """Refuse what OmegaConf converts without a word: `trainer.compile=2` is true to it."""
    for override in parse(overrides):
        section, _, name = override.key_or_group.rpartition(".")
        owner = getattr(config, section, None) if section else config
        field = fields_of(type(owner)).get(name) if is_dataclass(owner) else None
        if field is not None and field.type is bool and isinstance(override.value(), int | float) and override.value() not in (0, 1):
            raise ConfigError(f"`{override.input_line}` is not allowed: {expected(override.key_or_group, field, None)}")


# ------------------------------------------------------------------------------------------------------------ helpers


def _unset_section(overrides: Sequence[str]) -> str | None:
    """OmegaConf 2.3 fails inside when a field of a section that is null is set: name the override that fills the section."""
    for group, options in sections().items():
        key = group.replace("/", ".")
        for text in overrides:
            if text.startswith((f"{key}.", f"{key}={{")):
                return f"`{text}`: {key} is null so far; choose it first, with {' or '.join(f'{group}={name}' for name in options)}"
    return None


def _given(key: str, overrides: Sequence[str], value: Any = None) -> str:
    """The override that set `key`, quoted; without one (a file set it), KEY=VALUE."""
    for text in reversed(overrides):
        if text.lstrip("+").startswith((f"{key}=", f"{key.rpartition('[')[0] or key}=")):
            return f"`{text}`"
    return f"{key}={value}" if value is not None else key


def _first(error: BaseException) -> str:
    """The message of an error without the lines that OmegaConf appends (full_key, object_type)."""
    return _one_line(re.split(r"\n\s*(?:full_key|object_type|reference_type)", str(getattr(error, "msg", None) or error))[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())
