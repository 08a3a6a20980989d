"""`BiGSConfig`: BiGS as a Hugging Face configuration, with the published field names. Needs transformers (extra `huggingface`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from heads_lightning.configs.bigs import BiGSBackboneConfig
from heads_lightning.configs.layers import CausalForm, Convolution, Direction, GateActivation, Position


class BiGSConfig(PreTrainedConfig):
    """Configuration of BiGSModel, BiGSForMaskedLM and BiGSForCausalLM. Fields of the published config.json, then ours.

    `pooler_type`, `pre_norm`, `decode` and `scaling` of published files are kept and have no effect, as in the published code.
    """

    model_type = "BiGS"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 24
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    """Non-linearity of the prediction head."""
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    """absolute, or none: no limit to the length."""
    num_ssm: int = 64
    """Complex modes of each state-space model."""
    use_cache: bool = True
    tie_word_embeddings: bool = True

    direction: str = "bidirectional"
    """bidirectional (BiGSForMaskedLM) or causal (BiGSForCausalLM)."""
    causal_form: str = "dual"
    """dual, gate or single: see configs.layers.CausalForm."""
    gate_activation: str = "gelu_tanh"
    """gelu_tanh, as the published checkpoints were trained; gelu, as the published PyTorch port computes."""
    convolution: str = "auto"
    """auto, fft or chunked: a matter of speed alone."""
    final_norm: bool = False
    """A norm after the last block; the published model has none."""
    mask_padding: bool = True
    """attention_mask hides padding. False: it has no effect, as in the published model, which was trained with visible padding."""

    before_first: ClassVar[list[Callable[[], None]]] = []
    """Called before there is a first config: models that an Auto class finds by a config need not be known earlier."""

    def __post_init__(self, **kwargs: Any) -> None:
        while self.before_first:
            self.before_first.pop()()
        super().__post_init__(**kwargs)
        self.backbone_config()  # a value that does not exist is refused here, in one line

    def backbone_config(self) -> BiGSBackboneConfig:
        """The same network as the toolkit's typed config."""
        return BiGSBackboneConfig(
            d_model=self.hidden_size,
            num_layers=self.num_hidden_layers,
            inner_dim=self.intermediate_size,
            state_size=self.num_ssm,
            direction=Direction(self.direction),
            causal_form=CausalForm(self.causal_form),
            gate_activation=GateActivation(self.gate_activation),
            convolution=Convolution(self.convolution),
            position=Position.learned if self.position_embedding_type == "absolute" else Position(self.position_embedding_type),
            max_positions=self.max_position_embeddings,
            num_token_types=self.type_vocab_size,
            norm_eps=self.layer_norm_eps,
            final_norm=self.final_norm,
            dropout=self.hidden_dropout_prob,
            init_std=self.initializer_range,
        )

    @classmethod
    def from_backbone(cls, config: BiGSBackboneConfig, *, vocab_size: int, **others: Any) -> BiGSConfig:
        """The Hugging Face form of a typed config; `others` are fields that it does not have."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.inner,
            num_ssm=config.state_size,
            direction=config.direction.value,
            causal_form=config.causal_form.value,
            gate_activation=config.gate_activation.value,
            convolution=config.convolution.value,
            position_embedding_type="absolute" if config.position == Position.learned else "none",
            max_position_embeddings=config.max_positions,
            type_vocab_size=config.num_token_types,
            layer_norm_eps=config.norm_eps,
            final_norm=config.final_norm,
            hidden_dropout_prob=config.dropout,
            initializer_range=config.init_std,
            **others,
        )
