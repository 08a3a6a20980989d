"""Prepare: tokenise the data of a config, so that training starts at once."""

from pathlib import Path

from heads_lightning.configs.experiment import ExperimentConfig


def run(config: ExperimentConfig, run_dir: Path) -> None:
    """Prepare the data of `config`; done already is nothing to do."""
    import contextlib

    from rich.console import Console

    from heads_lightning.data.prepare import prepare
    from heads_lightning.data.progress import PreparationProgress

    with contextlib.closing(PreparationProgress(Console(stderr=True))) as progress:
        prepared = prepare(config.data, config.tokenizer, progress=progress)
    print(f"{prepared.folder}: {prepared.train.tokens:,} training and {prepared.validation.tokens:,} held-out tokens")
