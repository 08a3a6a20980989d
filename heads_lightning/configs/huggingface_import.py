"""A checkpoint of Hugging Face as a native backbone (`backbone=huggingface_import`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch


@backbones.register("huggingface_import")
@dataclass
class HuggingFaceImportConfig(BackboneConfig):
    """The native counterpart of a checkpoint of Hugging Face, with its weights: `backbone=huggingface_import backbone.source=FOLDER`.

    The source's config.json says what is built, so nothing else can be set. Where the head is the source's kind of head, it takes its
    weights too (head.bias=false for most decoders).
    """

    supports: ClassVar[frozenset[Attention]] = frozenset(Attention)
    builds_another: ClassVar[bool] = True
    """It has no module of its own: what it builds is another option's."""

    name: str = "huggingface_import"
    d_model: int = 0
    """Width of the hidden states; the source's. 0: read from there."""
    source: str = "???"
    """Folder with config.json and weights (safetensors)."""
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The source's config.json; filled in while composing, so that a saved run does not need the folder again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._is_given:
            return  # the option as it is listed; `native` says what is missing
        if not self.architecture:
            from heads_lightning.conversion.pretrained import read_config

            self.architecture = read_config(Path(self.source).expanduser())
        width = self.native().d_model
        if self.d_model not in (0, width):
            raise ConfigError(f"backbone.d_model={self.d_model} cannot be set: {self.source} has d_model={width}; leave it out")
        self.d_model = width

    @property
    def _is_given(self) -> bool:
        return self.source != "???" or bool(self.architecture)

    def native(self) -> BackboneConfig:
        """The backbone that the source describes."""
        if not self._is_given:
            raise ConfigError("backbone=huggingface_import needs a checkpoint: backbone.source=FOLDER with config.json and weights")
        from heads_lightning.conversion.pretrained import native_backbone

        return native_backbone(self)

    def described(self) -> BackboneConfig:
        return self.native() if self._is_given else self

    def attention_supported(self) -> frozenset[Attention]:
        return self.native().attention_supported() if self._is_given else self.supports

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        """The native module. On meta it is empty, and load_pretrained fills it after reset_parameters; elsewhere it has its weights."""
        module = self.native().build(vocab_size=vocab_size, init_device=init_device)
        if str(init_device) != "meta":
            self.load_pretrained(module)
        return module

    def load_pretrained(
        self, backbone: Any, head: Any = None, *, new_tokens: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> list[str]:
        from heads_lightning.conversion.pretrained import load_pretrained

        return load_pretrained(self, backbone, head, new_tokens=new_tokens, generator=generator)

    def num_params(self, vocab_size: int) -> int:
        return self.native().num_params(vocab_size)

    def num_flops_per_token(self, sequence_length: int) -> int:
        return self.native().num_flops_per_token(sequence_length)
