"""`backbone=huggingface_import`: reading a source's config.json while composing, and its weights when the model is built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.base import LayerNormConfig
from heads_lightning.configs.head import DefaultLMHeadConfig, HeadConfig
from heads_lightning.configs.huggingface import HuggingFaceConfig
from heads_lightning.configs.huggingface_import import HuggingFaceImportConfig
from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.families import family_of_config
from heads_lightning.conversion.families.base import NativeModel
from heads_lightning.conversion.mapping import ConversionError, listed
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from heads_lightning.conversion.sources import TensorSource

EMBEDDING = "backbone.embedding.weight"
SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of a config.json that change logits after the projection."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, as plain values."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; give the folder of a downloaded checkpoint") from None
    except ValueError:
        raise ConfigError(f"{file} is not JSON; is the checkpoint whole?") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no description of a model")
    return config


def native_backbone(config: BackboneConfig) -> BackboneConfig:
    """The backbone itself, where `config` says that another is imported."""
    return native_of(config).backbone if isinstance(config, HuggingFaceImportConfig) else config


def native_of(config: HuggingFaceImportConfig) -> NativeModel:
    """The native model that a source describes. Needs no torch."""
    described = config.architecture or read_config(Path(config.source).expanduser())
    return family_of_config(described).native(described)


def load_pretrained(
    config: HuggingFaceImportConfig,
    backbone: nn.Module,
    head: nn.Module | None = None,
    *,
    new_tokens: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Copy a source's weights into the native model built from its config; returns lines that say what was done.

    The head takes its weights where it is the source's kind of head; another head stays as it was initialised, and a line says so.
    Rows of tokens that the source has not met begin near the mean of the others; rows without a token here are left out.

    Args:
        config: the source.
        backbone, head: what is filled.
        new_tokens: ids that the source has no token for. None: those past its last row, of whatever tokenizer this is.
        generator: of what tells their rows apart.

    Raises:
        ConversionError: a weight of the backbone would be left at its random initialisation, or has another shape.
        ConfigError: the head is tied, and the source's is not; or the tokenizer has further tokens that the source lacks.
    """
    from heads_lightning.conversion.sources import open_weights

    folder = Path(config.source).expanduser()
    described = read_config(folder)
    source = open_weights(folder)
    family = family_of_config(described, source.specs)
    model = family.native(described)
    state = _converted(source, family, model)
    known = len(state[EMBEDDING])
    lines = [f"backbone: {len(state)} weights of {folder.name} ({family.name})"]
    lines += [f"backbone.{line}" for line in _copy_into(backbone, _below("backbone", state))]
    lines += [] if head is None else _fill_head(head, model.head, state, family.architecture)
    return lines + _begin_tokens(backbone, head, known, new_tokens, generator, folder)


