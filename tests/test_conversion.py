"""Conversion there and back, and `backbone=huggingface_import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_models import VOCAB, theirs
from converted_folders import HUGGINGFACE, TOKENIZER, run, saved, state_of

from heads_lightning.batch import Attention
from heads_lightning.commands import dispatch
from heads_lightning.composition import compose, to_yaml
from heads_lightning.conversion.families import FAMILIES
from heads_lightning.experiment import build_model, load, tokenizer_files
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import KEY, AtomicCheckpointIO, checkpoint_path

pytestmark = pytest.mark.usefixtures("one_thread")


def native_run(folder: Path, *overrides: str, transformer: bool = True) -> tuple[Path, Any, Any, Any]:
    """A run folder with one checkpoint, as training writes it: (folder, config, backbone, head)."""
    sizes = ["backbone.d_model=32", "backbone.num_layers=2", *(["backbone.num_heads=4"] if transformer else ["backbone.state_size=8"])]
    config = compose(["tokenizer=byte", "tokenizer.num_sentinels=0", *sizes, *overrides])
    backbone, head = build_model(config, TOKENIZER.vocabulary.size)
    state = {f"{p}.{n}": t for p, m in (("backbone", backbone), ("head", head)) for n, t in m.state_dict().items()}
    record = {"config": to_yaml(config), "tokenizer": tokenizer_files(TOKENIZER)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "global_step": 7, KEY: record}, checkpoint_path(folder, 7))
    return folder, config, backbone.eval(), head.eval()


# ---- there and back


@pytest.mark.parametrize("case", ["llama-tied-biases", "gpt2", "bert", "modernbert", "qwen2-windows", "t5", "t5-v1.1"])
def test_a_folder_goes_to_native_and_back_to_the_bit(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "hf")
    record, _ = run(tmp_path / "hf", tmp_path / "native", shard_gb=20e3 / 2**30)
    assert record.validated["error"] <= 1e-5
    assert json.loads((tmp_path / "native/conversion.json").read_text())["validated"]["method"] == "logits"
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 1
    back, _ = run(tmp_path / "native", tmp_path / "back", HUGGINGFACE)
    assert back.family == model.config.model_type
    want, got = state_of(tmp_path / "hf"), state_of(tmp_path / "back")
    assert want.keys() - set(record.left_out) == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in got)
    opener = getattr(transformers, FAMILIES[back.family].auto_class)
    again, info = opener.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert (again.config.eos_token_id, again.config.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)
    tokens = torch.randint(3, VOCAB, (2, 20))
    given = {"decoder_input_ids": tokens} if "t5" in case else {}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens, **given).logits, model(tokens, **given).logits, rtol=0, atol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("def f():")["input_ids"] == TOKENIZER.encode("def f():").tolist()


def test_a_run_becomes_a_folder_that_transformers_opens_and_generates_from(tmp_path: Path) -> None:
    folder, _, backbone, head = native_run(tmp_path / "run", "head.bias=false", "backbone.num_kv_heads=2")
    record, _ = run(folder, tmp_path / "out", HUGGINGFACE)
    assert (record.family, record.dtypes) == ("llama", ["float32"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    prompt = TOKENIZER.encode("hello ")
    ours = generate(backbone, head, [prompt.tolist()], max_new_tokens=12, stop_ids=[TOKENIZER.vocabulary.end_of_document])[0]
    out = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    assert out[: len(ours)] == ours
    assert model.generation_config.eos_token_id == TOKENIZER.vocabulary.end_of_document


@pytest.mark.parametrize(
    ("overrides", "opener"),
    [
        (["backbone=ngpt", "head=normalized"], "AutoModelForCausalLM"),
        (["head.logit_softcap=5.0"], "AutoModelForCausalLM"),
        (["objective=mlm", "head=mlm"], "AutoModelForMaskedLM"),
    ],
)
def test_what_transformers_cannot_express_goes_under_our_own_classes_and_says_so(
    overrides: list[str], opener: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, backbone, head = native_run(tmp_path / "run", *overrides)
    code = dispatch.run(["convert", f"from={folder}", "to=huggingface", f"out={tmp_path / 'out'}"])
    assert code == 0
    assert (
        "no architecture of transformers expresses this model: it opens after `import heads_lightning.conversion.auto`"
        in capsys.readouterr().out
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "heads_lightning"
    assert "auto_map" not in config
    import heads_lightning.conversion.auto  # noqa: F401

    model = getattr(transformers, opener).from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 256, (2, 16))
    from heads_lightning.batch import Batch

    with torch.no_grad():
        attention = Attention.bidirectional if "Masked" in opener else Attention.causal
        want = head(backbone(Batch(tokens, tokens, attention, 0, 0)))
        torch.testing.assert_close(model(tokens).logits, want, rtol=0, atol=0)
        assert model(tokens, labels=tokens).loss.isfinite()
    model.save_pretrained(tmp_path / "again")
    run(tmp_path / "again", tmp_path / "native")
    assert all(torch.equal(state_of(tmp_path / "native")[n], t) for n, t in state_of(tmp_path / "out").items())


def test_a_native_folder_is_read_by_generate(tmp_path: Path) -> None:
    folder, config, backbone, head = native_run(tmp_path / "run", "head.bias=false")
    run(folder, tmp_path / "hf", HUGGINGFACE)
    run(tmp_path / "hf", tmp_path / "native")
    model = load(str(tmp_path / "native"))
    prompt = [TOKENIZER.encode("abc").tolist()]
    assert generate(model.backbone, model.head, prompt, max_new_tokens=8, stop_ids=[]) == generate(
        backbone, head, prompt, max_new_tokens=8, stop_ids=[]
    )
    assert model.config.backbone.d_model == config.backbone.d_model
    assert dispatch.run(["generate", f"checkpoint={tmp_path / 'native'}", "max_new_tokens=3", "--", "abc"]) == 0


def test_padding_of_the_vocabulary_is_cut_only_when_asked(tmp_path: Path) -> None:
    for case in ("llama", "llama-tied-biases"):
        saved(case, tmp_path / case)
        run(tmp_path / case, tmp_path / f"{case}-whole")
        assert len(state_of(tmp_path / f"{case}-whole")["backbone.embedding.weight"]) == VOCAB
        record, _ = run(tmp_path / case, tmp_path / f"{case}-cut", vocab_size=90)
        assert record.validated["error"] <= 1e-5
        cut = state_of(tmp_path / f"{case}-cut")
        assert len(cut["backbone.embedding.weight"]) == 90
        run(tmp_path / f"{case}-cut", tmp_path / f"{case}-back", HUGGINGFACE)
        assert json.loads((tmp_path / f"{case}-back/config.json").read_text())["vocab_size"] == 90
        record, _ = run(tmp_path / f"{case}-whole", tmp_path / f"{case}-out", HUGGINGFACE, vocab_size=80)
        assert len(state_of(tmp_path / f"{case}-out")["model.embed_tokens.weight"]) == 80
    with pytest.raises(ConfigError, match="vocab_size=200 is more than the 97 rows"):
        run(tmp_path / "llama", tmp_path / "more", vocab_size=200)


def test_types_are_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = theirs("llama").bfloat16()
    model.save_pretrained(tmp_path / "hf")
    record, _ = run(tmp_path / "hf", tmp_path / "native")
    assert record.dtypes == ["bfloat16"]
    assert record.validated["error"] <= 1e-5
    ours, others = record.validated["half"]
    assert 0 < ours <= 2 * others + 1e-5
    record, _ = run(tmp_path / "hf", tmp_path / "wide", dtype="float32")
    assert record.dtypes == ["float32"]
    record, _ = run(tmp_path / "wide", tmp_path / "again", HUGGINGFACE, dtype="bfloat16")
    assert all(torch.equal(tensor, state_of(tmp_path / "hf")[name]) for name, tensor in state_of(tmp_path / "again").items())


@pytest.mark.parametrize("early", [False, True], ids=["", "written by Python 3.11.2"])
def test_a_distributed_checkpoint_is_a_source(tmp_path: Path, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if early:
        monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    folder, config, backbone, head = native_run(tmp_path / "run", "head.bias=false")
    state = {f"state_dict.{p}.{n}": t for p, m in (("backbone", backbone), ("head", head)) for n, t in m.state_dict().items()}
    dcp.save(state | {"optimizer_states.0.step": torch.ones(3), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp/config.yaml").write_text(to_yaml(config))
    record, _ = run(tmp_path / "dcp", tmp_path / "out", HUGGINGFACE)
    assert record.validated["error"] <= 1e-5
    run(folder, tmp_path / "plain", HUGGINGFACE)
    assert all(torch.equal(t, state_of(tmp_path / "plain")[n]) for n, t in state_of(tmp_path / "out").items())
