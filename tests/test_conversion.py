"""Whole conversions: folders in, folders out, and everything that must stop one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_models import VOCAB, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor

from heads_lightning.batch import Attention
from heads_lightning.commands import dispatch
from heads_lightning.composition import compose, from_yaml, to_yaml
from heads_lightning.configs.requests import ConvertRequest, ConvertTarget
from heads_lightning.conversion import ConversionError, streaming
from heads_lightning.conversion.convert import Conversion, convert
from heads_lightning.conversion.families import FAMILIES
from heads_lightning.conversion.sources import ALLOWED, open_weights
from heads_lightning.data.tokenizer import byte_tokenizer
from heads_lightning.experiment import build_model, load, tokenizer_files
from heads_lightning.generation import generate
from heads_lightning.registry import ConfigError
from heads_lightning.training.checkpoints import KEY, AtomicCheckpointIO, checkpoint_path

TOKENIZER = byte_tokenizer(num_sentinels=0)
NATIVE, HUGGINGFACE = ConvertTarget.native, ConvertTarget.huggingface


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(source: Path, out: Path, to: ConvertTarget = NATIVE, **fields: Any) -> tuple[Conversion, list[str]]:
    """The record of a conversion and the lines that it said."""
    said: list[str] = []
    return convert(ConvertRequest(from_=str(source), to=to, out=str(out), **fields), say=said.append), said


def saved(case: str, folder: Path, **changes: Any) -> Any:
    """A model of transformers as save_pretrained leaves it, with a tokenizer."""
    model = theirs(case)
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder, max_shard_size="20KB")
    TOKENIZER.save(folder)
    return model


def state_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


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


def test_a_distributed_checkpoint_is_a_source(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder, config, backbone, head = native_run(tmp_path / "run", "head.bias=false")
    state = {f"state_dict.{p}.{n}": t for p, m in (("backbone", backbone), ("head", head)) for n, t in m.state_dict().items()}
    dcp.save(state | {"optimizer_states.0.step": torch.ones(3), "epoch": 3}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp/config.yaml").write_text(to_yaml(config))
    record, _ = run(tmp_path / "dcp", tmp_path / "out", HUGGINGFACE)
    assert record.validated["error"] <= 1e-5
    run(folder, tmp_path / "plain", HUGGINGFACE)
    assert all(torch.equal(t, state_of(tmp_path / "plain")[n]) for n, t in state_of(tmp_path / "out").items())


# ---- what must stop a conversion


def refused(source: Path, out: Path, message: str, error: type[Exception] = ConversionError, **fields: Any) -> None:
    with pytest.raises(error, match=message):
        run(source, out, **fields)
    assert not out.exists()


def changed(folder: Path, change: Any) -> None:
    """Rewrite a folder's weights as one file."""
    state = state_of(folder)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_are_missing_left_over_or_of_another_shape(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "lacks model.layers.1.mlp.up_proj.weight": lambda s: s.pop(name),
        r"correspond to nothing: model\.layers\.7\.mlp\.up_proj\.weight \[48, 32\].*\[layer\] has the bound 3": lambda s: s.update(
            {"model.layers.7.mlp.up_proj.weight": s[name].clone()}
        ),
        r"of another shape: backbone\.blocks\.1\.feed_forward\.up\.weight \[47, 32\] instead of \[48, 32\]": lambda s: s.update(
            {name: s[name][:47]}
        ),
    }
    for i, (message, change) in enumerate(changes.items()):
        saved("llama", tmp_path / str(i))
        changed(tmp_path / str(i), change)
        refused(tmp_path / str(i), tmp_path / "out", message)
        assert not (tmp_path / ".out.partial").exists()


