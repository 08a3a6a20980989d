"""`backbone=huggingface`: a model of transformers as the trunk, its weights as they are.

Choices. The module is assembled on meta like every backbone, and "initialising" it reads the weights, so nothing else of a run needs to
know. Who sees whom is handed to the model as a finished mask, with positions that count from the start of each document; the first time
that matters, two tiny batches prove that the architecture obeys (recurrent layers and built-in position rules do not), because a model
that ignores a mask trains happily and wrongly. Code from repositories is never run.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heads_lightning.backbones.base import Backbone, Cache
from heads_lightning.backbones.layers import attention_bias, compute_dtype, positions_in_segments
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.huggingface import AttentionKernel, HuggingFaceConfig
from heads_lightning.hub import check_model
from heads_lightning.new_tokens import fill_new_rows
from heads_lightning.registry import ConfigError

_PROBE = 6
"""Positions of the batches that prove that masks are obeyed."""
_OBEYED = {True: 1e-3, False: 3e-2}
"""Relative change of hidden states that is still rounding, in fp32 and below it; an ignored mask changes them by half."""


class HuggingFaceCache(Cache):
    """transformers' own cache, and the segments when there are any."""

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache()
        self.segments_BT: Tensor | None = None

    @property
    def length(self) -> int:
        return int(self.inner.get_seq_length())

    def extend_segments(self, batch: Batch) -> Tensor | None:
        """Segments of all positions, old and new; new positions without one are of segment 0."""
        tokens_BS = batch.tokens_BS
        if batch.segments_BS is not None or self.segments_BT is not None:
            old = tokens_BS.new_zeros(len(tokens_BS), self.length) if self.segments_BT is None else self.segments_BT
            new = torch.zeros_like(tokens_BS) if batch.segments_BS is None else batch.segments_BS
            self.segments_BT = torch.cat((old, new.to(old.dtype)), dim=1)
        return self.segments_BT


