"""`config`: the composed configuration, each value with where it came from; or the difference between two configurations."""

from collections.abc import Sequence
from pathlib import Path

from heads_lightning.commands.show import as_json, table, text_of
from heads_lightning.commands.words import taken
from heads_lightning.composition import compose, flatten, from_yaml
from heads_lightning.composition.provenance import traced
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning config [OVERRIDES] [--config-dir FOLDER] [--json]`, or `config --diff A B`."""
    words, config_dir = taken(list(arguments), "--config-dir", "FOLDER")
    as_text = "--json" not in words
    words = [word for word in words if word != "--json"]
    if "--diff" in words:
        _difference([word for word in words if word != "--diff"], config_dir, as_text=as_text)
        return
    if unknown := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"{unknown[0]} is not a flag of config; it knows --json, --config-dir FOLDER and --diff A B")
    _, values = traced(words, config_dir=config_dir)
    if as_text:
        table([(v.key, text_of(v.value), v.origin) for v in values], ("setting", "value", "from"))
    else:
        as_json({v.key: {"value": v.value, "from": v.origin} for v in values})


def _difference(sides: list[str], config_dir: str | None, *, as_text: bool) -> None:
    if len(sides) != 2:
        raise ConfigError(f"--diff compares two, and {len(sides)} were given: config --diff A B, each a recipe, a run folder or overrides")
    left, right = (flatten(_side(side, config_dir)) for side in sides)
    different = {key: (left.get(key, ""), right.get(key, "")) for key in [*left, *right] if left.get(key) != right.get(key)}
    if as_text:
        table([(key, a, b) for key, (a, b) in different.items()], ("setting", *sides))
    else:
        as_json(different)


def _side(side: str, config_dir: str | None) -> ExperimentConfig:
    """A configuration by its name: a run folder, a saved file, overrides in one word (`objective=mlm head=mlm`), or a recipe."""
    path = Path(side)
    if (path / "config.yaml").is_file():
        return from_yaml(path / "config.yaml")
    if path.is_file():
        return from_yaml(path)
    return compose(side.split() if "=" in side else [f"experiment={side}"], config_dir=config_dir)