def test_a_right_shaped_tensor_behind_the_wrong_name_is_found_and_named(tmp_path: Path) -> None:
    """All names and shapes fit; only the numbers can tell."""
    from heads_lightning.conversion.families import decoder
    from heads_lightning.conversion.families.llama import Llama

    class Swapped(Llama):
        def templates(self, model: Any) -> Any:
            found = decoder.decoder_templates(model)
            up, gate = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
            layers = [t for t in found if "mlp.up_proj" in str(t.source_template_keys) or "mlp.gate_proj" in str(t.source_template_keys)]
            found = [t for t in found if t not in layers]
            for i in range(3):
                for t in layers:
                    source = str(t.source_template_keys).replace("[layer]", str(i))
                    source = {up: gate, gate: up}.get(source, source)
                    found.append(
                        replace(t, source_template_keys=source, dest_template_keys=str(t.dest_template_keys).replace("[layer]", str(i)))
                    )
            return found

    saved("llama", tmp_path / "hf")
    kept = FAMILIES["llama"]
    FAMILIES["llama"] = Swapped()
    try:
        message = (
            r"the logits differ by .*The first module that drifts is model\.layers\.1\.mlp \(backbone\.blocks\.1\.feed_forward here\), by"
        )
        refused(tmp_path / "hf", tmp_path / "out", message)
        record, _ = run(tmp_path / "hf", tmp_path / "unchecked", validate=False)
    finally:
        FAMILIES["llama"] = kept
    assert record.validated is False
    assert json.loads((tmp_path / "unchecked/conversion.json").read_text())["validated"] is False


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    saved("llama-tied-biases", tmp_path / "hf")
    embedding = "model.embed_tokens.weight"
    changed(tmp_path / "hf", lambda s: s.update({"lm_head.weight": s[embedding].clone()}))
    record, _ = run(tmp_path / "hf", tmp_path / "fine")
    assert record.left_out == {"lm_head.weight": f"the same as {embedding}"}
    changed(tmp_path / "hf", lambda s: s.update({"lm_head.weight": s[embedding] + 1}))
    refused(tmp_path / "hf", tmp_path / "out", f"ties weights that differ: lm_head.weight and {embedding}")


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    saved("bert", tmp_path / "hf")
    extra = {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2)}
    changed(tmp_path / "hf", lambda s: s.update(extra))
    record, _ = run(tmp_path / "hf", tmp_path / "native")
    assert set(extra) <= set(record.left_out)
    assert record.left_out["cls.seq_relationship.bias"] == "the next-sentence head"


def test_damaged_and_incomplete_sources(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    first = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-8])
    refused(tmp_path / "hf", tmp_path / "out", "it is damaged", ConfigError)
    first.write_bytes(b"\xff" * 64)
    refused(tmp_path / "hf", tmp_path / "out", "not a safetensors file", ConfigError)
    first.unlink()
    refused(tmp_path / "hf", tmp_path / "out", f"lacks {first.name}", ConfigError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "holds no checkpoint", ConfigError)
    (tmp_path / "hf/config.json").write_text("{")
    refused(tmp_path / "hf", tmp_path / "out", "is not JSON", ConfigError)


