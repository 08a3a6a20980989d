"""Wrappers with a value head: what a program written for TRL expects, and what those classes did wrong."""

from __future__ import annotations

import copy
import json
import logging
import math
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
from value_data import CAUSAL, COMMON, LLAMA, SEQ2SEQ, V, bert_config, inputs, tiny_model

from heads_lightning import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, ValueHead, create_reference_model
from heads_lightning.backbones.huggingface import HuggingFace
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.huggingface import HuggingFaceConfig
from heads_lightning.configs.value import ValueHeadConfig, ValueInit
from heads_lightning.models.value_export import convert_pickled_value_head, to_sequence_classification
from heads_lightning.models.value_files import VALUE_HEAD_FILE

hf.utils.logging.set_verbosity_error()
ALL = [*CAUSAL, *SEQ2SEQ]


def wrapped(kind: str = "gpt2", **head: Any) -> Any:
    parent = AutoModelForCausalLMWithValueHead if kind in CAUSAL else AutoModelForSeq2SeqLMWithValueHead
    torch.manual_seed(5)
    return parent(tiny_model(kind), **head)


def head_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if k.startswith("v_head.")}


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


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


# -- state (V8 to V11) ----------------------------------------------------------------------------------------------------


class Critic(lightning.LightningModule):
    """A user's module around a wrapper."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"critic": model})


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


def test_post_init_takes_the_head_whole() -> None:
    model, other = wrapped(), wrapped(v_head_init_strategy="normal")
    model.post_init(other.state_dict())
    assert_equal_states(head_of(model), head_of(other))
    with pytest.raises(RuntimeError, match=r"Missing key.*summary\.weight"):
        model.post_init({"v_head.wrong": torch.zeros(1)})


# -- construction and use (V12 to V18) ------------------------------------------------------------------------------------


def test_constructed_directly_and_without_dicts() -> None:
    """V12."""
    for kind in ALL:
        model = wrapped(kind)
        assert torch.equal(model(**inputs(kind), return_dict=False)[2], model(**inputs(kind))[2]), kind


def test_what_is_no_language_model_is_refused() -> None:
    """V13."""
    with pytest.raises(ValueError, match="GPT2Model has no head over a vocabulary"):
        AutoModelForCausalLMWithValueHead(hf.GPT2Model(CAUSAL["gpt2"]()))
    with pytest.raises(ValueError, match="BertModel has no head over a vocabulary"):
        AutoModelForCausalLMWithValueHead(hf.BertModel(bert_config()))
    with pytest.raises(ValueError, match="not Linear"):
        AutoModelForCausalLMWithValueHead.from_pretrained(nn.Linear(2, 2))


def test_padding_changes_no_value_of_a_real_token() -> None:
    """V15."""
    for kind in CAUSAL:
        model, ids = wrapped(kind).eval(), inputs(kind)["input_ids"]
        padded = F.pad(ids, (0, 3))
        value = model(padded, attention_mask=(padded != 0).long())[2]
        assert (value[:, :7] - model(ids)[2]).abs().max() < 1e-5, kind


@pytest.mark.parametrize("kind", CAUSAL)
def test_reading_on_from_a_cache(kind: str) -> None:
    """V16: 4 tokens, then 3."""
    model, ids = wrapped(kind).eval(), inputs(kind)["input_ids"]
    *first, cache = model(ids[:, :4], return_past_key_values=True)
    second = model(ids[:, 4:], past_key_values=cache, attention_mask=torch.ones_like(ids))
    assert (torch.cat((first[2], second[2]), 1) - model(ids)[2]).abs().max() < 1e-5
    assert len(model(ids)) == 3


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_compiles_whole(kind: str, labelled: bool) -> None:
    """V17: one graph, in training too."""
    model, given = wrapped(kind, summary_dropout_prob=0.0).eval(), inputs(kind)
    if labelled:
        given["labels"] = inputs(kind).get("decoder_input_ids", given["input_ids"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**given)[2], model(**given)[2])
    compiled(**given)[2].sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_a_value_reaches_the_trunk_unless_detached() -> None:
    """V18."""
    for detach in (False, True):
        model = wrapped("llama")
        model.v_head.config.detach_trunk = detach
        model(**inputs("llama"))[2].sum().backward()
        trunk = [p.grad for n, p in model.named_parameters() if not n.startswith("v_head")]
        assert any(g is not None and g.any() for g in trunk) != detach
        assert model.v_head.summary.weight.grad.any()


def test_generate_and_what_a_trainer_asks() -> None:
    model, ids = wrapped("llama").eval(), inputs("llama")["input_ids"]
    given = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.pretrained_model.generate(ids, **given))
    assert model._last_state.hidden_BSD is None
    assert model.can_generate()
    assert model.config is model.pretrained_model.config
    assert model.get_input_embeddings() is model.pretrained_model.get_input_embeddings()
    assert (model.device.type, model.dtype, model.is_peft_model) == ("cpu", torch.float32, False)
    assert model._no_split_modules
    model.tie_weights()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.train()(ids)[2].sum().backward()
    assert model.get_input_embeddings().weight.grad.any()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    assert model.transformers_parent_class is hf.AutoModelForCausalLM
    assert "summary_dropout_prob" in model.supported_args
    assert "lm_head" in model.lm_head_namings


@pytest.mark.parametrize("kind", ALL)
def test_values_without_the_logits(kind: str) -> None:
    """A critic's step forms the logits of one position and the values of all."""
    model, given = wrapped(kind).eval(), inputs(kind)
    logits, _, value = model(**given, return_logits=False)
    assert logits is None
    assert torch.equal(value, model(**given)[2])


