"""Train: build everything that a configuration describes, run it, report."""

import os
from pathlib import Path

from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.tracking.process import REQUEUE_SIGNALS, is_first_rank
from heads_lightning.tracking.stopping import Stopped, obey
from heads_lightning.training.attempts import continued, is_restart, requeue, set_aside


def run(config: ExperimentConfig, run_dir: Path) -> float | None:
    """Train `config` in the folder `run_dir`. Returns the final validation loss."""
    if config.resume is not None:
        config, run_dir = _resumed(config)
    elif is_restart(os.environ):
        if is_first_rank():
            set_aside(run_dir)
        config = continued(config, run_dir)
    from heads_lightning.tracking.open_run import open_ahead

    open_ahead(config.tracking, run_root=Path(config.run_root))
    from heads_lightning.run import train

    obey()
    try:
        return train(config, run_dir).metrics.get("val/loss")
    except (KeyboardInterrupt, Stopped, OSError) as stop:
        if continued(config, run_dir).resume:
            stop.add_note(f"  go on with: heads-lightning train resume={run_dir}")
        if isinstance(stop, Stopped) and stop.signal_number in REQUEUE_SIGNALS and is_first_rank():
            requeue(os.environ)
        raise


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
