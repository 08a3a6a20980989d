"""From a config to parts that run: the only place that knows every part.

`build` makes data, objective and module; `load` brings a trained run back. Training itself is `run.train`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from heads_lightning.backbones.base import Backbone
from heads_lightning.composition import from_yaml, validate
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.head import LMHeadConfig
from heads_lightning.configs.tokenizer import HuggingFaceTokenizerConfig
from heads_lightning.configs.trainer import LinearKernel
from heads_lightning.configs.value import ValueConfig, ValueHeadConfig
from heads_lightning.data.datamodule import TokenDataModule
from heads_lightning.data.prepare import PreparedData, Progress, prepare
from heads_lightning.data.scored import PreparedRecords, prepare_records
from heads_lightning.data.tokenizer import TOKENIZER_FILE, Tokenizer, from_huggingface
from heads_lightning.heads.base import Head, LMHead
from heads_lightning.heads.value import ValueHead
from heads_lightning.module import LanguageModule
from heads_lightning.objectives.base import Objective
from heads_lightning.onednn import use_for_linear_layers
from heads_lightning.registry import ConfigError
from heads_lightning.training.blocks import prepare_blocks
from heads_lightning.training.checkpoints import KEY, is_checkpoint, is_weights_folder, newest_checkpoint, read_checkpoint


@dataclass
class Experiment:
    """The parts of a run."""

    config: ExperimentConfig
    prepared: PreparedData | PreparedRecords
    objective: Objective
    datamodule: TokenDataModule
    module: LanguageModule


def build_model(config: ExperimentConfig, vocab_size: int, *, device: torch.device | str = "cpu") -> tuple[Backbone, Head]:
    """Backbone and head, laid out on meta, then initialised on `device` from config.seed: the same weights on any device count."""
    backbone = config.backbone.build(vocab_size=vocab_size, init_device="meta")
    head = build_head(config, backbone, vocab_size, init_device="meta")
    backbone.to_empty(device=device)
    head.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(config.seed)
    backbone.reset_parameters(generator)
    head.reset_parameters(generator)
    if config.head.is_tied:
        assert isinstance(head, LMHead | ValueHead)
        head.tie(backbone.embedding)  # to_empty gave each its own storage
    return backbone, head


def load_pretrained(config: ExperimentConfig, backbone: Backbone, head: Head, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Fill a new model with the weights that its config takes from elsewhere, and say what was done; most configs take none.

    Raises:
        ConfigError: the tokenizer is another model's, or the head would lose weights.
    """
    foreign = isinstance(config.tokenizer, HuggingFaceTokenizerConfig)
    generator = torch.Generator().manual_seed(config.seed)
    new_tokens = tokenizer.vocabulary.added if foreign else None
    lines = config.backbone.load_pretrained(backbone, head, new_tokens=new_tokens, generator=generator)
    if lines and not foreign:
        lines.append(
            f"tokenizer: the weights were not trained with tokenizer={config.tokenizer.name}, so their embedding means nothing here; "
            f"theirs is tokenizer=huggingface tokenizer.path={getattr(config.backbone, 'source', 'FOLDER')}"
        )
    for line in lines:
        say(line)


def build_head(config: ExperimentConfig, backbone: Backbone, vocab_size: int, *, init_device: str) -> Head:
    """The head that fits a backbone."""
    embedding = backbone.embedding if config.head.is_tied else None
    where = {"d_model": backbone.d_model, "vocab_size": vocab_size, "init_device": init_device, "embedding": embedding}
    if isinstance(config.head, ValueHeadConfig):
        assert isinstance(config.objective, ValueConfig)  # validated: objective and head predict the same
        return config.head.build(**where, objective=config.objective)
    assert isinstance(config.head, LMHeadConfig)
    return config.head.build(**where)


def prepare_data(config: ExperimentConfig, *, progress: Progress | None = None) -> PreparedData | PreparedRecords:
    """The data of an experiment: records with their numbers for objective=value where the source has them, else a stream of tokens."""
    if isinstance(config.objective, ValueConfig) and config.data.has_records:
        return prepare_records(config.data, config.tokenizer, config.objective, progress=progress)
    return prepare(config.data, config.tokenizer, progress=progress)