def load_head(
    config: HuggingFaceConfig,
    backbone: nn.Module,
    head: nn.Module | None,
    *,
    new_tokens: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """As load_pretrained, for `backbone=huggingface`, whose trunk has its weights already: the head, and the rows of new tokens."""
    from heads_lightning.conversion.sources import open_weights

    folder = local_folder(config.source, config.revision)
    described, source = read_config(folder), open_weights(folder)
    known = int(text_config(described)["vocab_size"])
    lines = [f"backbone: {folder.name}, by transformers"]
    if head is not None:
        architecture = str((described.get("architectures") or [described.get("model_type")])[0])
        try:
            family = family_of_config(described, source.specs)
            model = family.native(described)
            state, wanted = _converted(source, family, model, head_alone=True), model.head
        except (ConfigError, ConversionError):  # an architecture without a native counterpart, or a trunk saved alone
            state, wanted = _plain_head(source, described, backbone)
        lines += _fill_head(head, wanted, state, architecture)
    return lines + _begin_tokens(backbone, head, known, new_tokens, generator, folder)


def local_folder(source: str, revision: str | None) -> Path:
    """The folder of a checkpoint; of a name on the hub, where transformers has put it."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def text_config(described: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the language model."""
    return described.get("text_config") or described


def _converted(source: TensorSource, family: Any, model: NativeModel, *, head_alone: bool = False) -> dict[str, Tensor]:
    """Native weights by name; `head_alone`: the head's, and the embedding that it may be tied to."""
    names = {ours: theirs for ours, theirs in family.canonical(source.specs).items() if family.reason_left_out(ours) is None}
    names = {ours: theirs for ours, theirs in names.items() if ours not in family.copies(model)}
    templates = family.templates(model)
    if head_alone:
        templates = [t for t in templates if t.dest_template_keys == EMBEDDING or str(t.dest_template_keys).startswith("head.")]
        names = {ours: theirs for ours, theirs in names.items() if any(t.source_template_keys == ours for t in templates)}
    if not any(name.startswith(family.head_prefixes) for name in names):  # a trunk saved alone
        templates = [t for t in templates if not str(t.source_template_keys).startswith(family.head_prefixes)]
    state = {ours: source.read(theirs) for ours, theirs in names.items()}
    return StateConverter(templates).convert(state, family.bounds(model))


def _plain_head(source: TensorSource, described: dict[str, Any], backbone: Any) -> tuple[dict[str, Tensor], HeadConfig | None]:
    """The projection of a decoder whose architecture is not known here, under the name that transformers' decoders share."""
    text = text_config(described)
    if any(text.get(field) not in (None, 1, 1.0) for field in SCALES):
        return {}, None
    state = {f"head.w_out.{kind}": source.read(f"lm_head.{kind}") for kind in ("weight", "bias") if f"lm_head.{kind}" in source.specs}
    is_tied = bool(getattr(backbone.described, "tie_word_embeddings", False))
    if not state and not is_tied:
        return {}, None
    if is_tied:
        state[EMBEDDING] = backbone.embedding.weight[: int(text["vocab_size"])]
    return state, DefaultLMHeadConfig(bias="head.w_out.bias" in state, tie_embeddings=is_tied)


def _below(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def _fill_head(head: nn.Module, wanted: HeadConfig | None, state: dict[str, Tensor], architecture: str) -> list[str]:
    """Copy the source's head where it is of the same kind; tied or not may differ, but not so that a matrix is lost."""
    own = _below("head", state)
    if wanted is None or (not own and not wanted.is_tied):
        return [f"head: freshly initialised, since that of {architecture} is not known"]
    if others := _differences(head, wanted):
        return [f"head: freshly initialised; that of {architecture} is taken with {' '.join(others)}"]
    is_tied = bool(head.config.is_tied)  # pyright: ignore[reportAttributeAccessIssue]
    if is_tied and not wanted.is_tied:
        raise ConfigError(f"head.tie_embeddings=true would lose the output matrix of {architecture}; use head.tie_embeddings=false")
    if wanted.is_tied and not is_tied:
        own["w_out.weight"] = state[EMBEDDING]
    return [f"head: {len(own) or 'tied, no'} weights of {architecture}", *(f"head.{line}" for line in _copy_into(head, own))]


def _differences(head: nn.Module, wanted: HeadConfig) -> list[str]:
    """Overrides that would make a head the source's kind."""
    config = getattr(head, "config", None)
    if config is None or config.name != wanted.name:
        return [f"head={wanted.name}"]
    fields = ("layer_norm", "activation", "dense_bias", "logit_softcap", "scales", "hidden_dim", "has_bias")
    fields = (*fields, "bias") if wanted.predicts == "value" else fields
    different = [field for field in fields if getattr(config, field, None) != getattr(wanted, field, None)]
    return [override for field in different for override in _overrides(field.removeprefix("has_"), getattr(wanted, field, None))]


def _overrides(field: str, value: Any) -> list[str]:
    if isinstance(value, LayerNormConfig):
        return [f"head/layer_norm={value.name}", f"head.layer_norm.eps={value.eps}", f"head.layer_norm.bias={str(value.bias).lower()}"]
    text = "null" if value is None else str(value)
    return [f"head.{field}={text.lower() if isinstance(value, bool) else text}"]


def _begin_tokens(
    backbone: Any, head: nn.Module | None, known: int, new_tokens: Sequence[int] | None, generator: torch.Generator | None, folder: Path
) -> list[str]:
    """Rows of tokens that the source has not met: those named, and those past its last row."""
    from heads_lightning.new_tokens import initialise_new_tokens

    embedding = backbone.embedding
    past = range(known, embedding.num_embeddings)
    if new_tokens is not None and (unnamed := set(past).difference(new_tokens)):
        raise ConfigError(
            f"the tokenizer has {len(unnamed)} tokens more than the {known} of the checkpoint, so it is another model's; "
            f"use tokenizer=huggingface tokenizer.path={folder}"
        )
    strangers = sorted({*(new_tokens or ()), *past})
    if not strangers:
        return []
    initialise_new_tokens(embedding, head, strangers, generator=generator)
    lines = [f"embedding: {len(strangers)} new tokens begin near the mean of the others"]
    if not embedding.weight.requires_grad:
        lines.append("embedding: it is frozen, so the new tokens stay there; backbone.train_embedding=true trains it")
    return lines


def _copy_into(module: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Copy by name; a first dimension may differ where it is the vocabulary's."""
    import torch

    parameters, lines = dict(module.named_parameters()), []
    if absent := parameters.keys() ^ state.keys():
        raise ConversionError(f"without a counterpart: {listed(absent)}")
    with torch.no_grad():
        for name, tensor in state.items():
            parameter = parameters[name]
            rows = min(len(parameter), len(tensor)) if tensor.ndim else 0
            if tensor.ndim != parameter.ndim or tensor.shape[1:] != parameter.shape[1:]:
                raise ConversionError(f"{name} {list(tensor.shape)} does not fit {list(parameter.shape)}")
            if tensor.shape != parameter.shape and not name.startswith(("embedding.", "w_out.")):
                raise ConversionError(f"{name} {list(tensor.shape)} does not fit {list(parameter.shape)}")
            parameter[:rows].copy_(tensor[:rows])
            if len(tensor) > rows:
                lines.append(f"{name}: {len(tensor) - rows} rows that the tokenizer has no tokens for are left out")
    return lines
