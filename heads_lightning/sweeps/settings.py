"""sweep.json: the command line and settings of a sweep, so that it can be gone on with and its cells know what they belong to."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from heads_lightning.composition.saved import plain, section_from
from heads_lightning.configs.sweep import SweepConfig
from heads_lightning.registry import ConfigError
from heads_lightning.tracking.run_folder import read_json, write_json

FILE = "sweep.json"


class Settings(NamedTuple):
    """What a sweep is."""

    overrides: list[str]
    """Of the command line, those for Hydra left out."""
    options: SweepConfig
    hydra: list[str]
    """Overrides for Hydra: launcher and sweeper."""
    config_dir: str | None
    """Folder of the user's own files (`--config-dir`)."""
    config_name: str
    """Primary config."""
    sweeper: str
    """`grid` or `optuna`."""


def write(sweep_dir: Path, settings: Settings) -> None:
    """Keep the settings of the newest command."""
    facts: dict[str, Any] = {**settings._asdict(), "options": plain(settings.options), "written": round(time.time(), 3)}
    write_json(sweep_dir / FILE, facts)


def read(sweep_dir: Path) -> Settings:
    """The settings of a sweep.

    Raises:
        ConfigError: the folder is not one of a sweep.
    """
    found = read_json(sweep_dir / FILE)
    if not found:
        run = f"; it is one of a run: train resume={sweep_dir}" if (sweep_dir / "checkpoints").is_dir() else ""
        raise ConfigError(f"{sweep_dir} is not the folder of a sweep: it holds no {FILE}{run}")
    options = section_from(SweepConfig, found["options"], str(sweep_dir / FILE))
    return Settings(**{**{name: found[name] for name in Settings._fields}, "options": options})
