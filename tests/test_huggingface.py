"""`backbone=huggingface`: the model's own numbers, documents kept apart, adapters, no code from outside."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from value_data import CAUSAL, COMMON, LLAMA, V, bert_config, tiny_model

from heads_lightning.batch import PADDING, Attention, Batch
from heads_lightning.composition import compose
from heads_lightning.configs.huggingface import HuggingFaceConfig
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.testing.backbones import batch_of, changed_at
from heads_lightning.training.checkpoints import newest_checkpoint, read_checkpoint

hf.utils.logging.set_verbosity_error()

ENCODERS: dict[str, Any] = {
    "bert": bert_config,
    "roberta": lambda: hf.RobertaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=40, **COMMON | {"pad_token_id": 1}),
    "modernbert": lambda: hf.ModernBertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
                                              local_attention=8, global_attn_every_n_layers=2, **COMMON),
}  # fmt: skip
SLIDING: dict[str, Any] = {
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=5, **COMMON),
    "gemma2": lambda: hf.Gemma2Config(**LLAMA, head_dim=8, sliding_window=5, **COMMON),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=8, **COMMON),
}
KINDS = {**{k: CAUSAL[k] for k in ("gpt2", "llama", "gpt_neox", "gemma", "qwen2", "opt")}, **SLIDING, **ENCODERS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model of every kind, with weights large enough for a leak to show."""
    root = tmp_path_factory.mktemp("models")
    for kind, described in {
        **KINDS,
        "bloom": CAUSAL["bloom"],
        "mamba": lambda: hf.MambaConfig(hidden_size=16, num_hidden_layers=2, **COMMON),
    }.items():
        torch.manual_seed(0)
        model = hf.AutoModel.from_config(described())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)
        model.save_pretrained(root / kind)
    return {path.name: path for path in root.iterdir()}


def config(folder: Path, **changes: Any) -> HuggingFaceConfig:
    return HuggingFaceConfig(source=str(folder), **changes)


def kind_of(model: Any) -> Attention:
    return Attention.bidirectional if Attention.bidirectional in model.config.attention_supported() else Attention.causal


TOKENS = torch.randint(3, V, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_models_own(kind: str, folders: dict[str, Path]) -> None:
    """Alone, as one segment (sliding windows included), and beside other documents and padding."""
    model = config(folders[kind]).build(vocab_size=V).eval()
    attention = kind_of(model)
    assert attention == (Attention.bidirectional if kind in ENCODERS else Attention.causal)
    bare = hf.AutoModel.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        whole = model(batch_of(TOKENS, attention))
        assert torch.equal(whole, bare(TOKENS).last_hidden_state)
        assert whole.shape[-1] == model.d_model
        one_segment = model(batch_of(TOKENS, attention, segments_BS=torch.zeros_like(TOKENS)))
        assert (one_segment - whole).abs().max() < 1e-4 * whole.abs().max()
        segments = torch.repeat_interleave(torch.tensor([0, 1, PADDING]), torch.tensor([7, 12, 5])).expand(2, 24)
        packed = model(batch_of(TOKENS, attention, segments_BS=segments))
        for part in (slice(0, 7), slice(7, 19)):
            assert (packed[:, part] - bare(TOKENS[:, part]).last_hidden_state).abs().max() < 1e-4 * whole.abs().max()
        assert packed.isfinite().all()
    other = TOKENS.clone()
    other[:, :7] = other[:, :7].flip(1)
    change = changed_at(model, batch_of(TOKENS, attention, segments_BS=segments), batch_of(other, attention, segments_BS=segments))
    assert change[:7].max() > 1e-2
    assert not change[7:].any()


def test_prefix_attention(folders: dict[str, Path]) -> None:
    model = config(folders["llama"]).build(vocab_size=V).eval()
    prefix = (torch.arange(24) < 10).expand(2, 24)
    for at, first in ((9, 0), (15, 15)):
        other = TOKENS.clone()
        other[:, at] = (other[:, at] + 1) % V
        change = changed_at(model, *(batch_of(t, Attention.prefix, prefix_BS=prefix) for t in (TOKENS, other)))
        assert not change[:first].any()
        assert (change[first:] > 1e-6).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("padded", [False, True])
def test_reading_on_from_a_cache(kind: str, padded: bool, folders: dict[str, Path]) -> None:
    model = config(folders[kind]).build(vocab_size=V).eval()
    segments = torch.tensor([[PADDING] * 4 + [0] * 20, [0] * 24]) if padded else None
    with torch.no_grad():
        whole = model(batch_of(TOKENS, segments_BS=segments))
        cache, pieces = model.new_cache(2, 24), []
        for part in (slice(0, 9), slice(9, 10), slice(10, 24)):
            given = None if segments is None or part.start else segments[:, part]
            pieces.append(model(batch_of(TOKENS[:, part], segments_BS=given), cache))
            assert cache.length == part.stop
    real = slice(None) if segments is None else segments != PADDING
    assert (torch.cat(pieces, 1) - whole)[real].abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_architectures_that_ignore_a_mask_are_refused(kind: str, folders: dict[str, Path]) -> None:
    """Bloom knows no position_ids, Mamba's state runs on: both would train happily and wrongly."""
    model = config(folders[kind]).build(vocab_size=V)
    model(batch_of(TOKENS))
    with pytest.raises(ConfigError, match=r"cannot keep packed documents apart|does not keep packed documents apart"):
        model(batch_of(TOKENS, segments_BS=torch.zeros_like(TOKENS)))


def test_gradients_reach_everything_and_checkpointing_changes_nothing(folders: dict[str, Path]) -> None:
    for kind in ("llama", "bert"):
        grads = {}
        for checkpointing in (False, True):
            model = config(folders[kind], gradient_checkpointing=checkpointing).build(vocab_size=V).train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            (model(batch_of(TOKENS, kind_of(model))) ** 2).mean().backward()
            grads[checkpointing] = {n: p.grad for n, p in model.named_parameters()}
            assert all(g is not None and g.any() for n, g in grads[checkpointing].items() if "token_type" not in n), kind
        assert model.model.is_gradient_checkpointing
        for name, grad in grads[False].items():
            assert torch.allclose(grad, grads[True][name], atol=1e-5), name


def test_rows_are_added_to_the_embedding_and_the_others_stay(folders: dict[str, Path]) -> None:
    model = config(folders["llama"]).build(vocab_size=V + 5, init_device="meta")
    model.to_empty(device="cpu")
    model.reset_parameters(torch.Generator().manual_seed(0))
    bare = hf.AutoModel.from_pretrained(folders["llama"])
    assert torch.equal(model.embedding.weight[:V], bare.get_input_embeddings().weight)
    assert model.embedding.weight[V:].std() > 0
    assert model.embedding.weight[V:].abs().max() < 2 * model.embedding.weight[:V].abs().max()
    assert config(folders["llama"]).num_params(V + 5) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters(kind: str, folders: dict[str, Path]) -> None:
    """V19 for the trunk: adapters begin as nothing, are all that trains, and come from the generator."""
    pytest.importorskip("peft")
    models = []
    for seed in (0, 0, 1):
        model = config(folders[kind], lora_rank=4).build(vocab_size=V, init_device="meta")
        model.to_empty(device="cpu")
        model.reset_parameters(torch.Generator().manual_seed(seed))
        models.append(model.eval())
    bare = hf.AutoModel.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        assert torch.allclose(models[0](batch_of(TOKENS)), bare(TOKENS).last_hidden_state, atol=1e-5)
    trainable = {n: p for n, p in models[0].named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])
    (models[0](batch_of(TOKENS)) ** 2).mean().backward()
    assert all(p.grad is not None for p in trainable.values())
    with pytest.raises(ConfigError, match=r"backbone.lora_targets=\['nothing'\]"):
        config(folders[kind], lora_rank=4, lora_targets=["nothing"]).build(vocab_size=V)


