"""Value heads, our own Auto classes and sources that are read in other ways: whole conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_models import VOCAB, theirs
from test_conversion import HUGGINGFACE, TOKENIZER, native_run, run, saved, state_of
from torch import Tensor

import heads_lightning.conversion.auto
from heads_lightning import AutoModelForCausalLMWithValueHead
from heads_lightning.batch import Batch
from heads_lightning.composition import compose, from_yaml
from heads_lightning.configs.value import ValueConfig, ValueHeadConfig
from heads_lightning.conversion import ConversionError
from heads_lightning.experiment import build_model
from heads_lightning.registry import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


def same_states(one: Path, other: Path) -> None:
    want, got = state_of(one), state_of(other)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) and want[name].dtype == got[name].dtype for name in want)


# ---- value heads

VALUE = ["objective=value", "head=value", "head.init=normal"]
RUNS = {
    "llama": (["backbone.num_kv_heads=2"], "LlamaForTokenClassification"),
    "llama-no-bias": (["head.bias=false"], "LlamaForTokenClassification"),
    "qwen3": (["backbone.qk_norm=true"], "Qwen3ForTokenClassification"),
    "bins": (["objective.loss=hl_gauss", "objective.num_bins=7"], "LlamaForTokenClassification"),
    "projection": (["head.lm_weight=0.3", "objective.alignment=state_before_action"], "LlamaForCausalLM"),
    "tied-projection": (["head.lm_weight=0.3", "head.tie_embeddings=true"], "LlamaForCausalLM"),
    "hidden": (["head.hidden_dim=12"], "HeadsLightningForTokenClassification"),
    "both-sides": (["objective.bidirectional=true"], "HeadsLightningForTokenClassification"),
    "bigs": (["backbone=bigs", "backbone.direction=causal"], "HeadsLightningForTokenClassification"),
    "bigs-both-sides": (["backbone=bigs", "objective.bidirectional=true"], "HeadsLightningForTokenClassification"),
}


SLOW = ("llama-no-bias", "qwen3", "hidden", "bigs-both-sides")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in RUNS])
def test_a_run_with_a_value_head_goes_out_and_comes_back(kind: str, tmp_path: Path) -> None:
    overrides, architecture = RUNS[kind]
    bigs = any("bigs" in override for override in overrides)
    folder, config, backbone, head = native_run(tmp_path / "run", *VALUE, *overrides, transformer=not bigs)
    record, _ = run(folder, tmp_path / "hf", HUGGINGFACE)
    assert "values" in record.validated["outputs"]
    assert ("logits" in record.validated["outputs"]) == ("projection" in kind)
    told = json.loads((tmp_path / "hf/config.json").read_text())
    assert told["architectures"] == [architecture]
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        want = head(backbone(Batch(tokens, tokens, config.objective.attention, 0, 0)))
        if "projection" in kind:
            _, _, values = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "hf").eval()(tokens)
            got = values[..., None]
        else:
            got = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf").eval()(tokens).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert want.abs().max() > 1e-2
    run(tmp_path / "hf", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "again", HUGGINGFACE)
    same_states(tmp_path / "hf", tmp_path / "again")
    back = from_yaml(tmp_path / "native/config.yaml")
    assert isinstance(back.head, ValueHeadConfig)
    assert isinstance(back.objective, ValueConfig)
    assert (back.objective.loss, back.objective.alignment) == (config.objective.loss, config.objective.alignment)
    assert back.head.lm_weight == config.head.lm_weight


def test_a_value_head_of_trl_comes_in_and_goes_out_to_the_bit(tmp_path: Path) -> None:
    """A folder that AutoModelForCausalLMWithValueHead saved, which says nothing of what the values were trained for."""
    for case in ("llama", "gpt2", "llama-tied-biases"):
        source = tmp_path / case
        wrapped = AutoModelForCausalLMWithValueHead(theirs(case), v_head_init_strategy="normal").eval()
        wrapped.save_pretrained(source)
        TOKENIZER.save(source)
        record, _ = run(source, tmp_path / f"{case}-native")
        assert record.validated["outputs"] == ["logits", "values"]
        assert any("v_head.summary" in line for line in record.notes)
        run(tmp_path / f"{case}-native", tmp_path / f"{case}-back", HUGGINGFACE)
        same_states(source, tmp_path / f"{case}-back")
        tokens = torch.randint(3, VOCAB, (2, 20))
        with torch.no_grad():
            again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / f"{case}-back").eval()(tokens)
            want = wrapped(tokens)
        assert torch.equal(again[0], want[0])
        assert torch.equal(again[2], want[2])


def test_a_critic_of_transformers_comes_in(tmp_path: Path) -> None:
    """…ForTokenClassification with one label, which is how critics are trained elsewhere; with two it is no value."""
    config = theirs("llama").config
    config.num_labels = 1
    torch.manual_seed(0)
    transformers.LlamaForTokenClassification(config).save_pretrained(tmp_path / "critic")
    record, _ = run(tmp_path / "critic", tmp_path / "native")
    assert record.validated["error"] <= 1e-5
    run(tmp_path / "native", tmp_path / "back", HUGGINGFACE)
    same_states(tmp_path / "critic", tmp_path / "back")
    config.num_labels = 2
    transformers.LlamaForTokenClassification(config).save_pretrained(tmp_path / "classes")
    with pytest.raises(ConfigError, match="LlamaForTokenClassification has 2 labels, which are classes and no value"):
        run(tmp_path / "classes", tmp_path / "out")


def test_values_that_differ_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits agree, the values do not: each output has its own say."""
    from heads_lightning.conversion.families import value

    folder, *_ = native_run(tmp_path / "run", *VALUE, "head.lm_weight=0.3")
    run(folder, tmp_path / "hf", HUGGINGFACE)
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "hf")
    opened = AutoModelForCausalLMWithValueHead.from_pretrained

    def other(*args: Any, **kwargs: Any) -> Any:
        model = opened(*args, **kwargs)
        with torch.no_grad():
            model.v_head.summary.bias.add_(1e-3 * float(wrapper.v_head.summary.weight.norm()))
        return model

    assert value.V_HEADS
    monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "from_pretrained", other)
    with pytest.raises(ConversionError, match="the values differ by"):
        run(tmp_path / "hf", tmp_path / "native")