def test_logits_of_the_last_position_by_the_models_own_argument() -> None:
    model, ids = wrapped("llama").eval(), inputs("llama")["input_ids"]
    logits, _, value = model(ids, logits_to_keep=1)
    assert logits.shape == (2, 1, V)
    assert torch.equal(value, model(ids)[2])


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_loss_without_a_softmax_has_the_models_gradients(kind: str, return_logits: bool) -> None:
    """Of a loss, of the values, and of the logits where they are there: in one backward pass."""
    ids = inputs(kind)["input_ids"]
    labels = ids.clone()
    labels[0, :4] = -100
    states = []
    for ours in (True, False):
        model = wrapped(kind, summary_dropout_prob=0.0).eval()
        logits, loss, value = model(ids, labels=labels, return_logits=return_logits) if ours else model(ids)
        if not ours:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
        total = loss + value.square().mean() + (logits.square().mean() if return_logits else 0.0)
        total.backward()
        states.append({name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()})
    for name, got in states[0].items():
        torch.testing.assert_close(got, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_of_logits_that_were_changed_is_the_models_own() -> None:
    """Gemma 2 caps its logits after its head: its loss is the one of the capped ones, and cannot be had without them."""
    config = hf.Gemma2Config(**LLAMA, **COMMON, head_dim=8, final_logit_softcapping=0.01, query_pre_attn_scalar=8)
    model = AutoModelForCausalLMWithValueHead(hf.Gemma2ForCausalLM(config)).eval()
    ids = torch.arange(14).reshape(2, 7)
    logits, loss, _ = model(ids, labels=ids)
    assert logits.abs().max() <= 0.01
    assert loss.item() == pytest.approx(float(F.cross_entropy(logits[:, :-1].detach().reshape(-1, V), ids[:, 1:].reshape(-1))), rel=1e-6)
    with pytest.raises(ValueError, match="leave return_logits=False out"):
        model(ids, labels=ids, return_logits=False)
    assert model.pretrained_model(ids, labels=ids).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_no_labels_at_all_are_no_loss() -> None:
    """transformers' own is NaN."""
    model, ids = wrapped().eval(), inputs("gpt2")["input_ids"]
    loss = model(ids, labels=torch.full_like(ids, -100))[1]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in model.pretrained_model.parameters() if p.grad is not None)


def test_the_loss_of_a_copy_is_of_its_own_head() -> None:
    model, ids = wrapped("llama").eval(), inputs("llama")["input_ids"]
    before = model(ids, labels=ids)[1]
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.get_output_embeddings().weight)
    assert other(ids, labels=ids)[1].item() == pytest.approx(math.log(V), rel=1e-6)
    assert torch.equal(model(ids, labels=ids)[1], before)


def test_after_a_failed_call_nothing_is_held() -> None:
    model, ids = wrapped().eval(), inputs("gpt2")["input_ids"]
    with pytest.raises(IndexError):
        model(ids + 10 * V, return_logits=False)
    assert model.pretrained_model(ids).logits.shape == (2, 7, V)
    assert model._vocabulary.hidden_BSD is None


def test_from_an_object() -> None:
    bare = tiny_model("gpt2")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(bare, v_head_init_strategy="normal", v_head_initializer_range=0.7)
    assert model.pretrained_model is bare
    assert not model.v_head.summary.bias.any()


