"""Tiny random models of `transformers`, one of each kind that is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import heads_lightning  # noqa: F401 (the Auto classes know BiGS)
from heads_lightning.configs.head import DefaultLMHeadConfig
from heads_lightning.configs.transformer import TransformerConfig
from heads_lightning.conversion import StateConverter
from heads_lightning.conversion.families import FAMILIES, Family, NativeModel
from heads_lightning.conversion.native import NativeLM

VOCAB = 97
LLAMA = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
T5 = {
    **{"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0},
}
BIGS = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_ssm": 8},
    **{"max_position_embeddings": 112, "type_vocab_size": 2},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-biases": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", LLAMA | {"head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    "llama-base-of-rotary": ("llama", LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "num_key_value_heads": 1}),
    "llama-llama3-rope": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-linear-rope": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn-rope": ("llama", LLAMA | {"rope_parameters": YARN}),
    "llama-yarn-rope-attention-factor": (
        "llama",
        LLAMA | {"head_dim": 16, "rope_parameters": YARN | {"factor": 2.5, "attention_factor": 0.8, "beta_slow": 2, "rope_theta": 300.0}},
    ),
    "llama-yarn-rope-mscale": (
        "llama",
        LLAMA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False, "beta_fast": 16}},
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": None}),
    "mistral-window": ("mistral", LLAMA | {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-windows": (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "qwen3-biases": (
        "qwen3",
        LLAMA | {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "olmo2": ("olmo2", LLAMA),
    "olmo2-odd": (
        "olmo2",
        LLAMA | {"rms_norm_eps": 0.1, "hidden_act": "relu", "rope_parameters": {"rope_type": "default", "rope_theta": 55.0}},
    ),
    "qwen3-odd": (
        "qwen3",
        LLAMA | {"head_dim": 20, "rms_norm_eps": 0.1, "tie_word_embeddings": True, "hidden_act": "gelu_new", "rope_parameters": LLAMA3},
    ),
    "olmo2-biases": ("olmo2", LLAMA | {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu", "scale_attn_weights": False},
    ),
    "bert": ("bert", BERT),
    "bert-odd": ("bert", BERT | {"layer_norm_eps": 0.1, "hidden_act": "relu", "max_position_embeddings": 100}),
    "bert-types": ("bert", BERT | {"type_vocab_size": 3, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    "modernbert": ("modernbert", BERT | {"local_attention": 8, "num_hidden_layers": 5}),
    "modernbert-biases": (
        "modernbert",
        BERT
        | {
            **{"local_attention": 6, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
            **{"decoder_bias": False, "tie_word_embeddings": False, "global_attn_every_n_layers": 2},
        },
    ),
    "modernbert-rotary": (
        "modernbert",
        BERT
        | {
            **{"local_attention": 9, "norm_eps": 0.1, "hidden_activation": "silu", "classifier_activation": "gelu_new"},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "t5": ("t5", T5),
    "t5-odd": (
        "t5",
        T5
        | {
            "relative_attention_num_buckets": 12,
            "relative_attention_max_distance": 17,
            "layer_norm_epsilon": 0.1,
            "d_kv": 10,
            "feed_forward_proj": "gated-silu",
            "num_decoder_layers": 4,
        },
    ),
    "bigs": ("BiGS", BIGS),
    "bigs-odd": (
        "BiGS",
        BIGS
        | {
            **{"gate_activation": "gelu", "hidden_act": "relu", "position_embedding_type": "none", "type_vocab_size": 0},
            **{"layer_norm_eps": 0.1, "final_norm": True},
        },
    ),
    "bigs-dual": ("BiGS", BIGS | {"direction": "causal"}),
    "bigs-gate": ("BiGS", BIGS | {"direction": "causal", "causal_form": "gate", "final_norm": True}),
    "bigs-single": ("BiGS", BIGS | {"direction": "causal", "causal_form": "single"}),
    "t5-v1.1": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}


def family_of_case(case: str) -> Family:
    """The family that a case is of."""
    kind, fields = CASES[case]
    return FAMILIES[kind].of_model(FAMILIES[kind].native(transformers.AutoConfig.for_model(kind, **fields).to_dict()))


def theirs(case: str) -> Any:
    """A random model of transformers, all of whose weights make a difference."""
    kind, fields = CASES[case]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | (
        {"cls_token_id": 1, "sep_token_id": 2} if kind == "modernbert" else {}
    )
    config = transformers.AutoConfig.for_model(kind, **fields, **tokens)
    torch.manual_seed(0)
    model = getattr(transformers, family_of_case(case).auto_class).from_config(config)
    if kind == "t5" and fields.get("tie_word_embeddings") is False:  # transformers ties, unless a checkpoint brings a head of its own
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def llama_folder(folder: Path, **fields: Any) -> Path:
    """A checkpoint of Hugging Face's Llama, written without transformers: config.json and weights."""
    native = NativeModel(TransformerConfig(**fields), DefaultLMHeadConfig(bias=False), VOCAB)
    family = FAMILIES["llama"]
    state = StateConverter(family.templates(native)).inverse().convert(NativeLM(native).state_dict(), family.bounds(native))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | family.describe(native)))
    return folder