def test_mistakes_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path / "t5")
    for changes, message in (
        ({}, "backbone=huggingface needs a model: backbone.source=FOLDER_OR_NAME"),
        ({"source": str(tmp_path)}, "cannot be opened"),
        ({"source": str(tmp_path / "t5")}, "is an encoder-decoder"),
        ({"source": str(folders["llama"]), "d_model": 99}, "has the width 16"),
        ({"source": str(folders["mamba"]), "attention_kernel": "sdpa"}, "does not support .*use backbone.attention_kernel=auto"),
    ):
        with pytest.raises(ConfigError, match=message) as refusal:
            HuggingFaceConfig(**changes).build(vocab_size=V)
        assert "\n" not in str(refusal.value)
    source = f"backbone.source={folders['bert']}"
    with pytest.raises(ConfigError, match="objective=fim needs causal attention, which backbone=huggingface does not give"):
        compose(["backbone=huggingface", source])
    with pytest.raises(ConfigError, match="contradict each other"):
        compose(["backbone=huggingface", source, "backbone.freeze=true", "backbone.lora_rank=4"])
    compose(["backbone=huggingface", source, "objective=mlm"])


def test_code_from_outside_cannot_be_asked_for() -> None:
    assert "trust_remote_code" not in {field.name for field in dataclasses.fields(HuggingFaceConfig)}
    with pytest.raises(ConfigError, match="trust_remote_code does not exist"):
        compose(["backbone=huggingface", "backbone.source=x", "backbone.trust_remote_code=true"])


CASES = {
    "critic with adapters": ("llama", ["objective=value", "head=value", "backbone.lora_rank=2", "trainer.micro_batch_size=4"]),
    "infilling, tied": ("gpt2", ["objective=fim", "head.tie_embeddings=true", "trainer.precision=bf16-mixed"]),
    "mlm of an encoder": ("bert", ["objective=mlm", "head=mlm"]),
    "head alone": ("qwen2", ["objective=value", "head=value", "backbone.freeze=true", "head.detach_trunk=true", "head.dropout=0.1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_from_the_command_line(case: str, tiny: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    kind, overrides = CASES[case]
    if "lora" in " ".join(overrides):
        pytest.importorskip("peft")
    kept = [o for o in tiny if not o.startswith(("backbone.", "tokenizer."))]
    given = [*kept, "backbone=huggingface", f"backbone.source={folders[kind]}", "tokenizer=byte", "data.sequence_length=32", *overrides]
    result = train(compose(given), tmp_path / "run")
    assert result.metrics["val/loss"] > 0
    state = read_checkpoint(newest_checkpoint(tmp_path / "run"))["state_dict"]
    before = hf.AutoModel.from_pretrained(folders[kind]).state_dict()
    same = [torch.equal(state[f"backbone.model.{k}"], v) for k, v in before.items() if f"backbone.model.{k}" in state and v.ndim == 2]
    trains_all = not any("lora" in o or "freeze" in o for o in overrides)
    assert not all(same) if trains_all else sum(not s for s in same) <= 1  # the embedding alone has rows added
    from heads_lightning.experiment import load

    assert load(str(tmp_path / "run")).backbone.d_model == 16
    train(compose([*given, "trainer.max_steps=5", f"resume={tmp_path / 'run'}"]), tmp_path / "run")


def test_a_batch_of_one_document_needs_no_mask(folders: dict[str, Path]) -> None:
    batch = Batch(TOKENS, TOKENS, Attention.causal, 0, 0)
    model = config(folders["bloom"]).build(vocab_size=V).eval()
    assert model(batch).shape == (2, 24, 16)
