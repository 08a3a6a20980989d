"""`schema`: JSON Schema of the files in conf/, made from the dataclasses, so that editors complete and check them.

One schema for experiments (the primary file and recipes), one for the files of each group. Every value may also be an interpolation.
"""

import json
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from heads_lightning.commands.show import as_json
from heads_lightning.composition.describe import RECIPES, Field, fields_of, group_options, groups
from heads_lightning.composition.saved import plain
from heads_lightning.composition.store import prepare_store
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, Registry, nearest

DRAFT = "http://json-schema.org/draft-07/schema#"
INTERPOLATION = {"type": "string", "pattern": r"\$\{"}


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning schema [GROUP] [--out FOLDER]`."""
    prepare_store()
    words = list(arguments)
    if "--out" in words:
        at = words.index("--out")
        if at + 1 == len(words):
            raise ConfigError("--out needs a folder: schema --out FOLDER")
        _write(Path(words[at + 1]))
        return
    group = words[0] if words else RECIPES
    if group not in groups() or len(words) > 1:
        raise ConfigError(f"`schema {' '.join(words)}`: schema takes one group.{nearest(group, groups())} Groups: {', '.join(groups())}")
    as_json(schema(group))


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group in groups():
        (folder / f"{group}.json").write_text(json.dumps(schema(group), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(groups())} schemas in {folder}")


def schema(group: str) -> dict[str, Any]:
    """The JSON Schema of files in conf/GROUP; of `experiment`: of recipes and of the primary file."""
    body = _experiment() if group == RECIPES else _group(group)
    return {"$schema": DRAFT, "title": f"heads_lightning {group}", **body}


def _experiment() -> dict[str, Any]:
    properties: dict[str, Any] = {"defaults": _defaults(), "hydra": {"type": "object"}}
    for name, field in fields_of(ExperimentConfig).items():
        properties[name] = _group(name, nested=True) if name in Registry.groups else _property(field)
        properties[name]["description"] = field.doc
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _group(group: str, *, nested: bool = False) -> dict[str, Any]:
    """An object with every field of every option of the group."""
    variants: dict[str, dict[str, Field]] = {}
    for option, cls in Registry.groups[group].items():
        for field in fields_of(cls).values():
            if field.name != "name":
                variants.setdefault(field.name, {})[option] = field
    every = len(Registry.groups[group])
    properties = {name: _merged(group, fields, in_all=len(fields) == every) for name, fields in variants.items()}
    if not nested:
        properties["defaults"] = {"type": "array", "items": {"anyOf": [{"enum": [*group_options(group), "_self_"]}, {"type": "object"}]}}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _merged(group: str, fields: dict[str, Field], *, in_all: bool) -> dict[str, Any]:
    """Fields of the same name in several options: one entry, their types joined, and each meaning with the options that it has there."""
    kinds, meanings = [], dict[str, list[str]]()
    for option, field in fields.items():
        kinds += [kind for kind in _property(field)["anyOf"] if kind not in kinds]
        meanings.setdefault(field.doc, []).append(option)
    described = [f"{group}={', '.join(options)}: {doc}" for doc, options in meanings.items()]
    return {"anyOf": kinds, "description": next(iter(meanings)) if in_all and len(meanings) == 1 else "\n".join(described)}


def _defaults() -> dict[str, Any]:
    """The defaults list: `group: option`, `override /group: option`, `_self_`."""
    choices: dict[str, Any] = {}
    for group in groups():
        options = {"anyOf": [{"enum": [*group_options(group), None]}, INTERPOLATION, {"type": "array"}]}
        choices |= {group: options, f"override /{group}": options}
    item = {"anyOf": [{"type": "string"}, {"type": "object", "properties": choices}]}
    return {"type": "array", "items": item}


def _property(field: Field) -> dict[str, Any]:
    kinds = [_kind(field.type), INTERPOLATION, *([{"type": "null"}] if field.optional else [])]
    entry: dict[str, Any] = {"anyOf": kinds, "description": field.doc}
    default = plain(field.default)
    return entry if default == "???" else entry | {"default": default}


def _kind(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a type."""
    if get_origin(hint) is list:
        return {"type": "array", "items": _kind(get_args(hint)[0])}
    if get_origin(hint) is dict or hint is dict:
        return {"type": "object"}
    if is_dataclass(hint):
        properties = {field.name: _property(field) for field in fields_of(hint).values()}  # pyright: ignore[reportArgumentType]
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if hasattr(hint, "__members__"):
        return {"enum": [member.value for member in hint]}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]} if hint in (int, float, bool, str) else {}
