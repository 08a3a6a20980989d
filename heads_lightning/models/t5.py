"""T5 with the surface of Megatron-core's T5Model, over the very modules of `backbone=t5` and `head=t5`; no second network.

Its parameters have the names of a run's checkpoint (`backbone.…`, `head.…`), so either loads the other's. What differs from Megatron:
- hidden states are [b, s, h] throughout;
- a mask is an AttentionMask, made by the name of its convention, and the decoder is causal whatever mask it is given beside that;
- packed sequences, left padding and key/value caches work; a label outside the vocabulary is refused;
- the loss is computed from the vocabulary's shards wherever the projection is sharded, whatever `parallel_output` says of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from heads_lightning.backbones.masks import AttentionMask, positions_after, t5_position_ids
from heads_lightning.backbones.t5 import T5, T5Cache, T5Part
from heads_lightning.batch import IGNORE
from heads_lightning.configs.t5 import T5Config, T5LMHeadConfig, T5Position
from heads_lightning.heads.t5 import T5Head
from heads_lightning.losses import LossOptions, Projection, Reduction
from heads_lightning.losses.base import is_dtensor, project
from heads_lightning.losses.targets import check_labels
from heads_lightning.losses.vocab_parallel import local_projection, logits_loss_sharded
from heads_lightning.registry import ConfigError

SHARED = (
    "d_model",
    "num_heads",
    "head_dim",
    "preset",
    "position_embedding_type",
    "norm",
    "bias",
    "feed_forward",
    "activation",
    "scale_attention",
)
"""Fields in which encoder and decoder cannot differ."""


class T5LMHead(nn.Module):
    """T5's output layer by itself, as Megatron builds it.

    Args:
        config: of the model; its preset says what share_embeddings_and_output_weights, bias and scale are when nothing else does.
        parallel_output: logits stay shards of the vocabulary, [.., V/ranks], where the weight is one; False gathers them.
        vocab_size: classes.
        pre_process: the stage holds the word embedding, whose weight `forward` is then given; otherwise a tied head keeps a copy.
        share_embeddings_and_output_weights: tied. None: the preset's.
        head: bias, scale, loss dtype and implementation as options. None: the preset's.
        init_device: where parameters are made.
    """

    def __init__(
        self,
        config: T5Config,
        parallel_output: bool,
        vocab_size: int,
        pre_process: bool = True,
        share_embeddings_and_output_weights: bool | None = None,
        *,
        head: T5LMHeadConfig | None = None,
        init_device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        head = head_config(config, head, share_embeddings_and_output_weights)
        self.parallel_output = parallel_output
        self.output = T5Head(head, d_model=config.d_model, vocab_size=vocab_size, init_device=init_device)
        self.word_embeddings = nn.Embedding(vocab_size, config.d_model, device=init_device) if head.is_tied and not pre_process else None
        if self.word_embeddings is not None:
            self.output.tie(self.word_embeddings)

    def forward(self, hidden_states: Tensor, word_embeddings_weight: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden states [..., h]; a shard of them with parallel_output and a sharded weight.

        Raises:
            ValueError: a tied head is not given its weight, or an untied one is given one.
        """
        if word_embeddings_weight is None:
            projection = self.output.projection()
        elif self.output.config.is_tied:
            projection = self.output.projection_of(word_embeddings_weight)
        else:
            raise ValueError("an untied head has a weight of its own; leave word_embeddings_weight out or tie it")
        return output_logits(self.output.prepare(hidden_states), projection, parallel_output=self.parallel_output)