def test_a_family_that_has_no_place_for_the_head_says_why(tmp_path: Path) -> None:
    folder, *_ = native_run(tmp_path / "run", *VALUE, "head.hidden_dim=8")
    with pytest.raises(ConfigError, match=r"family=llama cannot express this model: .*scores with one linear layer.*use heads_lightning"):
        run(folder, tmp_path / "out", HUGGINGFACE, family="llama")
    with pytest.raises(ConfigError, match="family=modernbert cannot express this model: head=value has no place there"):
        run(folder, tmp_path / "out", HUGGINGFACE, family="modernbert")


def test_an_imported_value_model_has_trunk_and_head(tmp_path: Path) -> None:
    folder, _, backbone, head = native_run(tmp_path / "run", *VALUE, "head.lm_weight=0.3")
    run(folder, tmp_path / "hf", HUGGINGFACE)
    overrides = ["objective=value", "head=value", "head.lm_weight=1", "backbone=huggingface_import", f"backbone.source={tmp_path / 'hf'}"]
    config = compose([*overrides, "tokenizer=byte", "tokenizer.num_sentinels=0"])
    got_backbone, got_head = build_model(config, TOKENIZER.vocabulary.size)
    said = config.backbone.load_pretrained(got_backbone, got_head)
    assert [line.partition(":")[0] for line in said] == ["backbone", "head"]
    assert "fresh" not in str(said)
    assert all(torch.equal(t, got_backbone.state_dict()[n]) for n, t in backbone.state_dict().items())
    assert all(torch.equal(t, got_head.state_dict()[n]) for n, t in head.state_dict().items())


# ---- how a model was trained to see


def test_a_model_that_sees_both_sides_is_not_written_as_one_that_does_not(tmp_path: Path) -> None:
    """Its weights would fit Llama's names, and every logit would be another."""
    folder, *_ = native_run(tmp_path / "run", "objective=mlm", "head.bias=false")
    with pytest.raises(ConfigError, match="family=llama cannot express this model: it reads bidirectional, LlamaForCausalLM causal"):
        run(folder, tmp_path / "out", HUGGINGFACE, family="llama")
    record, _ = run(folder, tmp_path / "out", HUGGINGFACE)
    assert record.family == "heads_lightning"
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["HeadsLightningForMaskedLM"]


