"""Hydra's side of our sweeps: two sweepers, which it wants in this namespace. What they do is in heads_lightning/sweeps/sweeper.py.

Hydra imports this file in every application of the environment, so it imports nothing but Hydra, and it stores no option: those are
known to `heads-lightning` alone.
"""

from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write


class HeadsSweeper(Sweeper):
    """Takes the overrides from Hydra, decides the folder once, and gives Hydra's launcher the cells.

    Args:
        kind: which sweep.
        params: overrides that a config file gives the sweep (`hydra.sweeper.params`), as Hydra's own sweeper has them; those of the
            command line win.
    """

    def __init__(self, kind: str, params: dict[str, Any] | None = None) -> None:
        self.kind = kind
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        _fix_folder(config)
        launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)
        self.given = config, hydra_context, launcher

    def sweep(self, arguments: list[str]) -> Any:
        from heads_lightning.sweeps import hydra_side

        given = {argument.partition("=")[0].lstrip("+") for argument in arguments}
        named = [f"{key}={value}" for key, value in self.params.items() if key not in given]
        return hydra_side.sweep(self.kind, *self.given, [*named, *arguments])


def _fix_folder(config: DictConfig) -> None:
    """The folder as it is now, for every process: a date in it is not read again."""
    folder = str(Path(str(config.hydra.sweep.dir)).resolve())
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    kept = [text for text in map(str, config.hydra.overrides.hydra) if not text.startswith("hydra.sweep.dir=")]
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweep.dir = folder
        config.hydra.overrides.hydra = [*kept, f"hydra.sweep.dir='{quoted}'"]
