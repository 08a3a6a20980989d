"""Tiny random models of transformers, shared by the tests of value heads."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

V = 64
COMMON = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}

CAUSAL: dict[str, Any] = {
    "gpt2": lambda: hf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, **COMMON),
    "llama": lambda: hf.LlamaConfig(**LLAMA, **COMMON),
    "gpt_neox": lambda: hf.GPTNeoXConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **COMMON),
    "bloom": lambda: hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **COMMON),
    "gemma": lambda: hf.GemmaConfig(**LLAMA, head_dim=8, **COMMON),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA, **COMMON),
    "opt": lambda: hf.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=8, max_position_embeddings=32, **COMMON
    ),
}
SEQ2SEQ: dict[str, Any] = {
    "t5": lambda: hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **COMMON),
    "bart": lambda: hf.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, decoder_start_token_id=2, **COMMON,
    ),
    "bert2bert": lambda: hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        bert_config(), bert_config(), decoder_start_token_id=1, pad_token_id=0
    ),
}  # fmt: skip


def bert_config(**changes: Any) -> hf.BertConfig:
    return hf.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, **COMMON | changes
    )


def _build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bert2bert":
        return hf.EncoderDecoderModel(SEQ2SEQ[kind]())
    parent = hf.AutoModelForCausalLM if kind in CAUSAL else hf.AutoModelForSeq2SeqLM
    return parent.from_config((CAUSAL | SEQ2SEQ)[kind]())


def tiny_model(kind: str) -> Any:
    """The same random weights every time, in evaluation mode; dropouts of the architecture are left as they are."""
    return _build(kind).eval()


def inputs(kind: str, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} if kind in CAUSAL else {"input_ids": ids.flip(0), "decoder_input_ids": ids}