class HuggingFace(Backbone):
    """See HuggingFaceConfig for what can be chosen.

    Args:
        config: which model, and what is trained of it.
        vocab_size: ids that are read. Above the model's own: rows are added to its embedding, which begin near the mean of the others.
        init_device: where parameters are made; `meta` leaves them to to_empty and reset_parameters.

    Raises:
        ConfigError: no such model, an encoder-decoder, a width that is not its own, peft is missing.
    """

    supports: ClassVar[frozenset[Attention]] = HuggingFaceConfig.supports

    def __init__(self, config: HuggingFaceConfig, *, vocab_size: int, init_device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        self._described = _described(config)
        self._own_rows = int(self._described.get_text_config().vocab_size)
        self.model: Any = _assemble(config, self._described, max(vocab_size, self._own_rows))
        self.d_model = _width(self._described)
        if config.d_model not in (0, self.d_model):
            raise ConfigError(f"backbone.d_model={config.d_model}, but {config.source} has the width {self.d_model}; leave it out")
        self._proven: set[Attention] = set()
        if torch.device(init_device).type != "meta":
            self.to_empty(device=init_device)
            self.reset_parameters()

    @property
    def embedding(self) -> nn.Embedding:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model's own token embedding."""
        return self.model.get_input_embeddings()

    @property
    def described(self) -> Any:
        """transformers' configuration of the model."""
        return self._described

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return int(self._described.get_text_config().num_hidden_layers)

    def num_matmul_params(self) -> int:
        """Numbers of the matrices that multiply every position."""
        return sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")

    def forward(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, HuggingFaceCache)
        if batch.attention == Attention.bidirectional and cache is not None:
            raise ValueError("bidirectional attention cannot read on from a cache: what was read would have to see what follows")
        if batch.segments_BS is not None or batch.attention == Attention.prefix:
            self._prove(batch.attention)
        return self._run(batch, cache)

    def _run(self, batch: Batch, cache: HuggingFaceCache | None = None) -> Tensor:
        given: dict[str, Any] = {"input_ids": batch.tokens_BS, "return_dict": True}
        size, old = batch.tokens_BS.shape[1], 0 if cache is None else cache.length
        segments_BT = batch.segments_BS if cache is None else cache.extend_segments(batch)
        if cache is not None:
            given |= {"past_key_values": cache.inner, "use_cache": True}
        elif Attention.causal in self.config.attention_supported():
            given["use_cache"] = False
        if segments_BT is not None or batch.attention == Attention.prefix:
            index = torch.arange(old + size, device=batch.tokens_BS.device)
            dtype = compute_dtype(self.embedding.weight)
            given["attention_mask"] = self._mask(attention_bias(batch, segments_BT, index, size, dtype), index, batch)
            positions = index[None, old:] if segments_BT is None else positions_in_segments(segments_BT)[:, old:]
            given["position_ids"] = positions + self._first_position()
        return self.model(**given).last_hidden_state

    def _mask(self, bias_B1ST: Tensor, index_T: Tensor, batch: Batch) -> Any:
        """The mask in the form that the model's layers take: one, or one for each kind of layer."""
        described = self._described.get_text_config()
        window, kinds = getattr(described, "sliding_window", None), set(getattr(described, "layer_types", None) or ())
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise ConfigError(f"{self.config.source} has layers of {', '.join(sorted(unknown))}, which cannot keep packed documents apart")
        full = self._native(bias_B1ST)
        if window is None or (kinds and "sliding_attention" not in kinds):
            return full
        distance_ST = index_T[-bias_B1ST.shape[2] :, None] - index_T[None, :]
        near_ST = distance_ST.abs() <= window if batch.attention == Attention.bidirectional else distance_ST < window
        sliding = self._native(bias_B1ST.masked_fill(~near_ST, float("-inf")))
        return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding

    def _native(self, bias_B1ST: Tensor) -> Tensor:
        return bias_B1ST == 0 if self.model.config._attn_implementation == "sdpa" else bias_B1ST

    def _first_position(self) -> int:
        """RoBERTa and its kin count positions from the padding id on."""
        embeddings: Any = getattr(self.model, "embeddings", None)
        return int(embeddings.padding_idx) + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0

    def _prove(self, attention: Attention) -> None:
        """Once: packed documents are apart, and each is read as if it stood alone."""
        if attention in self._proven:
            return
        self._proven.add(attention)
        training = self.training
        self.eval()
        # a model that cannot take such a mask, or positions, fails in ways of its own
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            if self._keeps_apart(attention):
                self.train(training)
                return
        raise ConfigError(
            f"backbone.source={self.config.source} ({type(self.model).__name__}) does not keep packed documents apart; "
            f"use backbone=transformer, or a model with attention in every layer"
        )

    @torch.no_grad()
    def _keeps_apart(self, attention: Attention) -> bool:
        """Whether two documents in a row give the hidden states of two rows, in the parameters' precision."""
        device = self.embedding.weight.device
        tokens = torch.arange(3, 3 + 2 * _PROBE, device=device).view(1, -1) % self._own_rows
        segments = (torch.arange(2 * _PROBE, device=device) >= _PROBE).long().view(1, -1)
        plain = Attention.causal if attention == Attention.prefix else attention
        with torch.autocast(device.type, enabled=False):
            no_prefix = torch.zeros_like(tokens, dtype=torch.bool)
            packed = self._run(Batch(tokens, tokens, attention, 0, 0, segments_BS=segments, prefix_BS=no_prefix))
            apart = torch.cat([self._run(Batch(part, part, plain, 0, 0)) for part in tokens.split(_PROBE, 1)], 1)
        return bool((packed - apart).norm() <= _OBEYED[packed.dtype == torch.float32] * apart.norm())

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Read the model's weights; adapters and added rows of the embedding are drawn."""
        loaded = _load(self.config)
        theirs = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
        with torch.no_grad():
            for name, ours in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if ".lora_" in name:
                    _draw_adapter(name, ours, generator)
                else:
                    _fill(ours, theirs[name.replace(".base_layer.", ".").removeprefix("base_model.model.")], generator)

    def new_cache(self, batch_size: int, max_length: int) -> HuggingFaceCache:
        return HuggingFaceCache()


def _draw_adapter(name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
    """A as torch.nn.Linear, B zero: an adapter begins as nothing (arXiv 2106.09685, section 4.1)."""
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    else:
        parameter.zero_()


def _fill(ours: Tensor, theirs: Tensor, generator: torch.Generator | None) -> None:
    if ours.shape == theirs.shape:
        ours.copy_(theirs)
        return
    rows = len(theirs)  # an embedding with rows added
    ours[:rows].copy_(theirs)
    fill_new_rows(ours, range(rows, len(ours)), generator=generator)


def _described(config: HuggingFaceConfig) -> Any:
    """transformers' configuration of the model."""
    from transformers import AutoConfig

    if config.source == "???":
        raise ConfigError("backbone=huggingface needs a model: backbone.source=FOLDER_OR_NAME")
    check_model(config.source, key="backbone.source", revision=config.revision)
    try:
        described = AutoConfig.from_pretrained(config.source, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(f"backbone.source={config.source} cannot be opened ({reason}); give a folder or a name of the Hub") from None
    if described.is_encoder_decoder:
        raise ConfigError(f"backbone.source={config.source} is an encoder-decoder; backbone=huggingface takes encoders and decoders")
    return described


def _width(described: Any) -> int:
    text = described.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)  # OPT may project back to its embedding's width


def _assemble(config: HuggingFaceConfig, described: Any, rows: int) -> nn.Module:
    """The model on meta, with adapters, frozen as asked."""
    from transformers import AutoModel

    kernel = None if config.attention_kernel == AttentionKernel.auto else str(config.attention_kernel)
    with torch.device("meta"):
        try:
            model: Any = AutoModel.from_config(
                described, dtype=getattr(torch, config.dtype), attn_implementation=kernel, trust_remote_code=False
            )
        except ValueError as error:
            raise ConfigError(
                f"backbone.source={config.source}: {str(error).strip().split('. ')[0][:160]}; use backbone.attention_kernel=auto"
            ) from None
        embedding = model.get_input_embeddings()
        if rows != embedding.num_embeddings:  # in place: Gemma's multiplies by √width, others have ways of their own
            embedding.weight = nn.Parameter(torch.empty(rows, embedding.embedding_dim, dtype=embedding.weight.dtype))
            embedding.num_embeddings = rows
        _without_pooler(model)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = _with_adapters(model, config) if config.lora_rank else model.requires_grad_(not config.freeze)
    if config.train_embedding:
        model.get_input_embeddings().weight.requires_grad_(True)
    return model


def _without_pooler(model: Any) -> None:
    """BERT's pooler reads one position for a task that is not ours; without a gradient it would stop data-parallel training."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def _with_adapters(model: Any, config: HuggingFaceConfig) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("backbone.lora_rank needs the package peft: pip install 'heads-lightning[peft]'") from None
    targets = config.lora_targets
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
    )
    model.requires_grad_(False)
    try:
        return inject_adapter_in_model(lora, model)
    except ValueError as error:
        raise ConfigError(f"backbone.lora_targets={targets}: {str(error).strip().splitlines()[0][:160]}") from None


def _load(config: HuggingFaceConfig) -> nn.Module:
    """The model with its weights, on the CPU."""
    from transformers import AutoModel
    from transformers.utils import logging

    said = logging.get_verbosity()
    logging.set_verbosity_error()  # else it calls the output matrix unexpected, which our head takes
    try:
        model, loading = AutoModel.from_pretrained(
            config.source,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(said)
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("pooler.")):
        raise ConfigError(
            f"backbone.source={config.source} lacks {len(missing)} weights, which would stay random: {', '.join(missing[:3])}; "
            f"is the checkpoint whole?"
        )
    _without_pooler(model)
    return model
