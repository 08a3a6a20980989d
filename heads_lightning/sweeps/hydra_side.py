"""Between Hydra and a sweep: how a cell's tree is composed by the running application, and what is kept to go on later."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from heads_lightning.configs.sweep import SweepConfig
from heads_lightning.sweeps.settings import Settings
from heads_lightning.sweeps.sweeper import GridSweep, OptunaSweep, Sweep

KINDS: dict[str, type[Sweep]] = {"grid": GridSweep, "optuna": OptunaSweep}


def sweep(kind: str, config: DictConfig, context: HydraContext, launcher: Launcher, overrides: Sequence[str]) -> None:
    """Run a sweep inside the Hydra application whose config is `config`."""
    running = KINDS[kind](
        Path(config.hydra.sweep.dir),
        overrides,
        compose=partial(_composed, config, context),
        launcher=str(config.hydra.runtime.choices["hydra/launcher"]),
    )
    hydra = [text for text in OmegaConf.to_container(config.hydra.overrides.hydra) or [] if not str(text).startswith("hydra.sweep.dir=")]
    keep = Settings(
        overrides=[text for text in overrides if not text.startswith("sweep.resume=")],
        options=SweepConfig(),
        hydra=[str(text) for text in hydra],
        config_dir=next((str(s.path) for s in config.hydra.runtime.config_sources if s.provider == "command-line"), None),
        config_name=str(config.hydra.job.config_name),
        sweeper=kind,
    )
    running.run(launcher.launch, keep)


def _composed(config: DictConfig, context: HydraContext, overrides: Sequence[str]) -> tuple[DictConfig, str | None]:
    """(the cell's tree, the folder that the user's hydra.sweep.subdir gives it; None where that is the number of the job)."""
    tree: Any = context.config_loader.load_sweep_config(config, list(overrides))
    node = OmegaConf.to_container(tree.hydra.sweep, resolve=False)
    assert isinstance(node, dict)
    by_number = "hydra.job.num" in str(node["subdir"]) or "hydra.job.id" in str(node["subdir"])
    folder = None if by_number else str(tree.hydra.sweep.subdir)
    with open_dict(tree):
        del tree["hydra"]
    return tree, folder
