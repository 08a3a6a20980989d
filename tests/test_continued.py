"""Training on from a model of others: the first step knows what the model knew, new tokens begin quietly, nothing is lost unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import decoders, models, pre_tokenizers
from value_data import LLAMA

from heads_lightning.batch import Attention, Batch
from heads_lightning.composition import compose
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.experiment import Experiment, build
from heads_lightning.registry import ConfigError
from heads_lightning.run import train

hf.utils.logging.set_verbosity_error()
TEXT = 257
"""Bytes and <|endoftext|>: what the models below have met."""
SIZE: dict[str, Any] = {"vocab_size": TEXT, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 0, "max_position_embeddings": 64}
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**LLAMA, **SIZE),
    "llama_tied": lambda: hf.LlamaConfig(**LLAMA, **SIZE, tie_word_embeddings=True),
    "llama_padded": lambda: hf.LlamaConfig(**LLAMA, **SIZE | {"vocab_size": 384}),
    "gpt2": lambda: hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **{k: v for k, v in SIZE.items() if "max" not in k}),
    "stablelm": lambda: hf.StableLmConfig(**LLAMA, **SIZE),
    "gemma": lambda: hf.GemmaConfig(**LLAMA, head_dim=8, **SIZE),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, head_dim=8, **SIZE),
    "bert": lambda: hf.BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **SIZE),
}
BERT_HEAD = ["head.tie_embeddings=true", "head/layer_norm=layer_norm", "head.layer_norm.eps=1e-12", "head.layer_norm.bias=true"]
PLAIN = ["head.bias=false"]


def checkpoint(kind: str, folder: Path) -> Any:
    """A random model with large weights, and a tokenizer of bytes without a single sentinel."""
    torch.manual_seed(0)
    parent = hf.AutoModelForMaskedLM if kind == "bert" else hf.AutoModelForCausalLM
    model = parent.from_config(MODELS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim == 2 else parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(folder / "tokenizer.json"))
    return model


@pytest.fixture
def composed(tiny: list[str]) -> Any:
    """The config of training on from a folder."""
    kept = [o for o in tiny if not o.startswith(("backbone.", "tokenizer.", "data.sequence_length"))]

    def compose_(folder: Path, backbone: str, *overrides: str) -> ExperimentConfig:
        source = [f"backbone={backbone}", f"backbone.source={folder}", "tokenizer=huggingface", f"tokenizer.path={folder}"]
        return compose([*kept, *source, "tokenizer.num_sentinels=4", "data.sequence_length=32", *overrides])

    return compose_


def built(config: ExperimentConfig) -> tuple[Experiment, list[str]]:
    said: list[str] = []
    return build(config, say=said.append), said


@pytest.mark.parametrize(
    ("kind", "backbone", "overrides"),
    [
        ("llama", "huggingface", PLAIN),
        ("llama", "huggingface_import", PLAIN),
        ("llama_tied", "huggingface", [*PLAIN, "head.tie_embeddings=true"]),
        ("llama_tied", "huggingface", PLAIN),
        ("llama_tied", "huggingface_import", PLAIN),
        ("llama_padded", "huggingface", PLAIN),
        ("llama_padded", "huggingface_import", PLAIN),
        ("gpt2", "huggingface", [*PLAIN, "head.tie_embeddings=true"]),
        ("stablelm", "huggingface", PLAIN),
        ("gemma", "huggingface", [*PLAIN, "head.tie_embeddings=true"]),
        ("bert", "huggingface", ["objective=mlm", "head=mlm", *BERT_HEAD]),
        ("bert", "huggingface", ["objective=mlm", "head=mlm", *BERT_HEAD[1:]]),
    ],
)
def test_the_first_step_predicts_what_the_model_predicted(
    kind: str, backbone: str, overrides: list[str], composed: Any, tmp_path: Path
) -> None:
    theirs = checkpoint(kind, tmp_path / "hf")
    parts, said = built(composed(tmp_path / "hf", backbone, *overrides))
    assert "fresh" not in str(said), said
    tokens = torch.randint(0, TEXT, (2, 20))
    attention = Attention.bidirectional if kind == "bert" else Attention.causal
    module = parts.module.eval()
    with torch.no_grad():
        logits = module.head(module.backbone(Batch(tokens, tokens, attention, 0, 0)))
        torch.testing.assert_close(logits[..., :TEXT], theirs(tokens).logits[..., :TEXT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["huggingface", "huggingface_import"])
@pytest.mark.parametrize("kind", ["llama", "llama_padded"])
def test_new_tokens_begin_near_the_mean_in_both_matrices(kind: str, backbone: str, composed: Any, tmp_path: Path) -> None:
    theirs = checkpoint(kind, tmp_path / "hf")
    parts, said = built(composed(tmp_path / "hf", backbone, *PLAIN))
    vocabulary = parts.prepared.tokenizer.vocabulary
    assert vocabulary.added == tuple(range(TEXT, vocabulary.size))
    assert len(vocabulary.added) == 6 + 4  # of padding, mask and infilling; sentinels
    assert any(line.startswith("embedding: 10 new tokens") for line in said)
    matrices = (theirs.get_input_embeddings().weight, theirs.lm_head.weight)
    for old, ours in zip(matrices, (parts.module.backbone.embedding.weight, parts.module.head.w_out.weight), strict=True):
        known = torch.cat((old[:TEXT], old[vocabulary.size :][: len(ours) - vocabulary.size]))
        assert torch.equal(ours[:TEXT], old[:TEXT])
        torch.testing.assert_close(
            ours[TEXT : vocabulary.size], known.mean(0).expand(10, -1), rtol=0, atol=0.05 * float(old.detach().std())
        )
        assert not torch.equal(ours[TEXT], ours[TEXT + 1])


def test_what_would_be_lost_is_refused_or_said(composed: Any, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"would lose the output matrix of LlamaForCausalLM; use head\.tie_embeddings=false"):
        built(composed(tmp_path / "llama", "huggingface", *PLAIN, "head.tie_embeddings=true"))
    _, said = built(composed(tmp_path / "llama", "huggingface"))
    assert "head: freshly initialised; that of LlamaForCausalLM is taken with head.bias=false" in said
    checkpoint("bert", tmp_path / "bert")
    _, said = built(composed(tmp_path / "bert", "huggingface", "objective=mlm", "head=mlm"))
    assert f"head: freshly initialised; that of BertForMaskedLM is taken with {' '.join(BERT_HEAD[1:])}" in said
    checkpoint("gemma2", tmp_path / "gemma2")  # soft-capped logits
    _, said = built(composed(tmp_path / "gemma2", "huggingface", *PLAIN))
    assert "head: freshly initialised, since that of Gemma2ForCausalLM is not known" in said


def test_another_models_tokenizer_is_refused_and_our_own_is_said(composed: Any, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "hf")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    other.add_tokens([f"word{i}" for i in range(9)])
    (tmp_path / "other").mkdir()
    other.save(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"9 tokens more than the 257 of the checkpoint.*tokenizer\.path="):
        built(composed(tmp_path / "hf", "huggingface", *PLAIN, f"tokenizer.path={tmp_path / 'other'}"))
    config = composed(tmp_path / "hf", "huggingface", *PLAIN)
    said = built(compose_with_bytes(config))[1]
    assert any(line.startswith("tokenizer: the weights were not trained with tokenizer=byte") for line in said)


def compose_with_bytes(config: ExperimentConfig) -> ExperimentConfig:
    from heads_lightning.configs.tokenizer import ByteConfig

    config.tokenizer = ByteConfig()
    return config


def test_a_trunk_that_lacks_a_weight_is_refused(composed: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint("llama", tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"},
        tmp_path / "hf" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match=r"lacks 1 weights, which would stay random: layers\.1\.mlp\.up_proj\.weight"):
        built(composed(tmp_path / "hf", "huggingface", *PLAIN))


@pytest.mark.parametrize("frozen", ["backbone.freeze=true", "backbone.lora_rank=2"])
def test_a_frozen_embedding_is_said_and_can_be_trained(frozen: str, composed: Any, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "hf")
    parts, said = built(composed(tmp_path / "hf", "huggingface", *PLAIN, frozen))
    assert any("backbone.train_embedding=true trains it" in line for line in said)
    assert not parts.module.backbone.embedding.weight.requires_grad
    parts, said = built(composed(tmp_path / "hf", "huggingface", *PLAIN, frozen, "backbone.train_embedding=true"))
    assert parts.module.backbone.embedding.weight.requires_grad
    assert not any("frozen" in line for line in said)


@pytest.mark.parametrize("recipe", ["continue_fim", "continue_mlm"])
def test_recipes(recipe: str, tiny: list[str], tmp_path: Path) -> None:
    kind = "bert" if recipe == "continue_mlm" else "llama"
    checkpoint(kind, tmp_path / "hf")
    kept = [o for o in tiny if not o.startswith(("backbone.", "tokenizer.", "data.sequence_length"))]
    config = compose([f"experiment={recipe}", *kept, f"backbone.source={tmp_path / 'hf'}", "data.sequence_length=32"])
    result = train(config, tmp_path / "run")
    assert result.metrics["val/loss"] > 0
