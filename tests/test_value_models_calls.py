"""Calling models with a value head: padding, caches, compilation, generation, losses, adapters, references."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F
from value_data import CAUSAL, COMMON, LLAMA, V, bert_config, inputs, tiny_model
from value_wrappers import ALL, Critic, assert_equal_states, head_of, wrapped

from heads_lightning import AutoModelForCausalLMWithValueHead, create_reference_model
from heads_lightning.backbones.huggingface import HuggingFace
from heads_lightning.batch import Attention, Batch
from heads_lightning.configs.huggingface import HuggingFaceConfig
from heads_lightning.configs.value import ValueHeadConfig, ValueInit
from heads_lightning.models.value_export import to_sequence_classification
from heads_lightning.models.value_files import VALUE_HEAD_FILE


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
