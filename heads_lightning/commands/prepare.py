"""Prepare: tokenise the data of a config, so that training starts at once."""

from pathlib import Path

from heads_lightning.configs.experiment import ExperimentConfig


def run(config: ExperimentConfig, run_dir: Path) -> None:
    """Prepare the data of `config`; done already is nothing to do."""
    import contextlib

    from rich.console import Console

    from heads_lightning.data.progress import PreparationProgress
    from heads_lightning.experiment import prepare_data

    with contextlib.closing(PreparationProgress(Console(stderr=True))) as progress:
        prepared = prepare_data(config, progress=progress)
    print(f"{prepared.folder}: {prepared.train.tokens:,} training and {prepared.validation.tokens:,} held-out tokens")