# -- adapters and references (V19, V20) -----------------------------------------------------------------------------------


def lora(kind: str = "gpt2") -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj"], init_lora_weights=False)


def test_an_adapter(tmp_path: Path) -> None:
    """V10, V19: only LoRA and head train; saved by keyword into a missing folder and opened again, with its own base."""
    base_folder, folder = tmp_path / "base", tmp_path / "new" / "adapter"
    tiny_model("gpt2").save_pretrained(base_folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base_folder), peft_config=lora())
    assert model.is_peft_model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("v_head.") for name in trainable)
    assert len(trainable) == 2 * 3 + 2
    assert torch.equal(model(**inputs("gpt2"))[2], model(**inputs("gpt2"))[2])
    Critic(model).load_state_dict(Critic(model).state_dict(), strict=True)
    model.save_pretrained(save_directory=folder)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md"}
    for is_trainable in (False, True):
        again = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder), is_trainable=is_trainable)
        assert_equal_states(head_of(again), head_of(model))
        assert torch.equal(again(**inputs("gpt2"))[2], model.eval()(**inputs("gpt2"))[2])
        assert any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n) == is_trainable
    (folder / VALUE_HEAD_FILE).unlink()
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("v_head.")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))


def test_adapters_that_make_no_sense_are_refused() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="not a PeftConfig"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("gpt2"), peft_config={"r": 4})
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt-tuned"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("gpt2"), peft_config=prompt)
    with pytest.raises(ValueError, match="reward_adapter does not exist"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("gpt2"), reward_adapter="x")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_reference_model(kind: str) -> None:
    """V20: shared layers are the same storage, and an optimizer step changes neither them nor the copy."""
    model = wrapped(kind)
    reference = create_reference_model(model, num_shared_layers=1)
    before = {k: v.clone() for k, v in reference.state_dict().items()}
    own, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    shared = {name for name in own if own[name].data_ptr() == theirs[name].data_ptr()}
    assert any(".0." in name for name in shared)
    assert not any(".1." in name or name.startswith("v_head") for name in shared)
    assert not any(p.requires_grad for p in theirs.values())
    assert not reference.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs(kind))[2].sum().backward()
    optimizer.step()
    assert_equal_states(reference.state_dict(), before)
    assert not all(torch.equal(a, b) for a, b in zip(own.values(), theirs.values(), strict=True))
    assert reference(**inputs(kind))[2].shape == (2, 7)
    whole = create_reference_model(model)
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}
    for num, pattern in ((99, None), (1, "nothing.{layer}")):
        with pytest.raises(ValueError, match="belongs to layer"):
            create_reference_model(model, num_shared_layers=num, pattern=pattern)


def test_the_hook_of_a_copy_is_its_own() -> None:
    model = wrapped("llama").eval()
    other = copy.deepcopy(model)
    assert other._last_state is not model._last_state
    with torch.no_grad():
        other.pretrained_model.get_input_embeddings().weight.add_(1)
    assert not torch.equal(other(**inputs("llama"))[2], model(**inputs("llama"))[2])


# -- reward models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gemma"])
def test_a_reward_model_opens_as_sequence_classification(kind: str, tmp_path: Path) -> None:
    model, ids = wrapped(kind, v_head_init_strategy="normal").eval(), F.pad(inputs(kind)["input_ids"], (0, 2))
    to_sequence_classification(model, tmp_path)
    reward = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    score = reward(ids, attention_mask=(ids != 0).long()).logits
    assert torch.allclose(score[:, 0], model(ids[:, :7])[2][:, -1], atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(reward).__name__]


def test_the_trunk_and_head_of_a_run_open_too(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    backbone = HuggingFace(HuggingFaceConfig(source=str(tmp_path / "base")), vocab_size=V + 3).eval()
    head = ValueHeadConfig(init=ValueInit.normal).build(d_model=16)
    to_sequence_classification(backbone.model, tmp_path / "reward", head=head)
    reward, ids = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward"), inputs("qwen2")["input_ids"]
    values = head.values(backbone(Batch(ids, ids, Attention.causal, 0, 0)))
    assert torch.allclose(reward(ids).logits[:, 0], values[:, -1], atol=1e-5)


def test_reward_models_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has a bias of .* cannot hold"):
        to_sequence_classification(wrapped("llama"), tmp_path)
    with pytest.raises(ValueError, match="no single linear layer"):
        to_sequence_classification(wrapped("bart"), tmp_path)
    assert not list(tmp_path.iterdir())
