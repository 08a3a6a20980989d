"""What the tests of conversion share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion_models import theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from heads_lightning.configs.requests import ConvertRequest, ConvertTarget
from heads_lightning.conversion.convert import Conversion, convert
from heads_lightning.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer(num_sentinels=0)
NATIVE, HUGGINGFACE = ConvertTarget.native, ConvertTarget.huggingface


def run(source: Path, out: Path, to: ConvertTarget = NATIVE, **fields: Any) -> tuple[Conversion, list[str]]:
    """The record of a conversion and the lines that it said."""
    said: list[str] = []
    return convert(ConvertRequest(from_=str(source), to=to, out=str(out), **fields), say=said.append), said


def saved(case: str, folder: Path, **changes: Any) -> Any:
    """A model of transformers as save_pretrained leaves it, with a tokenizer."""
    model = theirs(case)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder, max_shard_size="20KB")
    TOKENIZER.save(folder)
    return model


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def changed(folder: Path, change: Any) -> None:
    """Rewrite a folder's weights as one file."""
    state = state_of(folder)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