class T5Model(nn.Module):
    """T5, or the part of it that a pipeline stage holds.

    Args:
        config: of the decoder, and of all that is shared.
        encoder_config: its num_layers and feed_forward_dim are the encoder's. None: `config` says both.
        vocab_size: rows of the one word embedding.
        max_sequence_length: learned positions. None: the config's.
        pre_process: this stage holds the word embedding.
        post_process: this stage ends in the head.
        parallel_output: see T5LMHead.
        share_embeddings_and_output_weights: see T5LMHead.
        position_embedding_type, rotary_percent, seq_len_interpolation_factor: see T5Config. None: the config's.
        add_encoder, add_decoder: this stage has blocks of the encoder, of the decoder.
        encoder_layers, decoder_layers: which blocks. None: all.
        head: see T5LMHead.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.
    """

    def __init__(
        self,
        config: T5Config,
        encoder_config: T5Config | None = None,
        *,
        vocab_size: int,
        max_sequence_length: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool | None = None,
        position_embedding_type: T5Position | str | None = None,
        rotary_percent: float | None = None,
        seq_len_interpolation_factor: float | None = None,
        add_encoder: bool = True,
        add_decoder: bool = True,
        encoder_layers: range | None = None,
        decoder_layers: range | None = None,
        head: T5LMHeadConfig | None = None,
        init_device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        given = {
            "max_positions": max_sequence_length,
            "position_embedding_type": None if position_embedding_type is None else T5Position(position_embedding_type),
            "rotary_percent": rotary_percent,
            "seq_len_interpolation_factor": seq_len_interpolation_factor,
        }
        self.config = _merged(replace(config, **{k: v for k, v in given.items() if v is not None}), encoder_config)
        head = head_config(self.config, head, share_embeddings_and_output_weights)
        self.config = self.config.fitted(tied=head.is_tied)
        nothing = range(0)
        part = T5Part(
            embeds=pre_process or (post_process and head.is_tied),
            encoder=encoder_layers if add_encoder else nothing,
            decoder=decoder_layers if add_decoder else nothing,
        )
        self.pre_process, self.parallel_output = pre_process, parallel_output
        self.backbone = T5(self.config, vocab_size=vocab_size, init_device=init_device, part=part)
        self.head = T5Head(head, d_model=config.d_model, vocab_size=vocab_size, init_device=init_device) if post_process else None
        if self.head is not None and head.is_tied:
            self.head.tie(self.backbone.embedding)
        self._input: list[Tensor] = []

    # -- stages -------------------------------------------------------------------------------------------------------------------

    def set_input_tensor(self, input_tensor: Tensor | Sequence[Tensor]) -> None:
        """What the stage before hands over, for the next forward passes.

        An encoder takes one: its own hidden states. A decoder without an encoder takes the encoder's states, or [decoder's hidden states,
        encoder's states] where an earlier stage has begun the decoder. An empty list takes back what was set.
        """
        given = [input_tensor] if isinstance(input_tensor, Tensor) else list(input_tensor)
        most = 1 if self.backbone.encoder is not None else 2
        if len(given) > most:
            raise ValueError(f"{len(given)} input tensors; this stage takes {'one' if most == 1 else 'one or two'}: see set_input_tensor")
        self._input = given

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """What torch.distributed.checkpoint saves and loads in place, at any layout: sharded weights are DTensors of the global shape,
        blocks have the numbers of the whole model, and a tied weight is there once, under the embedding's name."""
        return self.state_dict(prefix=prefix)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that embedding and head share; None when they do not."""
        return self.backbone.embedding.weight if self.head is not None and self.head.config.is_tied else None

    def new_cache(self, batch_size: int, max_length: int) -> T5Cache:
        """An empty cache for `forward`, of decoder positions up to max_length."""
        return self.backbone.new_cache(batch_size, max_length)

    # -- reading ------------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        encoder_input_ids: Tensor | None,
        decoder_input_ids: Tensor | None,
        encoder_attn_mask: AttentionMask | None = None,
        decoder_attn_mask: AttentionMask | None = None,
        encoder_decoder_attn_mask: AttentionMask | None = None,
        lm_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_encoder_hidden_only: bool = False,
        *,
        encoder_position_ids: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_segments: Tensor | None = None,
        decoder_segments: Tensor | None = None,
        loss_reduction: Reduction = "mean",
        cache: T5Cache | None = None,
    ) -> Tensor:
        """Logits [b, s, V] (or this rank's shard of them); with labels the loss; hidden states [b, s, h] where the stage ends before.

        Args:
            encoder_input_ids: int64 [b, t]; not needed with encoder_hidden_states or a cache that has read them.
            decoder_input_ids: int64 [b, s]: the new ones, with a cache.
            encoder_attn_mask: what encoder positions see of each other.
            decoder_attn_mask: what decoder positions see of each other, beside that none sees past itself.
            encoder_decoder_attn_mask: what decoder positions see of the encoder.
            lm_labels: int64 [b, s], aligned: what each decoder position predicts; -100 for nothing.
            encoder_hidden_states: [b, t, h] of an earlier call: embedding and encoder are skipped.
            output_encoder_hidden_only: return the encoder's states.
            encoder_position_ids, decoder_position_ids: int64 [b, t], [b, s]. None: counted inside segments; without them from the
                first position that the mask lets anyone see, so that left padding moves nothing.
            encoder_segments, decoder_segments: int [b, t], [b, s] of packed sequences, instead of masks: each sees its own segment.
            loss_reduction: `mean` over the targets, `sum`, or `none` for [b, s].
            cache: of `new_cache`; the decoder then reads on from it.

        Raises:
            TypeError: a mask is a bare tensor.
            ValueError: inputs that this stage needs are missing, or a label is outside the vocabulary.
        """
        masks = {
            "encoder_attn_mask": encoder_attn_mask,
            "decoder_attn_mask": decoder_attn_mask,
            "encoder_decoder_attn_mask": encoder_decoder_attn_mask,
        }
        for name, mask in masks.items():
            _check_mask(name, mask)
        memory = encoder_hidden_states
        if memory is None and self.backbone.encoder is not None and (cache is None or not cache.cross):
            memory = self._encode(encoder_input_ids, encoder_attn_mask, encoder_position_ids, encoder_segments)
        if output_encoder_hidden_only or self.backbone.decoder is None:
            return _needed(memory, "encoder_input_ids")
        cross_mask = _joined(encoder_decoder_attn_mask, decoder_segments, encoder_segments)
        hidden = self._decode(decoder_input_ids, memory, decoder_attn_mask, cross_mask, decoder_position_ids, decoder_segments, cache)
        if self.head is None:
            return hidden
        if lm_labels is None:
            return output_logits(self.head.prepare(hidden), self.head.projection(), parallel_output=self.parallel_output)
        return self.head(hidden, labels=lm_labels, loss_reduction=loss_reduction, return_logits=False).loss

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss per token [b, s] from logits that `forward` gave with parallel_output; 0 where the label is -100.

        Raises:
            ValueError: the vocabulary is sharded and the logits are gathered: each would count once per rank.
        """
        assert self.head is not None
        check_labels(labels, self.head.vocab_size, IGNORE)
        projection = local_projection(self.head.projection())
        if logits.shape[-1] != projection.own_classes:
            raise ValueError(
                f"{logits.shape[-1]} columns of logits, but this rank holds {projection.own_classes} of {projection.classes}: the loss "
                f"needs the shards; build the model with parallel_output=True (gathered logits would count once per rank)"
            )
        options = LossOptions(
            label_smoothing=self.head.config.label_smoothing, z_loss_multiplier=self.head.config.z_loss_multiplier, per_token=True
        )
        counted = (labels != IGNORE).reshape(-1)
        targets = torch.where(counted, labels.reshape(-1), 0)
        rows = logits.reshape(-1, logits.shape[-1])
        if projection.shard is None:
            from heads_lightning.losses.default import logits_loss_sum

            total = logits_loss_sum(rows, targets, options, None, counted).total
        else:
            total = logits_loss_sharded(rows, projection, targets, options, None, counted).total
        return (total * counted).view(labels.shape)

    def _encode(self, ids: Tensor | None, mask: AttentionMask | None, position_ids: Tensor | None, segments: Tensor | None) -> Tensor:
        mask = _joined(mask, segments, segments)
        if self._input:
            hidden = self._input[0]
            positions = _positions(hidden[..., 0], mask, position_ids, segments)
        else:
            ids = _needed(ids if self.pre_process else None, "encoder_input_ids with pre_process=True, or set_input_tensor")
            positions = _positions(ids, mask, position_ids, segments)
            hidden = self.backbone.embed(ids, positions)
        return self.backbone.encode(hidden, positions, mask)

    def _decode(
        self,
        ids: Tensor | None,
        memory: Tensor | None,
        mask: AttentionMask | None,
        cross_mask: AttentionMask | None,
        position_ids: Tensor | None,
        segments: Tensor | None,
        cache: T5Cache | None,
    ) -> Tensor:
        begun = self._input[0] if self.backbone.encoder is None and len(self._input) == 2 else None
        if memory is None and self.backbone.encoder is None and self._input:
            memory = self._input[-1]
        if memory is None and (cache is None or not cache.cross):
            raise ValueError("the decoder has nothing to look at: give encoder_input_ids, encoder_hidden_states or set_input_tensor")
        tokens = _needed(ids if begun is None else begun[..., 0], "decoder_input_ids")
        old, seen = 0, segments
        if cache is not None:
            old, seen = cache.length, cache.own.extend_segments(segments, tokens)
            if cross_mask is None:
                cross_mask = cache.encoder_mask
            else:
                cache.encoder_mask = AttentionMask(cross_mask.visible_BST[:, -1:])
            memory = None if cache.cross else memory
        if seen is not None:
            own = AttentionMask.from_segments(seen[:, old:], seen)
            mask = own if mask is None else mask & own
        everything = tokens.new_zeros(tokens.shape[0], old + tokens.shape[1]) if old else tokens
        positions = position_ids if position_ids is not None else _positions(everything, mask, None, seen)[:, old:]
        hidden = begun
        if hidden is None:
            if not self.pre_process:
                raise ValueError("the decoder begins on this stage, which needs the word embedding: build it with pre_process=True")
            hidden = self.backbone.embed(tokens, positions)
        return self.backbone.decode(hidden, positions, memory, mask=mask, cross_mask=cross_mask, cache=cache)


def head_config(config: T5Config, head: T5LMHeadConfig | None, tied: bool | None) -> T5LMHeadConfig:
    """The head of a model: of its preset when nothing is given."""
    head = T5LMHeadConfig(preset=config.preset) if head is None else head
    return head if tied is None else replace(head, tie_embeddings=tied)


def output_logits(hidden: Tensor, projection: Projection, *, parallel_output: bool) -> Tensor:
    """[..., V] of prepared hidden states; of a sharded projection the own columns, or all of them, gathered, without parallel_output."""
    logits: Any = project(hidden, projection)
    if not is_dtensor(logits):
        return logits
    return logits.to_local() if parallel_output else logits.full_tensor()


def _merged(config: T5Config, encoder: T5Config | None) -> T5Config:
    """One config of a decoder's and an encoder's."""
    if encoder is None:
        return config
    for field in SHARED:
        if getattr(config, field) != getattr(encoder, field):
            raise ConfigError(
                f"encoder_config.{field}={getattr(encoder, field)} and config.{field}={getattr(config, field)} differ; only num_layers and "
                f"feed_forward_dim may"
            )
    return replace(
        config,
        num_layers=encoder.num_layers,
        num_decoder_layers=config.decoder_layers,
        feed_forward_dim=encoder.ff_dim,
        decoder_feed_forward_dim=config.decoder_ff_dim,
    )


def _check_mask(name: str, mask: AttentionMask | None) -> None:
    if mask is not None and not isinstance(mask, AttentionMask):
        raise TypeError(
            f"{name} is a bare {type(mask).__name__}, which does not say what its values mean; wrap it: AttentionMask.from_blocked "
            f"(True: hidden, Megatron), from_attend (True: seen, torch), from_keep (1: real, Hugging Face) or from_additive (0 and -inf)"
        )


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this stage of the model needs {name}")
    return value


def _joined(mask: AttentionMask | None, queries: Tensor | None, keys: Tensor | None) -> AttentionMask | None:
    """A mask and the rule that each sees its own segment, whichever of them are given."""
    if queries is None or keys is None:
        return mask
    own = AttentionMask.from_segments(queries, keys)
    return own if mask is None else mask & own


def _positions(tokens: Tensor, mask: AttentionMask | None, given: Tensor | None, segments: Tensor | None) -> Tensor:
    """int64 [b, s]."""
    if given is not None:
        return given
    if segments is not None:
        return t5_position_ids(segments, segments=segments)
    if mask is not None and mask.visible_BST.shape[-1] == tokens.shape[1]:
        return positions_after(mask.seen_by_none()).expand(tokens.shape[0], -1)
    return t5_position_ids(tokens)
