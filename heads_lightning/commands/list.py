"""`list`: every option of every group, the fields of an option, the meaning of a field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heads_lightning.commands.show import as_json, table, text_of, title
from heads_lightning.composition.describe import (
    RECIPES,
    Field,
    fields_of,
    file_summary,
    group_options,
    groups,
    origin,
    owners,
    summary,
)
from heads_lightning.composition.mistakes import unknown_field, unknown_option
from heads_lightning.composition.saved import plain
from heads_lightning.composition.store import SHIPPED, prepare_store
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, Registry, nearest


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning list [GROUP | GROUP=OPTION | GROUP.FIELD] [--json]`."""
    prepare_store()
    words = [word for word in arguments if word != "--json"]
    as_text = len(words) == len(arguments)
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise ConfigError(f"`list {' '.join(words)}`: list takes one GROUP, GROUP=OPTION or GROUP.FIELD, and --json")
    word = words[0] if words else ""
    group = word.replace(".", "=").split("=")[0]
    if group and group not in (*groups(), *_plain_sections()):
        raise ConfigError(f"there is no group {group!r}.{nearest(group, groups())} Groups: {', '.join(groups())}")
    if "=" in word:
        _option(*word.split("=", 1), as_text=as_text)
    elif "." in word:
        _field(*word.split(".", 1), as_text=as_text)
    elif group in _plain_sections():
        _fields(group, _plain_sections()[group], as_text=as_text)
    else:
        _options([group] if group else groups(), as_text=as_text)


def _plain_sections() -> dict[str, type]:
    """Sections of the experiment that are not chosen from options, such as `evaluation`."""
    found = {name: field.type for name, field in fields_of(ExperimentConfig).items() if name not in Registry.groups}
    return {name: cls for name, cls in found.items() if hasattr(cls, "__dataclass_fields__")}


def _options(chosen: list[str], *, as_text: bool) -> None:
    described = {group: {name: _described(part) for name, part in group_options(group).items()} for group in chosen}
    if not as_text:
        as_json(described)
        return
    for group, options in described.items():
        title(f"{group}=")
        table([(f"  {name}", entry["summary"], entry["origin"]) for name, entry in options.items()])
    if len(chosen) > 1:
        title("Fields of an option: heads-lightning list GROUP=OPTION, e.g. list head=default")


def _described(part: Path | type) -> dict[str, str]:
    if isinstance(part, Path):
        return {"summary": file_summary(part), "origin": f"conf/{part.parent.name}/{part.name}"}
    return {"summary": summary(part), "origin": origin(part)}


def _option(group: str, name: str, *, as_text: bool) -> None:
    options = group_options(group)
    if name not in options:
        raise ConfigError(unknown_option(group, name))
    part = options[name]
    if isinstance(part, type):
        if as_text:
            title(f"{group}={name}: {summary(part)}")
        _fields(group, part, as_text=as_text)
    elif as_text:
        title(f"{group}={name}: {file_summary(part)}")
        print(part.read_text(encoding="utf-8"), end="")
    else:
        as_json({"summary": file_summary(part), "file": part.read_text(encoding="utf-8")})


def _fields(prefix: str, cls: type, *, as_text: bool) -> None:
    fields = [field for field in fields_of(cls).values() if field.name != "name"]
    if not as_text:
        as_json({f"{prefix}.{field.name}": _entry(field) for field in fields})
    elif fields:
        table([(f"  {prefix}.{f.name}", f.type_name, _default(f), f.doc) for f in fields], ("  setting", "type", "default", ""))
    else:
        print("  no fields")


def _default(field: Field) -> str:
    """The default; where a run starts with another one, that too."""
    shipped = f" (runs: {SHIPPED[field.name]})" if field.name in SHIPPED else ""
    return text_of(plain(field.default)) + shipped


def _entry(field: Field) -> dict[str, Any]:
    entry = {"type": field.type_name, "default": plain(field.default), "doc": field.doc}
    return entry | ({"members": field.members} if field.members else {})


def _field(group: str, name: str, *, as_text: bool) -> None:
    if group in _plain_sections():
        found = {group: fields_of(_plain_sections()[group])[name]} if name in fields_of(_plain_sections()[group]) else {}
    else:
        options = Registry.groups[group] if group != RECIPES else {}
        found = {f"{group}={option}": fields_of(options[option])[name] for option in (owners(group, name) if options else [])}
    if not found:
        raise ConfigError(unknown_field(f"{group}.{name}", None))
    if not as_text:
        as_json({where: _entry(field) for where, field in found.items()})
        return
    alike: dict[tuple[str, str, str], list[str]] = {}
    for where, field in found.items():
        alike.setdefault((field.type_name, _default(field), field.doc), []).append(where)
    for (kind, default, doc), places in alike.items():
        title(f"{group}.{name} ({', '.join(places)}): {kind}, default {default}. {doc}")
        table([(f"  {member}", text) for member, text in found[places[0]].members.items()])