def test_an_existing_target_and_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("llama", tmp_path / "hf")
    with pytest.raises(ConfigError, match="exists already"):
        run(tmp_path / "hf", tmp_path / "hf")
    refused(tmp_path / "hf", tmp_path / "out", "family=qwen2, but .* is of model_type=llama", ConfigError, family="qwen2")
    with pytest.raises(ConfigError, match="dtype=int8 does not exist"):
        ConvertRequest(from_="a", out="b", dtype="int8")
    with pytest.raises(ConfigError, match="from is needed: from=VALUE"):
        dispatch.run(["convert", "out=x"])
    with pytest.raises(ConfigError, match=r"to=elsewhere.*huggingface"):
        dispatch.run(["convert", "from=x", "out=y", "to=elsewhere"])
    assert dispatch.run(["convert", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "  from " in help_text
    assert help_text.count("\n  heads-lightning convert from=") == 2


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    sprung, folder = tmp_path / "sprung", tmp_path / "hf"
    model = saved("llama", folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    record, _ = run(folder, tmp_path / "fine")
    assert record.validated["error"] <= 1e-5
    torch.save({"model.norm.weight": Trap(sprung)}, folder / "pytorch_model.bin")
    refused(folder, tmp_path / "out", "cannot be read as tensors alone", ConfigError)
    (folder / "pytorch_model.bin").unlink()
    dcp.save({"a": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    refused(folder, tmp_path / "out", "which is not part of one; it is not read", ConfigError)
    assert not sprung.exists()
    assert not {"builtins", "os", "posix", "subprocess"} & set(ALLOWED)


def test_remote_code_is_not_reachable(tmp_path: Path) -> None:
    """An auto_map in config.json is not followed, and what we write has none."""
    saved("llama", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (tmp_path / "hf/evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    run(tmp_path / "hf", tmp_path / "native")
    run(tmp_path / "native", tmp_path / "back", HUGGINGFACE)
    assert not (tmp_path / "sprung").exists()
    assert "auto_map" not in json.loads((tmp_path / "back/config.json").read_text())
    assert not (tmp_path / "back/evil.py").exists()


# ---- streaming


def test_a_killed_conversion_leaves_no_folder_and_goes_on(tmp_path: Path) -> None:
    saved("llama", tmp_path / "hf")
    script = (
        "import os, sys\n"
        "from heads_lightning.conversion import streaming\n"
        "from heads_lightning.conversion.convert import convert\n"
        "from heads_lightning.configs.requests import ConvertRequest\n"
        "write, count = streaming._write_shard, [0]\n"
        "def stop(path, *rest):\n"
        "    count[0] += 1\n"
        "    write(path, *rest) if count[0] < 3 else (path.with_suffix('.tmp').write_bytes(b'half'), os._exit(9))\n"
        "streaming._write_shard = stop\n"
        "convert(ConvertRequest(from_=sys.argv[1], to='native', out=sys.argv[2], shard_gb=2e-5, validate=False))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "hf", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.partial").glob("config*"))
    _, said = run(tmp_path / "hf", tmp_path / "out", shard_gb=2e-5)
    assert any("2 shards were there already" in line for line in said)
    run(tmp_path / "hf", tmp_path / "whole", shard_gb=2e-5)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names if n.startswith("model"))


@pytest.mark.parametrize(("case", "dtype"), [("gpt2", None), ("gpt2", "float16"), ("qwen3", "bfloat16")])
def test_tensors_larger_than_a_piece(case: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More pieces than wait for the disk at once, of an odd size: turned, divided, cast or merely copied, the values are the same."""
    saved(case, tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "whole", dtype=dtype)
    monkeypatch.setattr(streaming, "PIECE", 999)
    run(tmp_path / "hf", tmp_path / "pieces", dtype=dtype)
    assert (tmp_path / "pieces/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_noticed() -> None:
    """Though a thread of its own writes: at the next piece, or at the end."""

    def write(pieces: int) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file, streaming.Pipe(file) as pipe:  # pyright: ignore[reportArgumentType]
            for _ in range(pieces):
                pipe.put(pipe.room((4,), torch.float32))

    for pieces in (1, 3 * streaming.AHEAD):
        with pytest.raises(OSError, match="No space left"):
            write(pieces)


def test_shards_of_another_plan_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("llama", tmp_path / "hf")
    monkeypatch.setattr(streaming.Target, "finish", lambda self: None)
    run(tmp_path / "hf", tmp_path / "out", shard_gb=2e-5, validate=False)
    monkeypatch.undo()
    changed(tmp_path / "hf", lambda s: s.update({name: tensor + 1 for name, tensor in s.items()}))
    _, said = run(tmp_path / "hf", tmp_path / "out", shard_gb=2e-5, validate=False)
    assert not any("already" in line for line in said)
    want = load_file(tmp_path / "hf/model.safetensors")["model.norm.weight"]
    assert torch.equal(state_of(tmp_path / "out")["backbone.norm.weight"], want)


def test_files_are_valid_safetensors(tmp_path: Path) -> None:
    """Read by the library itself, odd sizes and types included; what one mapping makes is never divided."""
    state = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.randn(5, 2),
        "c": torch.randn(0, 4),
        "d": torch.tensor(2.0),
        "e": torch.randn(4).half(),
    }
    save_file(state, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())
    from heads_lightning.conversion import StateConverter, StateMappingTemplate

    templates = [StateMappingTemplate(name, f"x.{name}") for name in "acde"] + [StateMappingTemplate("b", ("p", "q"), dest_chunk_dim=1)]
    shards = streaming.plan(StateConverter(templates).get_mappings(source.specs), source, dtype=None, shard_bytes=16)
    target = streaming.Target(tmp_path / "out")
    streaming.stream(shards, source, target)
    target.finish()
    got = state_of(tmp_path / "out")
    assert all(torch.equal(got[f"x.{name}"], state[name]) for name in "acde")
    assert torch.equal(torch.cat((got["p"], got["q"]), 1), state["b"])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"]["p"] == index["weight_map"]["q"]


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
