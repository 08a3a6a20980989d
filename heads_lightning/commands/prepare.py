"""Prepare: tokenise the data of a config, so that training starts at once."""

from pathlib import Path

from heads_lightning.configs.experiment import ExperimentConfig


def run(config: ExperimentConfig, run_dir: Path) -> None:
    """Prepare the data of `config`; done already is nothing to do."""
    from heads_lightning.experiment import prepare_data

    prepared = prepare_data(config)
    print(f"{prepared.folder}: {prepared.train.tokens:,} training and {prepared.validation.tokens:,} held-out tokens")
