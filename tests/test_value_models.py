"""Models with a value head: logits, losses, values, dropout, initialisation, files."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
import transformers as hf
from hub_server import serving
from safetensors.torch import load, load_file
from torch import nn
from torch.nn import functional as F
from value_data import CAUSAL, LLAMA, SEQ2SEQ, V, inputs, tiny_model
from value_wrappers import ALL, Critic, assert_equal_states, head_of, wrapped

from heads_lightning import AutoModelForCausalLMWithValueHead, ValueHead
from heads_lightning.models.value_export import convert_pickled_value_head

hf.utils.logging.set_verbosity_error()


# -- forward (V1 to V6) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_logits_loss_and_values(kind: str) -> None:
    """V1, V3, V14: shapes, logits the bare model's to the bit, values those of the last hidden state by hand."""
    model, given = wrapped(kind), inputs(kind)
    logits, loss, value = model(**given)
    assert (list(logits.shape), loss, list(value.shape)) == ([2, 7, V], None, [2, 7])
    assert logits.dtype == value.dtype == torch.float32
    bare = model.pretrained_model(**given, output_hidden_states=True, return_dict=True)
    assert torch.equal(logits, bare.logits)
    hidden = bare.hidden_states if kind in CAUSAL else bare.decoder_hidden_states
    by_hand = hidden[-1] @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    assert (value - by_hand).abs().max() < 1e-6


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_loss_is_the_models_own(kind: str) -> None:
    """V2: next-token cross-entropy."""
    ids = inputs(kind)["input_ids"]
    logits, loss, _ = wrapped(kind)(input_ids=ids, labels=ids)
    assert loss.item() == pytest.approx(float(F.cross_entropy(logits[:, :-1].detach().reshape(-1, V), ids[:, 1:].reshape(-1))), rel=1e-6)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_loss_of_an_encoder_decoder(kind: str) -> None:
    labels = inputs(kind)["decoder_input_ids"]
    logits, loss, value = wrapped(kind)(input_ids=inputs(kind)["input_ids"], labels=labels)
    assert loss.item() == pytest.approx(float(F.cross_entropy(logits.detach().reshape(-1, V), labels.reshape(-1))), rel=1e-6)
    assert value.shape == labels.shape


