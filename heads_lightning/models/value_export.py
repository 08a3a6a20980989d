"""Value heads in other layouts: reward models of transformers, and the pickles that TRL wrote.

What cannot be expressed is refused before anything is written; nothing is dropped in silence.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from heads_lightning.heads.value import ValueHead
from heads_lightning.models.value import PreTrainedModelWithValueHead
from heads_lightning.models.value_files import PREFIX, VALUE_HEAD_FILE


def to_sequence_classification(model: Any, folder: str | Path, *, head: ValueHead | None = None) -> None:
    """Write a reward model that AutoModelForSequenceClassification opens with one label: `score` is the value head.

    Its score is that of the last token that is no padding, so the head should have been trained there (objective.positions=last); texts
    are to be preceded by the end-of-document token, as in training.

    Args:
        model: a wrapper with a value head; or a model of transformers, such as the trunk of backbone=huggingface, and its `head`.
        folder: to write.
        head: of a model that is no wrapper.

    Raises:
        ValueError: the architecture has no such class, its score is no single linear layer, the head is more than that, or adapters are
            not merged.
    """
    if isinstance(model, PreTrainedModelWithValueHead):
        model, head = model.pretrained_model, model.v_head
    assert head is not None, "a model of transformers needs the argument head"
    trunk = getattr(model, "base_model", model)
    if any("lora_" in name for name, _ in trunk.named_parameters()):
        raise ValueError("adapters are no weights of the model itself; merge them first: merge_and_unload()")
    target = _reward_model(model)
    score = getattr(target, "score", None)
    plain = head.hidden is None and head.norm is None
    if not isinstance(score, nn.Linear) or score.weight.shape != head.summary.weight.shape or not plain:
        raise ValueError(
            f"{type(target).__name__} has no single linear layer `score` over the last hidden state, or the head is more than one"
        )
    if score.bias is None and head.summary.bias is not None and bool(head.summary.bias.any()):
        raise ValueError(
            f"the value head has a bias of {head.summary.bias.item():.4g}, which {type(target).__name__} cannot hold; train with "
            f"head.bias=false, or set it to 0 (rewards are compared, so that changes nothing)"
        )
    target.base_model.load_state_dict(trunk.state_dict(), strict=True)
    with torch.no_grad():
        score.weight.copy_(head.summary.weight)
    target.save_pretrained(folder)


def _reward_model(model: Any) -> Any:
    """An untrained reward model of the same architecture, in its type."""
    described = copy.deepcopy(model.config)
    described.num_labels = 1
    described.vocab_size = model.get_input_embeddings().num_embeddings
    try:
        return AutoModelForSequenceClassification.from_config(described, dtype=model.dtype)
    except ValueError:
        raise ValueError(f"transformers has no sequence classification for {type(model).__name__}") from None


def convert_pickled_value_head(folder: str | Path) -> Path:
    """Write the value head of a folder's `pytorch_model.bin` (what TRL put beside an adapter) as safetensors; the path of the new file.

    The pickle is read with weights_only=True, which runs no code of it. An adapter's own files are left as they are.
    """
    path = Path(folder) / "pytorch_model.bin"
    state = torch.load(path, map_location="cpu", weights_only=True)
    head = {key: tensor.contiguous() for key, tensor in state.items() if key.startswith(PREFIX)}
    if not head:
        raise ValueError(f"{path} holds no value head (no key begins with {PREFIX!r})")
    save_file(head, Path(folder) / VALUE_HEAD_FILE, metadata={"format": "pt"})
    return Path(folder) / VALUE_HEAD_FILE
