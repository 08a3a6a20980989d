"""What a checkpoint is besides its weights: description, tokenizer, special tokens, and the record of how it was converted.

Hugging Face folder   config.json       generation_config.json   tokenizer files   weights
native folder         config.yaml       the same                 tokenizer files   weights          conversion.json
run                   checkpoints/step-….ckpt, which holds config and tokenizer
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heads_lightning.batch import Attention
from heads_lightning.composition import compose, from_yaml, to_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.configs.layers import Position
from heads_lightning.configs.value import ValueConfig
from heads_lightning.conversion.families import OWN, Family, NativeModel, family_of_config
from heads_lightning.conversion.pretrained import native_backbone, read_config
from heads_lightning.conversion.sources import DistributedSource, TensorSource, TorchSource, open_weights
from heads_lightning.experiment import find_checkpoint
from heads_lightning.objectives.base import Vocabulary
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import KEY, is_weights_folder, read_checkpoint
from heads_lightning.training.distributed_checkpoints import STATE

CONFIG, NATIVE_CONFIG, RECORD, GENERATION = "config.json", "config.yaml", "conversion.json", "generation_config.json"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DECODER_START = "decoder_start_token_id"
TRAVELLING = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", GENERATION),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
"""Files that are the same on both sides."""


@dataclass
class Checkpoint:
    """An opened source."""

    name: str
    """What the user called it."""
    form: str
    """huggingface or native."""
    model: NativeModel
    """What it is in our terms."""
    weights: TensorSource
    """Its tensors."""
    family: Family | None = None
    """Its family, where it is Hugging Face's."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Files that travel along."""
    tokens: dict[str, Any] = field(default_factory=dict)
    """Special token ids of config.json, where it had them."""
    config: ExperimentConfig | None = None
    """The experiment, where it is ours."""


def open_checkpoint(reference: str, *, run_root: str = "runs") -> Checkpoint:
    """The source that a word names: a folder of Hugging Face or of ours, a distributed checkpoint in one of these, or a run.

    Raises:
        ConfigError: nothing is there, or it cannot be converted.
    """
    path = Path(reference).expanduser()
    if (path / CONFIG).is_file():
        return _open_huggingface(reference, path)
    if (path / NATIVE_CONFIG).is_file() and not (path / "checkpoints").is_dir():
        return _open_native(reference, path)
    return _open_run(reference, find_checkpoint(reference, run_root))


def _open_huggingface(name: str, folder: Path) -> Checkpoint:
    config, weights = read_config(folder), open_weights(folder)
    family = family_of_config(config, weights.specs)
    model = family.native(config)
    tokens = {key: config[key] for key in (*TOKEN_FIELDS, DECODER_START) if key in config}
    return Checkpoint(name, "huggingface", model, weights, family.of_model(model), _travelling(folder), tokens)


def _open_native(name: str, folder: Path) -> Checkpoint:
    config, weights = from_yaml(folder / NATIVE_CONFIG), open_weights(folder)
    record = folder / RECORD
    tokens = json.loads(record.read_text(encoding="utf-8")).get("tokens", {}) if record.is_file() else {}
    return Checkpoint(name, "native", _model_of(config, weights), weights, None, _travelling(folder), tokens, config)


def _open_run(name: str, path: Path) -> Checkpoint:
    """A run's checkpoint: a file, or a folder that its ranks wrote. The average of the weights counts where the run kept one."""
    if is_weights_folder(path):
        return _open_native(name, path)
    if path.is_dir():
        record = torch.load(path / STATE, weights_only=True)[KEY]
        weights: TensorSource = DistributedSource(path, ("average.", "state_dict."))
    else:
        record, weights = read_checkpoint(path)[KEY], TorchSource([path], ("state_dict", "average"))
    config = from_yaml(record["config"])
    files = {key: text.encode("utf-8") for key, text in record["tokenizer"].items()}
    return Checkpoint(name, "native", _model_of(config, weights), weights, None, files, {}, config)


