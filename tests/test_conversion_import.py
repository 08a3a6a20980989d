"""`backbone=huggingface_import`: trunk, head and vocabulary of a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_models import VOCAB
from converted_folders import changed, saved, state_of

from heads_lightning.batch import Attention
from heads_lightning.composition import compose, from_yaml
from heads_lightning.conversion import ConversionError
from heads_lightning.experiment import build_model
from heads_lightning.registry import ConfigError

# ---- backbone=huggingface_import


def test_import_composes_without_torch_and_rebuilds_without_the_folder(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "hf")
    script = (
        "import sys\nfrom heads_lightning.composition import compose, to_yaml\n"
        f"config = compose(['backbone=huggingface_import', 'backbone.source={tmp_path / 'hf'}'])\n"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules), 'torch was imported'\n"
        "print(to_yaml(config))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "hf").rename(tmp_path / "gone")
    config = from_yaml(done.stdout)
    assert config.backbone.d_model == 32
    backbone, _ = build_model(config, VOCAB)
    assert sum(p.numel() for p in backbone.parameters()) == config.backbone.num_params(VOCAB)
    with pytest.raises(ConfigError, match="cannot be read"):
        compose(["backbone=huggingface_import", f"backbone.source={tmp_path / 'hf'}"])
    saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"data.sequence_length=256 is longer than backbone.max_positions=64"):
        compose(["backbone=huggingface_import", f"backbone.source={tmp_path / 'gpt2'}"])
    with pytest.raises(ConfigError, match=r"backbone.d_model=64 cannot be set"):
        compose(["backbone=huggingface_import", f"backbone.source={tmp_path / 'gone'}", "backbone.d_model=64"])


@pytest.mark.parametrize("case", ["llama", "bert", "gpt2"])
def test_import_has_the_weights_of_trunk_and_head(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "hf")
    options = {"llama": ["head.bias=false"], "gpt2": ["head.bias=false", "head.tie_embeddings=true"]}
    options["bert"] = ["objective=mlm", "head=mlm", "head.tie_embeddings=true", "head/layer_norm=layer_norm", "head.layer_norm.bias=true"]
    options["bert"] += ["head.layer_norm.eps=1e-12"]
    config = compose(["backbone=huggingface_import", f"backbone.source={tmp_path / 'hf'}", "data.sequence_length=64", *options[case]])
    backbone, head = build_model(config, VOCAB)
    said = config.backbone.load_pretrained(backbone, head)
    assert [line.partition(":")[0] for line in said] == ["backbone", "head"]
    assert "fresh" not in str(said)
    tokens = torch.randint(3, VOCAB, (2, 20))
    from heads_lightning.batch import Batch

    attention = Attention.bidirectional if case == "bert" else Attention.causal
    with torch.no_grad():
        got = head.eval()(backbone.eval()(Batch(tokens, tokens, attention, 0, 0)))
        torch.testing.assert_close(got, model(tokens).logits, rtol=1e-4, atol=1e-5)
    alone = config.backbone.build(vocab_size=VOCAB)
    assert all(torch.equal(t, backbone.state_dict()[n]) for n, t in alone.state_dict().items())


def test_import_into_another_vocabulary_says_what_is_new(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    config = compose(["backbone=huggingface_import", f"backbone.source={tmp_path / 'hf'}"])  # a head with a bias, unlike Llama's
    backbone, head = build_model(config, VOCAB + 3)
    said = config.backbone.load_pretrained(backbone, head)
    assert "head: freshly initialised; that of LlamaForCausalLM is taken with head.bias=false" in said
    assert "embedding: 3 new tokens begin near the mean of the others" in said
    source = state_of(tmp_path / "hf")["model.embed_tokens.weight"]
    assert torch.equal(backbone.embedding.weight[:VOCAB], source)
    assert (backbone.embedding.weight[VOCAB:] - source.mean(0)).abs().max() < 0.05 * source.std()
    smaller, head = build_model(config, VOCAB - 7)
    assert any(
        "7 rows that the tokenizer has no tokens for are left out" in line for line in config.backbone.load_pretrained(smaller, head)
    )
    with pytest.raises(ConfigError, match=r"3 tokens more than .* another model's"):
        config.backbone.load_pretrained(*build_model(config, VOCAB + 3), new_tokens=[])
    changed(tmp_path / "hf", lambda s: s.pop("model.norm.weight"))
    with pytest.raises(ConversionError, match=r"lacks model\.norm\.weight"):
        config.backbone.load_pretrained(*build_model(config, VOCAB))