def test_steps_ahead_go_under_our_own_class(tmp_path: Path) -> None:
    folder, *_ = native_run(tmp_path / "run", "objective=multi_token", "objective.steps_ahead=1", "head.steps_ahead=1", "head.bias=false")
    record, _ = run(folder, tmp_path / "out", HUGGINGFACE)
    assert record.family == "heads_lightning"


# ---- BiGS


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_a_run_of_bigs_goes_out_under_published_names_and_comes_back(direction: str, tmp_path: Path) -> None:
    objective = "mlm" if direction == "bidirectional" else "causal"
    head = ["head=mlm", "head.tie_embeddings=true", "head/layer_norm=layer_norm", "head.layer_norm.bias=true", "head.layer_norm.eps=1e-12"]
    options = [f"objective={objective}", "backbone=bigs", f"backbone.direction={direction}", *head]
    folder, _, backbone, _ = native_run(tmp_path / "run", *options, transformer=False)
    record, _ = run(folder, tmp_path / "hf", HUGGINGFACE)
    assert record.family == "BiGS"
    assert "transformers itself has no BiGS: it opens after `import heads_lightning`" in record.notes
    assert "bigs.encoder.layer.1.fs4.kernel.C" in state_of(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "native")
    assert from_yaml(tmp_path / "native/config.yaml").objective.name == objective
    run(tmp_path / "native", tmp_path / "again", HUGGINGFACE)
    same_states(tmp_path / "hf", tmp_path / "again")
    record, _ = run(folder, tmp_path / "half", HUGGINGFACE, dtype="bfloat16")  # a recurrence keeps its digits
    assert record.dtypes == ["bfloat16"]
    name = "bigs.encoder.layer.0.fs4.kernel.A_im"
    assert torch.equal(state_of(tmp_path / "half")[name], backbone.state_dict()["blocks.0.forward_system.A_im"])
    assert state_of(tmp_path / "half")["bigs.encoder.layer.0.dv.weight"].dtype == torch.bfloat16


# ---- types


def test_weights_that_lose_digits_on_the_way_are_compared_with_those_digits(tmp_path: Path) -> None:
    folder, *_ = native_run(tmp_path / "run", "head.bias=false")
    record, _ = run(folder, tmp_path / "hf", HUGGINGFACE, dtype="bfloat16")
    assert record.validated["error"] <= 1e-5
    saved("qwen2", tmp_path / "qwen2")
    record, _ = run(tmp_path / "qwen2", tmp_path / "native", dtype="bfloat16")
    assert record.validated["error"] <= 1e-5


# ---- generate() of our own classes

OURS = {
    "ngpt": (["backbone=ngpt", "head=normalized", "backbone.num_kv_heads=2"], True),
    "transformer": (["head.bias=true", "backbone.local_attention.window=6"], True),
    "learned": (["head.bias=true", "backbone.position=learned"], True),
    "bigs": (["backbone=bigs", "backbone.direction=causal"], False),
}


