"""`backbone=huggingface_import`: reading a source's config.json while composing, and its weights when the model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heads_lightning.configs.backbone import BackboneConfig
from heads_lightning.configs.head import HeadConfig
from heads_lightning.configs.huggingface_import import HuggingFaceImportConfig
from heads_lightning.conversion.converter import StateConverter
from heads_lightning.conversion.families import family_of_config
from heads_lightning.conversion.families.base import NativeModel
from heads_lightning.conversion.mapping import ConversionError, listed
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from heads_lightning.conversion.sources import TensorSource


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


def load_pretrained(config: HuggingFaceImportConfig, backbone: nn.Module, head: nn.Module | None = None) -> list[str]:
    """Copy a source's weights into the native model built from its config; returns lines that say what was done.

    The head takes its weights where it is the source's kind of head; another head stays as it was initialised, and a line says so.
    Rows of the vocabulary that the source does not have keep their initialisation, rows that this model does not have are left out.

    Raises:
        ConversionError: a weight of the backbone would be left at its random initialisation, or has another shape.
    """
    from heads_lightning.conversion.sources import open_weights

    folder = Path(config.source).expanduser()
    described = read_config(folder)
    source = open_weights(folder)
    family = family_of_config(described, source.specs)
    model = family.native(described)
    state = _converted(source, family, model)
    lines = [f"backbone: {len(state)} weights of {folder.name} ({family.name})"]
    modules = {"backbone": backbone} | ({"head": head} if head is not None and _same_head(head, model.head) else {})
    if head is not None and "head" not in modules:
        lines.append(f"head: freshly initialised, not {family.architecture}'s")
    for prefix, module in modules.items():
        own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}
        lines += [f"{prefix}.{line}" for line in _copy_into(module, own)]
    return lines


def _converted(source: TensorSource, family: Any, model: NativeModel) -> dict[str, Tensor]:
    names = {ours: theirs for ours, theirs in family.canonical(source.specs).items() if family.reason_left_out(ours) is None}
    names = {ours: theirs for ours, theirs in names.items() if ours not in family.copies(model)}
    templates = family.templates(model)
    if not any(name.startswith(family.head_prefixes) for name in names):  # a trunk saved alone
        templates = [t for t in templates if not str(t.source_template_keys).startswith(family.head_prefixes)]
    state = {ours: source.read(theirs) for ours, theirs in names.items()}
    return StateConverter(templates).convert(state, family.bounds(model))


def _same_head(head: nn.Module, wanted: HeadConfig) -> bool:
    """Whether a built head has exactly the parameters of the source's."""
    config = getattr(head, "config", None)
    fields = ("name", "has_bias", "layer_norm", "activation", "dense_bias", "logit_softcap", "is_tied", "scales", "hidden_dim", "bias")
    fields = fields if wanted.predicts == "value" else fields[:-1]
    return config is not None and all(getattr(config, field, None) == getattr(wanted, field, None) for field in fields)


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
            if len(parameter) > rows:
                lines.append(f"{name}: {len(parameter) - rows} rows of tokens that the source does not have are freshly initialised")
            elif len(tensor) > rows:
                lines.append(f"{name}: {len(tensor) - rows} rows that the tokenizer has no tokens for are left out")
    return lines