def test_a_loaded_model_has_no_dropout_until_it_trains(tmp_path: Path) -> None:
    """V4: two forwards right after loading."""
    wrapped().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert isinstance(model.v_head.dropout, nn.Dropout)
    assert model.v_head.dropout.p == 0.1
    first, second = (model(**inputs("gpt2"))[2] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(model(**inputs("gpt2"))[2], first)


def test_values_are_fp32_in_every_precision() -> None:
    """V5: autocast, .to(bf16), Lightning's bf16-true; the head's numbers do not lose a bit."""
    model, ids = wrapped("llama").eval(), inputs("llama")["input_ids"]
    before, exact = head_of(model), model(ids)[2]
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(ids)[2]
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low.pretrained_model.dtype == torch.bfloat16
    plugin = lightning.plugins.HalfPrecision("bf16-true")
    with plugin.module_init_context(), plugin.forward_context():
        module = plugin.convert_module(wrapped("llama").eval())
        under_lightning = module(ids)[2]
    assert module.pretrained_model.dtype == torch.bfloat16
    for values in (under_autocast, low(ids)[2], under_lightning):
        assert values.dtype == torch.float32
        assert (values - exact).abs().max() < 0.05 * exact.abs().max() + 0.02  # the trunk's rounding alone
    assert_equal_states(head_of(low), before)
    assert_equal_states(head_of(module), before)


@pytest.mark.parametrize(
    ("said", "p"), [({"summary_dropout_prob": None}, 0), ({"summary_dropout_prob": 0}, 0), ({"summary_dropout_prob": 0.3}, 0.3), ({}, 0.1)]
)
def test_dropout(said: dict[str, Any], p: float) -> None:
    """V6: None and 0 are none; unsaid is 0.1."""
    dropout = wrapped(**said).v_head.dropout
    assert isinstance(dropout, nn.Dropout if p else nn.Identity)
    assert getattr(dropout, "p", 0) == p


def test_two_dropouts_are_refused() -> None:
    """V6: the model's config against the keyword."""
    model = tiny_model("gpt2")
    model.config.summary_dropout_prob = 0.5
    assert AutoModelForCausalLMWithValueHead(model).v_head.dropout.p == 0.5
    with pytest.raises(ValueError, match=r"summary_dropout_prob=0.1, but the model's config says 0.5"):
        AutoModelForCausalLMWithValueHead(model, summary_dropout_prob=0.1)


def test_initialisation() -> None:
    """V7."""
    normal = wrapped(v_head_init_strategy="normal", v_head_initializer_range=0.05).v_head.summary.weight
    wide = ValueHead(hf.GPT2Config(n_embd=4096), v_head_init_strategy="normal", v_head_initializer_range=0.05).summary
    assert float(wide.weight.std()) == pytest.approx(0.05, rel=0.05)
    assert 0.02 < float(normal.std()) < 0.09
    assert not wide.bias.any()
    assert wrapped().v_head.summary.bias.any()
    with pytest.raises(ValueError, match=r"v_head_init_strategy='xavier' does not exist"):
        wrapped(v_head_init_strategy="xavier")
    with pytest.raises(ValueError, match=r"dropuot is no argument"):
        wrapped(dropuot=0.1)


def test_value_head_has_trls_form() -> None:
    head = ValueHead(hf.GPT2Config(n_embd=16), summary_dropout_prob=0.0)
    assert head(torch.randn(2, 5, 16)).shape == (2, 5, 1)
    assert head.summary.weight.shape == (1, 16)
    for config, width in (
        (hf.OPTConfig(hidden_size=16, word_embed_proj_dim=8, num_attention_heads=2), 8),
        (SEQ2SEQ["t5"](), 16),
        (hf.LlavaConfig(text_config=hf.LlamaConfig(**LLAMA)), 16),
        (SEQ2SEQ["bert2bert"](), 16),
    ):
        assert ValueHead(config).summary.in_features == width
    with pytest.raises(ValueError, match="says no width"):
        ValueHead(object())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_strict_round_trips(kind: str) -> None:
    """V8, V9: own and parent state, strictly, to the bit."""
    source, given = wrapped(kind).eval(), inputs(kind)
    with torch.no_grad():
        source.v_head.summary.weight.mul_(3)
    for one, other in ((source, wrapped(kind).eval()), (Critic(source).eval(), Critic(wrapped(kind)).eval())):
        state = one.state_dict()
        assert any(key.endswith("v_head.summary.weight") for key in state)
        assert not any("pretrained_model." in key for key in state)
        other.load_state_dict(state, strict=True)
        inner = other if other.__class__ is source.__class__ else other.inner["critic"]
        assert torch.equal(inner(**given)[2], source(**given)[2])
        assert_equal_states(other.state_dict(), state)
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped(kind).load_state_dict({k: v for k, v in source.state_dict().items() if k != "v_head.summary.bias"})
    source.load_state_dict(dict(source.named_parameters()), strict=False)  # names of parameters are taken too


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("how", ["single", "sharded", "bf16"])
def test_save_and_load(kind: str, how: str, tmp_path: Path) -> None:
    """V10: into a missing folder, by keyword; the head's bits and every type are kept."""
    model, folder = wrapped(kind).eval(), tmp_path / "a" / "b"
    if how == "bf16":
        model.to(torch.bfloat16)
    model.save_pretrained(save_directory=folder, **({"max_shard_size": "8KB"} if how == "sharded" else {}))
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (how == "sharded")
    assert not list(folder.glob("*.bin"))
    again = type(model).from_pretrained(folder, dtype="auto")
    assert_equal_states(again.state_dict(), model.state_dict())
    assert again.v_head.summary.weight.dtype == torch.float32
    assert again.pretrained_model.dtype == (torch.bfloat16 if how == "bf16" else torch.float32)
    assert torch.equal(again(**inputs(kind))[2], model(**inputs(kind))[2])


def test_plain_transformers_opens_the_folder(tmp_path: Path) -> None:
    """V11: the only keys that it does not know are the head's."""
    model = wrapped("llama").eval()
    model.save_pretrained(tmp_path)
    plain, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert not report["missing_keys"]
    assert torch.equal(plain(**inputs("llama")).logits, model(**inputs("llama"))[0])


def test_a_checkpoint_without_a_value_head_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert "holds no value head" in caplog.text
    caplog.clear()
    wrapped().save_pretrained(tmp_path / "with")
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "with")
    assert "value head" not in caplog.text


def test_pickles_are_refused_and_can_be_converted(tmp_path: Path) -> None:
    model = wrapped("llama").eval()
    with pytest.raises(ValueError, match="safe_serialization=False writes a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, which is not opened.*convert_pickled_value_head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert_equal_states(load_file(convert_pickled_value_head(tmp_path)), head_of(model))


HUB_PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
from value_data import tiny_model
from heads_lightning import AutoModelForCausalLMWithValueHead as Critic

torch.manual_seed(5)
model = Critic(tiny_model("gpt2")).eval()
pushed = model.push_to_hub("someone/critic", private=True, token="hf_of_nobody", commit_message="As trained")
assert pushed.oid.endswith("1"), pushed
assert not hasattr(model.pretrained_model, "v_head")
opened = Critic.from_pretrained("someone/critic").eval()
for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, opened.state_dict()[name]), name
print("opened")
"""


def test_push_to_hub_speaks_the_hubs_protocol(tmp_path: Path) -> None:
    """The client is the real one, over HTTP; what arrives are safetensors and a config, and they open again from there."""
    with serving() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        program = HUB_PROGRAM.format(tests=str(Path(__file__).parent))
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.split() == ["opened"]
    files = hub.files["someone/critic"]
    assert {name.rsplit(".", 1)[1] for name in files} <= {"safetensors", "json"}, sorted(files)
    assert {"model.safetensors", "config.json"} <= files.keys()
    asked = hub.created["someone/critic"]
    assert asked.get("private") is True or asked.get("visibility") == "private"  # older and newer clients
    assert hub.messages == ["As trained"]
    assert "Bearer hf_of_nobody" in hub.tokens
    state = load(files["model.safetensors"])
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= state.keys()
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