def build(config: ExperimentConfig, *, progress: Progress | None = None, say: Callable[[str], None] = print) -> Experiment:
    """Prepare the data and build every part.

    Args:
        config: the experiment.
        progress: told how far the preparation of data is.
        say: told which weights come from elsewhere.

    Raises:
        ConfigError: the parts do not fit each other, or the data cannot be prepared.
    """
    validate(config)
    prepared = prepare_data(config, progress=progress)
    objective = config.objective.build(prepared.tokenizer.vocabulary)
    sizes = config.trainer.batch_sizes(config.data.sequence_length)
    datamodule = TokenDataModule(
        prepared,
        objective,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.trainer.global_batch_size,
        micro_batch_size=config.trainer.micro_batch_size,
        seed=config.seed,
        validation_sequences=config.data.validation_sequences,
        total_steps=config.trainer.steps(config.data.sequence_length),
        length_start=config.data.length_start,
        length_warmup_steps=config.data.length_warmup_steps,
        batch_start=sizes.start,
        batch_warmup_steps=sizes.warmup_steps,
        shares=config.data.shares(),
        ranks_per_share=config.trainer.tensor_ranks,
    )
    backbone, head = build_model(config, prepared.tokenizer.vocabulary.size)
    load_pretrained(config, backbone, head, prepared.tokenizer, say)
    prepare_blocks(backbone, config.trainer)
    if config.trainer.linear_kernel == LinearKernel.onednn:
        for part in (backbone, head):
            use_for_linear_layers(part)
    module = LanguageModule(
        backbone,
        head,
        optimizer=config.optimizer,
        schedule=config.schedule.in_steps(sizes.steps),
        total_steps=config.trainer.steps(config.data.sequence_length),
        parts=objective.parts,
        max_bad_steps=config.trainer.max_bad_steps,
    )
    return Experiment(config, prepared, objective, datamodule, module)


# -- finding and loading runs -------------------------------------------------------------------------------------------


def find_checkpoint(reference: str, run_root: str = "runs") -> Path:
    """The checkpoint that `reference` names: a run folder (its newest), a checkpoint file, or an MLflow run id."""
    path = Path(reference).expanduser()
    if is_checkpoint(path) or is_weights_folder(path):
        return path
    if path.is_dir():
        return newest_checkpoint(path)
    from heads_lightning.tracking.open_run import find_run_dir

    folder = find_run_dir(reference, Path(run_root))
    if folder is None:
        raise ConfigError(
            f"{reference} is not a run folder, a checkpoint file or an MLflow run id known in {run_root}; "
            f"runs lie in {run_root}/NAME/DATE, e.g. checkpoint={_newest_run(Path(run_root)) or run_root + '/…'}"
        )
    return newest_checkpoint(folder)


def _newest_run(run_root: Path) -> Path | None:
    runs = sorted(run_root.glob("*/*/checkpoints"), key=lambda p: p.stat().st_mtime)
    return runs[-1].parent if runs else None


@dataclass
class TrainedModel:
    """A model with everything needed to ask it something."""

    config: ExperimentConfig
    tokenizer: Tokenizer
    backbone: Backbone
    head: Head
    step: int
    checkpoint: Path


def load(reference: str, *, run_root: str = "runs", device: torch.device | str = "cpu") -> TrainedModel:
    """The model of a run folder, checkpoint file or MLflow run id, in evaluation mode."""
    _check_device(device)
    path = find_checkpoint(reference, run_root)
    checkpoint = read_checkpoint(path)
    config = from_yaml(checkpoint[KEY]["config"])
    tokenizer = tokenizer_from(checkpoint[KEY]["tokenizer"])
    weights = checkpoint["state_dict"] | checkpoint.get("average", {})
    # a converted model may have more rows than the tokenizer has tokens
    rows = checkpoint[KEY].get("vocab_size", tokenizer.vocabulary.size)
    backbone, head = build_model(config, rows, device=device)
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")})
    head.load_state_dict({k.removeprefix("head."): v for k, v in weights.items() if k.startswith("head.")})
    return TrainedModel(config, tokenizer, backbone.eval(), head.eval(), checkpoint["global_step"], path)


def _check_device(device: torch.device | str) -> None:
    """Refuse a device that is not here, before anything is read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = str(device).split(":")[0] in ("cpu", "cuda", "mps", "xpu")
        reason = (
            f"is not on this machine ({str(error).splitlines()[0][:80]})" if known else "is no device; there are cpu, cuda, cuda:1, mps"
        )
        raise ConfigError(f"device={device} {reason}; use device=cpu") from error


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """A tokenizer as {file name: contents}, to travel inside a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def tokenizer_from(files: dict[str, str]) -> Tokenizer:
    """What tokenizer_files gave, or the tokenizer.json of others."""
    with tempfile.TemporaryDirectory() as folder:
        for name, contents in files.items():
            (Path(folder) / name).write_text(contents, encoding="utf-8")
        return from_huggingface(Path(folder) / TOKENIZER_FILE, num_sentinels=0)
