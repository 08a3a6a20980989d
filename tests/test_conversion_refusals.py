"""What must stop a conversion, and what streaming must not leave behind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_folders import HUGGINGFACE, changed, run, saved, state_of
from safetensors.torch import load_file, save_file

from heads_lightning.commands import dispatch
from heads_lightning.configs.requests import ConvertRequest
from heads_lightning.conversion import ConversionError, streaming
from heads_lightning.conversion.families import FAMILIES
from heads_lightning.conversion.sources import ALLOWED, open_weights
from heads_lightning.registry import ConfigError

# ---- what must stop a conversion


def refused(source: Path, out: Path, message: str, error: type[Exception] = ConversionError, **fields: Any) -> None:
    with pytest.raises(error, match=message):
        run(source, out, **fields)
    assert not out.exists()


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


class Lookup:
    def __reduce__(self) -> Any:
        return (getattr, (Path, "touch"))


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
    (folder / ".metadata").write_bytes(pickle.dumps(Lookup()))
    refused(folder, tmp_path / "out", "asks for 'touch' of .* which is not part of one; it is not read", ConfigError)
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
