"""Train: build everything that a configuration describes, run it, report."""

import sys
from pathlib import Path
from typing import Any

from heads_lightning.configs.experiment import ExperimentConfig


def run(config: ExperimentConfig, run_dir: Path) -> float | None:
    """Train `config` in the folder `run_dir`. Returns the final validation loss, which sweepers minimise."""
    if config.resume is not None:
        config, run_dir = _resumed(config)
    from heads_lightning.run import train
    from heads_lightning.training.callbacks import Interrupted

    sweep_dir = _sweep_dir()
    if sweep_dir is not None:
        _open_sweep(config, Path(sweep_dir))
    try:
        return train(config, run_dir, parent=sweep_dir).metrics.get("val/loss")
    except Interrupted as stop:
        print(f"heads-lightning: {stop}\n  go on with: heads-lightning train resume={run_dir}", file=sys.stderr)
        raise


def _sweep_dir() -> str | None:
    """The folder of the sweep that this run is a cell of."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return HydraConfig.get().sweep.dir


_sweep: Any = None
"""The record of the sweep that this process is in the middle of."""


def _open_sweep(config: ExperimentConfig, sweep_dir: Path) -> None:
    """Open the MLflow run that is the parent of the cells', once."""
    global _sweep
    if _sweep is None:
        from heads_lightning.training.tracking import open_parent

        sweep_dir.mkdir(parents=True, exist_ok=True)
        _sweep = open_parent(config.tracking, sweep_dir=sweep_dir, run_root=Path(config.run_root), name=f"sweep {sweep_dir.name}")


def close_sweep(error: BaseException | None) -> None:
    """End the parent run as the sweep ended."""
    global _sweep
    if _sweep is not None:
        from heads_lightning.training.tracking import status_of

        _sweep.finish(status_of(error))
        _sweep = None


def _resumed(config: ExperimentConfig) -> tuple[ExperimentConfig, Path]:
    """The run that `config.resume` names: its config with this command's fields on top, and its folder."""
    from hydra.core.hydra_config import HydraConfig

    from heads_lightning.composition.resume import resumed_config
    from heads_lightning.experiment import find_checkpoint

    assert config.resume is not None
    checkpoint = find_checkpoint(config.resume, config.run_root)
    run_dir = checkpoint.parent.parent
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return resumed_config(run_dir, str(checkpoint), overrides), run_dir
