"""`check`: try an experiment out before it costs anything; or, with --config-only, compose every recipe of a folder in a moment."""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from heads_lightning.commands.arguments import read
from heads_lightning.commands.show import as_json, table
from heads_lightning.commands.words import taken
from heads_lightning.composition import compose, compose_tree, loaded_once, to_experiment
from heads_lightning.composition.mistakes import explained
from heads_lightning.composition.store import conf_dir
from heads_lightning.configs.requests import PlanRequest
from heads_lightning.registry import ConfigError

FLAGS = ("--json", "--config-only")
Arguments = PlanRequest
"""Beside the overrides."""


class Verdict(NamedTuple):
    """What a recipe's composition came to."""

    recipe: str
    verdict: str
    text: str


def main(arguments: Sequence[str]) -> int:
    """`heads-lightning check [OVERRIDES] [KEY=VALUE of PlanRequest] [--config-dir FOLDER] [--json] [--config-only]`.

    The exit code is 1 when something failed.
    """
    words, config_dir = taken(list(arguments), "--config-dir", "FOLDER")
    words, config_name = taken(words, "--config-name", "NAME")
    if unknown := [word for word in words if word.startswith("-") and word not in FLAGS]:
        raise ConfigError(f"{unknown[0]} is not a flag of check; it knows {', '.join(FLAGS)}, --config-dir FOLDER and --config-name NAME")
    own = [field.name for field in fields(Arguments)]
    about_time = [word for word in words if word.partition("=")[0] in own]
    overrides = [word for word in words if word not in (*FLAGS, *about_time)]
    assumed, _ = read(Arguments, about_time)
    if "--config-only" in words:
        if about_time:
            raise ConfigError(f"{about_time[0]} is for the plan of one experiment, which --config-only does not make; leave it out")
        return _recipes(overrides, config_dir, as_text="--json" not in words)
    return _experiment(overrides, config_dir, config_name, assumed, as_text="--json" not in words)


def _recipes(words: list[str], config_dir: str | None, *, as_text: bool) -> int:
    """Compose and validate every recipe, without torch."""
    overrides, files = _named(words)
    gc.disable()  # a third of the time; the process ends soon
    try:
        with loaded_once():
            found = [_verdict(file.stem, overrides, config_dir or str(file.parent.parent)) for file in files or _found(config_dir)]
    finally:
        gc.enable()
    if as_text:
        table([(row.verdict, f"experiment={row.recipe}", row.text) for row in found])
    else:
        as_json([row._asdict() for row in found])
    return int(any(row.verdict == "failed" for row in found))


def _named(words: list[str]) -> tuple[list[str], list[Path]]:
    """The overrides, and the files of recipes that are named by a path: `my_conf/experiment`, or a file in it."""
    paths = [Path(word) for word in words if "=" not in word and Path(word).exists()]
    for path in paths:
        if (path if path.is_dir() else path.parent).resolve().name != "experiment" or not (path.is_dir() or path.suffix == ".yaml"):
            raise ConfigError(f"{path} is not a folder of recipes: they lie in FOLDER/experiment/NAME.yaml; --config-dir FOLDER checks all")
    files = [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    if paths and not files:
        raise ConfigError(f"{paths[0]}: no *.yaml to check")
    return [word for word in words if Path(word) not in paths], files


def _found(config_dir: str | None) -> list[Path]:
    """Every recipe that ships, and those of a folder of the user's."""
    folders = [Path(str(conf_dir())), *([Path(config_dir)] if config_dir else [])]
    files = {path.stem: path for folder in folders for path in (folder / "experiment").glob("*.yaml")}
    if not files:
        raise ConfigError(f"{', '.join(map(str, folders))}: no experiment/*.yaml to check")
    return [files[name] for name in sorted(files)]


def _verdict(name: str, overrides: list[str], config_dir: str | None) -> Verdict:
    """Whether a recipe composes; of one that leaves values to whoever uses it, with a word in their place."""
    given = [f"experiment={name}", *overrides]
    try:
        tree = compose_tree(given, config_dir=config_dir)
        left = list(_left(OmegaConf.to_container(tree)))
        with explained(given, config_dir):
            for key in left:
                OmegaConf.update(tree, key, "given_later")
        to_experiment(tree, given)
    except ConfigError as error:
        return Verdict(name, "failed", str(error))
    return Verdict(name, "ok", f"leaves to you: {', '.join(left)}" if left else "")


def _left(node: Any, path: str = "") -> Iterator[str]:
    """Keys without a value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _left(value, f"{path}.{key}" if path else str(key))
    elif node == "???":
        yield path


def _experiment(overrides: list[str], config_dir: str | None, config_name: str | None, assumed: PlanRequest, *, as_text: bool) -> int:
    """Every probe of one experiment, said as it is done."""
    named = {} if config_name is None else {"config_name": config_name}
    config = compose(overrides, config_dir=config_dir, **named)
    from heads_lightning.preflight import preflight

    started, rows = time.perf_counter(), []
    for row in preflight(config, assumed=assumed, say=print if as_text else lambda line: None):
        rows.append(row)
        if as_text:
            print(f"{row.verdict:8} {row.name:14} {row.text}", flush=True)
    failed = [row.name for row in rows if row.verdict == "failed"]
    seconds = time.perf_counter() - started
    if as_text:
        print(f"{'failed: ' + ', '.join(failed) if failed else 'nothing speaks against it'} ({len(rows)} probes, {seconds:.0f} s)")
    else:
        as_json({"failed": failed, "seconds": round(seconds, 2), "rows": [row._asdict() for row in rows]})
    return int(bool(failed))