def _travelling(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TRAVELLING if (folder / name).is_file()}


def _model_of(config: ExperimentConfig, weights: TensorSource) -> NativeModel:
    """The model of an experiment; its vocabulary is as large as its embedding."""
    if "backbone.embedding.weight" not in weights.specs:
        raise ConfigError("the checkpoint holds no backbone.embedding.weight: it was not written by heads_lightning")
    rows = weights.specs["backbone.embedding.weight"].shape[0]
    judged = config.objective if isinstance(config.objective, ValueConfig) else None
    return NativeModel(native_backbone(config.backbone), config.head, rows, config.objective.attention, judged)


# -- writing ------------------------------------------------------------------------------------------------------------


def special_tokens(vocabulary: Vocabulary | None, vocab_size: int = 0) -> dict[str, int | None]:
    """Ids for config.json. Always said, also when there is none: transformers' own defaults are ids of other tokenizers."""
    tokens: dict[str, int | None] = dict.fromkeys(TOKEN_FIELDS)
    if vocabulary is not None:
        tokens |= {"eos_token_id": vocabulary.end_of_document, "pad_token_id": vocabulary.padding}
    return {key: value if value is not None and value < vocab_size else None for key, value in tokens.items()}


def huggingface_files(checkpoint: Checkpoint, family: Family, model: NativeModel, dtype: str) -> dict[str, str | bytes]:
    """Everything of a Hugging Face folder but the weights."""
    tokens = checkpoint.tokens or special_tokens(_vocabulary(checkpoint.files), model.vocab_size)
    if family.attention == Attention.encoder_decoder:  # T5 decodes from padding
        tokens = {DECODER_START: tokens.get("pad_token_id")} | tokens
    config = {"architectures": [family.architecture], "model_type": family.name, "dtype": dtype, "torch_dtype": dtype}
    files: dict[str, str | bytes] = {CONFIG: _json(config | family.describe(model) | tokens), **checkpoint.files}
    if family.objective == "causal":
        files.setdefault(
            GENERATION, _json({"_from_model_config": True, **{key: value for key, value in tokens.items() if value is not None}})
        )
    return files


def native_files(checkpoint: Checkpoint, model: NativeModel) -> dict[str, str | bytes]:
    """Everything of a native folder but the weights and the record."""
    config = checkpoint.config or default_experiment(model, checkpoint.family or OWN)
    return {NATIVE_CONFIG: to_yaml(replace(config, backbone=model.backbone, head=model.head)), **checkpoint.files}


def default_experiment(model: NativeModel, family: Family) -> ExperimentConfig:
    """An experiment around a model that did not come from one: the defaults of everything else."""
    attention = model.attention or family.attention
    overrides = [f"objective={family.objective}", f"head={model.head.name}", f"backbone={model.backbone.name}"]
    overrides += [f"backbone.{key}={value}" for key, value in type(model.backbone).fields_for(attention).items()]
    if model.objective is not None and model.objective.bidirectional:
        overrides.append("objective.bidirectional=true")
    config = compose(overrides)
    length = config.data.sequence_length
    if getattr(model.backbone, "position", None) == Position.learned:
        length = min(length, model.backbone.max_positions)  # pyright: ignore[reportAttributeAccessIssue]
    data = replace(config.data, sequence_length=length)
    objective = config.objective if model.objective is None else model.objective
    return replace(config, backbone=model.backbone, head=model.head, objective=objective, data=data, name=family.name)


def _vocabulary(files: Mapping[str, bytes]) -> Vocabulary | None:
    """What the tokenizer among the files knows, or None where there is none."""
    if "tokenizer.json" not in files:
        return None
    from heads_lightning.experiment import tokenizer_from

    return tokenizer_from(
        {name: files[name].decode("utf-8") for name in ("tokenizer.json", "tokenizer_config.json") if name in files}
    ).vocabulary


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
