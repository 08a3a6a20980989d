"""Where a model with a value head is kept: a folder or a name of the hub, with or without an adapter; safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

VALUE_HEAD_FILE = "value_head.safetensors"
"""Beside an adapter, which has no file of weights of the model. (The name that LLaMA-Factory gave it.)"""
PREFIX = "v_head."


def open_model(parent: Any, source: str, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model of a name or folder: with its adapter where it holds one, with a new one where `peft_config` asks."""
    peft_config, is_trainable = kwargs.pop("peft_config", None), kwargs.pop("is_trainable", False)
    if find_file(source, "adapter_config.json", hub_arguments(kwargs)) is None:
        return with_adapter(parent.from_pretrained(source, *model_args, **kwargs), peft_config)
    peft = _peft()
    base = parent.from_pretrained(peft.PeftConfig.from_pretrained(source).base_model_name_or_path, *model_args, **kwargs)
    return peft.PeftModel.from_pretrained(base, source, is_trainable=is_trainable)


def with_adapter(model: Any, peft_config: Any) -> Any:
    if peft_config is None:
        return model
    peft = _peft()
    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, not a PeftConfig such as peft.LoraConfig")
    return peft.get_peft_model(model, peft_config)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("adapters need the package peft: pip install 'heads-lightning[peft]'") from None
    return peft


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: kwargs[k] for k in _HUB_ARGUMENTS if kwargs.get(k) is not None}


def find_file(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of a folder or of the hub, or None where there is none."""
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        path = Path(source) / str(hub.get("subfolder", "")) / name
        return path if path.is_file() else None
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **hub)
    return None if found is None else Path(found)


def value_head_weights(source: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under `v_head.`: of the file beside an adapter, else of the weights, of whose shards only those needed are read."""
    if (beside := find_file(source, VALUE_HEAD_FILE, hub)) is not None:
        return load_file(beside)
    if (index := find_file(source, "model.safetensors.index.json", hub)) is not None:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {file for key, file in shards.items() if key.startswith(PREFIX)}
    else:
        names = {"model.safetensors"}
    files = [path for name in sorted(names) if (path := find_file(source, name, hub)) is not None]
    if not files and index is None and (pickle := find_file(source, "pytorch_model.bin", hub)) is not None:
        raise ValueError(
            f"{pickle} is a pickle, which is not opened; turn it into safetensors with "
            f"heads_lightning.models.value_export.convert_pickled_value_head({str(pickle.parent)!r})"
        )
    state = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            state |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)}  # noqa: SIM118 (no mapping)
    return state
