"""`backbone=huggingface`: a model of transformers as the trunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from heads_lightning.batch import Attention
from heads_lightning.configs.backbone import BackboneConfig, backbones
from heads_lightning.configs.base import DType
from heads_lightning.registry import ConfigError

if TYPE_CHECKING:
    import torch


class HuggingFaceAttention(StrEnum):
    """How a model of transformers was trained to see."""

    auto = "auto"
    """As its config.json says, where `source` is a folder; a name of the hub counts as causal."""
    causal = "causal"
    bidirectional = "bidirectional"


class AttentionKernel(StrEnum):
    """How transformers computes attention."""

    auto = "auto"
    """The fused one where the architecture has it."""
    sdpa = "sdpa"
    """PyTorch's fused attention."""
    eager = "eager"
    """Written out."""


_ENCODERS = frozenset(
    {
        "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
        "esm", "eurobert", "flaubert", "ibert", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nezha",
        "nomic_bert", "nystromformer", "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl",
        "xmod", "yoso",
    }
)  # fmt: skip
"""Architectures (model_type) that read from both sides."""


@backbones.register("huggingface")
@dataclass
class HuggingFaceConfig(BackboneConfig):
    """Any model of transformers as the trunk: its weights as they are, our heads and losses on top. No code from outside is ever run."""

    supports: ClassVar[frozenset[Attention]] = frozenset({Attention.causal, Attention.bidirectional, Attention.prefix})

    name: str = "huggingface"
    d_model: int = 0
    """Width of the hidden states; 0, or what the model has: it is read from it."""
    source: str = "???"
    """Folder, or name on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a name on the hub."""
    attention: HuggingFaceAttention = HuggingFaceAttention.auto
    """How the model was trained to see: decides which objectives fit."""
    attention_kernel: AttentionKernel = AttentionKernel.auto
    """How attention is computed."""
    dtype: DType = DType.float32
    """Type of the parameters."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    freeze: bool = False
    """Train the head alone."""
    lora_rank: int = 0
    """Rank of LoRA adapters (arXiv 2106.09685), which then are all that is trained of the trunk; 0: none. Needs peft."""
    lora_alpha: float = 16.0
    """Their scale is lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout before them."""
    train_embedding: bool = False
    """Train the token embedding beside adapters or a frozen trunk: what new tokens, such as sentinels, need."""
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the layers that get one; all-linear: every linear layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.d_model >= 0, "d_model", "0 (read from the model), or its width")
        self.require(self.lora_rank >= 0, "lora_rank", "0 or more")
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "0 <= lora_dropout < 1")
        if self.freeze and self.lora_rank:
            raise ConfigError("backbone.freeze=true and backbone.lora_rank above 0 contradict each other; use one of them")
        self.require(bool(self.lora_targets), "lora_targets", "one name or more, e.g. [all-linear]")

    def attention_supported(self) -> frozenset[Attention]:
        """Causal models also read a prefix whole, since a mask tells them what to see."""
        kind = self.attention
        if kind == HuggingFaceAttention.auto:
            kind = HuggingFaceAttention.bidirectional if self._is_encoder() else HuggingFaceAttention.causal
        return frozenset({Attention.bidirectional} if kind == HuggingFaceAttention.bidirectional else {Attention.causal, Attention.prefix})

    def _is_encoder(self) -> bool:
        try:
            described = json.loads((Path(self.source).expanduser() / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return described.get("model_type") in _ENCODERS and not described.get("is_decoder", False)

    def build(self, *, vocab_size: int, init_device: torch.device | str = "cpu") -> Any:
        from heads_lightning.backbones.huggingface import HuggingFace

        return HuggingFace(self, vocab_size=vocab_size, init_device=init_device)

    def load_pretrained(
        self, backbone: Any, head: Any = None, *, new_tokens: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> list[str]:
        """The head's weights: the trunk reads its own when it is initialised."""
        from heads_lightning.conversion.pretrained import load_head

        return load_head(self, backbone, head, new_tokens=new_tokens, generator=generator)

    def num_params(self, vocab_size: int) -> int:
        return sum(p.numel() for p in self.build(vocab_size=vocab_size, init_device="meta").parameters())

    def num_flops_per_token(self, sequence_length: int) -> int:
        model = self.build(vocab_size=1, init_device="meta")
        return 6 * model.num_matmul_params() + 12 * model.num_layers * model.d_model * sequence_length
