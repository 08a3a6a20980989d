"""The schemas that editors read for conf/: current, named by every shipped file, and right about those files."""

import re
from typing import Any

import pytest
import yaml

from heads_lightning.__main__ import main
from heads_lightning.commands.schema import schema
from heads_lightning.composition.describe import groups
from heads_lightning.composition.store import conf_dir, prepare_store

FILES = sorted(path for path in conf_dir().rglob("*.yaml") if "hydra" not in path.parts)
LINE = re.compile(r"(?:# @package _global_\n)?# yaml-language-server: \$schema=(\S+)\n")


def test_the_shipped_schemas_are_current(tmp_path, capsys):
    assert main(["schema", "--out", str(tmp_path)]) == 0
    shipped = {path.name: path.read_text() for path in (conf_dir() / "schema").iterdir()}
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == shipped, "write them anew: heads-lightning schema --out conf/schema (or make format)"


def unknown(value: Any, kinds: list[dict[str, Any]], path: str = "") -> list[str]:
    """Names in a file for which none of the schemas `kinds` has a property, and scalars of a type that none of them takes."""
    if any("type" not in kind and "enum" not in kind for kind in kinds):
        return []  # anything goes
    if isinstance(value, dict):
        objects = [kind for kind in kinds if kind.get("type") == "object"]
        if any("properties" not in kind for kind in objects):
            return []
        found = []
        for key, inner in value.items():
            entries = [kind["properties"][key] for kind in objects if key in kind["properties"]]
            kinds_of_key = [kind for entry in entries for kind in entry.get("anyOf", [entry])]
            found += unknown(inner, kinds_of_key, f"{path}.{key}") if entries else [f"{path}.{key}"]
        return found
    return [] if any(_takes(kind, value) for kind in kinds) else [f"{path}={value!r}"]


def _takes(kind: dict[str, Any], value: Any) -> bool:
    types = {"integer": int, "number": (int, float), "boolean": bool, "string": str, "array": list, "null": type(None)}
    if "enum" in kind:
        return value in kind["enum"]
    return isinstance(value, types.get(kind["type"], ()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_names_its_schema_and_keeps_it(path):
    prepare_store()
    named = LINE.match(path.read_text(encoding="utf-8"))
    assert named, f"{path} does not begin with `# yaml-language-server: $schema=…`"
    group = "experiment" if path.parent == conf_dir() else path.parent.name
    assert group in groups()
    assert (path.parent / named[1]).resolve() == conf_dir().resolve() / "schema" / f"{group}.json"
    assert unknown(yaml.safe_load(path.read_text(encoding="utf-8")), [schema(group)]) == []


def test_a_schema_finds_mistakes():
    prepare_store()
    assert unknown({"trainer": {"max_stps": 3}}, [schema("experiment")]) == [".trainer.max_stps"]
    assert unknown({"trainer": {"max_steps": [3]}}, [schema("experiment")]) == [".trainer.max_steps=[3]"]
