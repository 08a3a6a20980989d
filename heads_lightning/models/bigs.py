"""BiGS with the interface of Hugging Face's models: `BiGSModel`, `BiGSForMaskedLM`, `BiGSForCausalLM`. Needs transformers.

The network is `backbones.bigs.BiGS`, held as it is; nothing here computes hidden states. Checkpoints are read and written under the
published names (`PUBLISHED_NAMES`), so published folders load with from_pretrained, and saved ones are laid out like them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput

from heads_lightning.backbones.bigs import BiGS
from heads_lightning.backbones.ssm import S4D
from heads_lightning.batch import IGNORE, PADDING, Attention, Batch
from heads_lightning.models.bigs_config import BiGSConfig
from heads_lightning.models.hf_generation import GeneratesFromState, GenerationState, check_mask

PUBLISHED_NAMES: tuple[tuple[str, str], ...] = (
    (".LayerNorm.", ".norm."),
    ("embeddings.word_embeddings.", "backbone.embedding."),
    ("embeddings.position_embeddings.", "backbone.positions."),
    ("embeddings.token_type_embeddings.", "backbone.token_types."),
    ("embeddings.norm.", "backbone.embedding_norm."),
    ("cls.predictions.transform.dense.", "cls.dense."),
    ("cls.predictions.transform.norm.", "cls.norm."),
    ("cls.predictions.decoder.weight", "cls.decoder.weight"),
    ("cls.predictions.bias", "cls.decoder.bias"),
    ("encoder.layer.", "backbone.blocks."),
    (".fs4.kernel.", ".forward_system."),
    (".fs4.D", ".forward_system.D"),
    (".bs4.kernel.", ".backward_system."),
    (".bs4.D", ".backward_system.D"),
    (".du_forward.", ".forward_in."),
    (".duc_forward.", ".forward_out."),
    (".du_backward.", ".backward_in."),
    (".duc_backward.", ".backward_out."),
    (".dv.", ".value."),
    (".dol.", ".expand."),
    (".do.", ".output."),
)
"""Parts of names in published PyTorch checkpoints and here, replaced in this order; back, in the opposite order."""
UNUSED = (r"(^|\.)pooler\.", r"position_ids$", r"^cls\.predictions\.decoder\.bias$")
"""Published tensors that are not needed: a pooler that was never trained, a buffer, and a second name of the bias."""


class BiGSPreTrainedModel(PreTrainedModel):
    """What the three classes share."""

    config_class = BiGSConfig
    base_model_prefix = "bigs"
    _no_split_modules: ClassVar[list[str]] = ["Block"]  # pyright: ignore[reportIncompatibleVariableOverride]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"forward_system", "backward_system"}  # pyright: ignore[reportIncompatibleVariableOverride]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = list(UNUSED)  # pyright: ignore[reportIncompatibleVariableOverride]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, S4D) and not all(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
            module.reset_parameters()


class BiGSModel(BiGSPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: BiGSConfig) -> None:
        super().__init__(config)
        here = torch.empty(0).device  # from_pretrained builds on meta
        self.backbone = BiGS(config.backbone_config(), vocab_size=config.vocab_size, init_device=here)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.backbone.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationState | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states [B, S, D] of the last block (with config.final_norm: normed).

        Args:
            input_ids: int64 [B, S]; with past_key_values, the new positions.
            attention_mask: [B, S], or [B, positions so far]: 0 hides a position. No effect with config.mask_padding=False.
            token_type_ids: int64 [B, S]. None: 0.
            position_ids: int64 [B, S] or [S]. None: counted from the first position that is not hidden.
            past_key_values: states of the positions read so far; brought forward in place.
            use_cache: make such states (direction="causal").
            output_hidden_states: return the input of every block and the output of the last.
            return_dict: False for a tuple.
        """
        if use_cache and past_key_values is None:
            past_key_values = GenerationState(self.backbone.new_cache(input_ids.shape[0], 0))
        if past_key_values is not None and self.config.mask_padding:
            check_mask(attention_mask, past_key_values.get_seq_length())
        cache = None if past_key_values is None else past_key_values.cache
        attention = Attention(self.backbone.config.direction.value)
        batch = Batch(input_ids, input_ids, attention, 0, 0, segments_BS=self._segments(input_ids, attention_mask))
        course = self.backbone.course(batch, cache)
        if position_ids is not None:
            course = course._replace(positions=position_ids)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        h_BSD = self.backbone.embed(input_ids, course, token_type_ids)
        h_BSD = self.backbone.run(h_BSD, course, cache, seen.append if wanted else None)
        output = BaseModelOutputWithPast(
            last_hidden_state=h_BSD,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,  # pyright: ignore[reportArgumentType]
            hidden_states=(*seen, h_BSD) if wanted else None,  # pyright: ignore[reportArgumentType]
        )
        return output.to_tuple() if return_dict is False else output

    def _segments(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Padding as a segment of its own; None when nothing is hidden, which is faster."""
        if attention_mask is None or not self.config.mask_padding:
            return None
        shown_BS = attention_mask[:, -input_ids.shape[1] :].bool()
        if not torch.compiler.is_compiling() and bool(shown_BS.all()):
            return None
        return torch.where(shown_BS, 0, PADDING)


class PredictionHead(nn.Module):
    """BERT's head: dense layer, activation, norm, then the embedding matrix and a bias."""

    def __init__(self, config: BiGSConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Logits [B, S, V]."""
        return self.decoder(self.norm(self.activation(self.dense(hidden_BSD))))


class BiGSWithHead(BiGSPreTrainedModel):
    """A BiGSModel and the prediction head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        "cls.decoder.weight": "bigs.backbone.embedding.weight"
    }
    direction: ClassVar[str]

    def __init__(self, config: BiGSConfig) -> None:
        super().__init__(config)
        if config.direction != self.direction:
            why = "every position sees the token that it is to predict" if self.direction == "causal" else "nothing after a mask is seen"
            raise ValueError(
                f"{type(self).__name__} needs BiGSConfig(direction={self.direction!r}); with direction={config.direction!r} {why}"
            )
        self.bigs = BiGSModel(config)
        self.cls = PredictionHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The projection onto the vocabulary."""
        return self.cls.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection."""
        self.cls.decoder = new_embeddings


class BiGSForMaskedLM(BiGSWithHead):
    """Masked language modelling."""

    direction = "bidirectional"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [B, S, V], and the mean loss over `labels` (int64 [B, S], -100: no target) where they are given.

        See BiGSModel.forward for the other arguments. num_items_in_batch divides the summed loss instead of the number of targets.
        """
        hidden = self.bigs(input_ids, attention_mask, token_type_ids, position_ids, **others)
        logits = self.cls(hidden.last_hidden_state)
        loss = None if labels is None else mean_loss(logits, labels, num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=hidden.hidden_states)  # pyright: ignore[reportArgumentType]
        return output.to_tuple() if return_dict is False else output


class BiGSForCausalLM(BiGSWithHead, GeneratesFromState, GenerationMixin):
    """Left-to-right language modelling; generate() carries a state of constant size."""

    direction = "causal"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, S or logits_to_keep, V]; with `labels` (the input ids, -100: no target) the loss of each id given those before it.

        See BiGSModel.forward for the other arguments. As everywhere in transformers, labels are shifted here.
        """
        cached = (self.config.use_cache and not self.training and labels is None) if use_cache is None else use_cache
        hidden = self.bigs(input_ids, attention_mask, token_type_ids, position_ids, past_key_values, use_cache=cached, **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.cls(hidden.last_hidden_state[:, kept])
        loss = None if labels is None else mean_loss(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORE), num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            past_key_values=hidden.past_key_values,
            hidden_states=hidden.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output


def mean_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Cross-entropy in fp32, summed over the targets and divided by `num_items`, or by their number; 0 when there is none."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / ((labels != IGNORE).sum().clamp(min=1) if num_items is None else num_items)


def ours_from_published(name: str) -> str:
    """The name here of a tensor of a published PyTorch checkpoint."""
    for theirs, ours in PUBLISHED_NAMES:
        name = name.replace(theirs, ours, 1)
    return name


def _patterns(text: str) -> str:
    return text.replace(".", r"\.")


register_checkpoint_conversion_mapping(
    BiGSConfig.model_type, [WeightRenaming([_patterns(theirs)], [ours]) for theirs, ours in PUBLISHED_NAMES], overwrite=True
)