def opened(kind: str, folder: Path) -> Any:
    """Our class for a run of that kind, with weights large enough that prompts get different answers."""
    overrides, transformer = OURS[kind]
    source, *_ = native_run(folder / "run", *overrides, transformer=transformer)
    run(source, folder / "hf", HUGGINGFACE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    assert type(model) is heads_lightning.conversion.auto.HeadsLightningForCausalLM
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[1] != 2:
                parameter.copy_(torch.randn_like(parameter) * (0.35 if kind != "ngpt" else 1.0))
    return model


@pytest.mark.parametrize("kind", OURS)
def test_decoding_with_a_cache_equals_decoding_without(kind: str, tmp_path: Path) -> None:
    model, tokens = opened(kind, tmp_path), torch.randint(3, 250, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    mask[2, :13] = 0
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        state, pieces = None, []
        for start, end in ((0, 15), (15, 16), (16, 17), (17, 21), *((i, i + 1) for i in range(21, 24))):
            found = model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=state, use_cache=True)
            state = found.past_key_values
            pieces.append(found.logits)
            assert state.get_seq_length() == end
        shown = mask.bool()
        assert (torch.cat(pieces, 1) - whole)[shown].abs().max() <= 1e-5 * whole[shown].abs().max()
        alone = model(tokens[1:2, 7:]).logits
        assert (whole[1:2, 7:] - alone).abs().max() <= 1e-5 * alone.abs().max()
    how: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with_cache, without = model.generate(tokens, **how), model.generate(tokens, use_cache=False, **how)
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache[2:, 13:], model.generate(tokens[2:, 13:], **(how | {"attention_mask": mask[2:, 13:]})))
    assert len({tuple(row) for row in with_cache[:, 24:].tolist()}) == 3
    beams = model.generate(tokens, num_beams=3, **how)
    assert torch.equal(beams, model.generate(tokens, num_beams=3, use_cache=False, **how))
    sizes: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(args[0].tokens_BS.shape[1]))
    model.generate(tokens, **how)
    assert sizes == [24, *[1] * 8]  # one position a step: the cache is used


@pytest.mark.parametrize("kind", ["ngpt", "bigs"])
def test_prompts_padded_on_the_right_are_refused_in_words(kind: str, tmp_path: Path) -> None:
    model, tokens = opened(kind, tmp_path), torch.randint(3, 250, (2, 8))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    for new, cached in ((1, True), (4, True), (4, False)):
        with pytest.raises(ValueError, match="padded on the right cannot be continued; pad on the left"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=new, use_cache=cached, pad_token_id=0)
    with torch.no_grad():
        state = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="padded on the right"):
            model(tokens[:, :1], attention_mask=torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1), past_key_values=state)
        alone = model(tokens[:1, :5]).logits  # to read a padded batch is fine
        assert (model(tokens, attention_mask=mask).logits[:1, :5] - alone).abs().max() <= 1e-5 * alone.abs().max()


# ---- runs whose checkpoints are folders, or hold an average


def test_the_average_of_the_weights_is_what_is_exported(tmp_path: Path) -> None:
    """As everything else that reads a run does (experiment.load)."""
    from heads_lightning.training.checkpoints import newest_checkpoint

    folder, *_ = native_run(tmp_path / "run", "head.bias=false")
    file = newest_checkpoint(folder)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["average"] = {name: tensor + 0.01 for name, tensor in checkpoint["state_dict"].items()}
    torch.save(checkpoint, file)
    run(folder, tmp_path / "out", HUGGINGFACE)
    assert torch.equal(state_of(tmp_path / "out")["model.norm.weight"], checkpoint["average"]["backbone.norm.weight"])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_of_two_ranks_that_wrote_a_folder_is_a_source(tiny: list[str], tmp_path: Path) -> None:
    from test_parallel import FSDP, train_ranks

    from heads_lightning.training.checkpoints import newest_checkpoint, read_checkpoint

    overrides = [*tiny, *FSDP, "trainer.micro_batch_size=2", "trainer.checkpoint_format=distributed", "head.bias=false"]
    train_ranks({tmp_path / "run": [*overrides, "optimizer.average_decay=0.5"]})
    newest = newest_checkpoint(tmp_path / "run")
    assert len(list(newest.glob("*.distcp"))) == 2
    record, _ = run(tmp_path / "run", tmp_path / "hf", HUGGINGFACE)
    assert record.validated["error"] <= 1e-5
    want: dict[str, Tensor] = read_checkpoint(newest)["average"]
    got = state_of(tmp_path / "hf")
    assert torch.equal(got["model.embed_tokens.weight"], want["backbone.embedding.weight"])
    assert torch.equal(got["model.layers.1.mlp.up_proj.weight"], want["backbone.blocks.1.feed_forward.up.weight"])
    assert not torch.equal(want["backbone.embedding.weight"], read_checkpoint(newest)["state_dict"]["backbone.embedding.weight"])
    run(newest, tmp_path / "again", HUGGINGFACE)  # the checkpoint's own folder is a source too
    same_states(tmp_path / "hf", tmp_path / "again")
