"""Twenty more mistakes of a new user: each ends in one line that names what was given and what works, and leaves what was there."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from conftest import TINY

from heads_lightning.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a new user: a run, a damaged copy of it, and files that are no runs."""
    folder = tmp_path_factory.mktemp("new_user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("empty", "one", "conf/experiment"):
            Path(name).mkdir(parents=True)
        Path("one/a.py").write_text("x = 1\n" * 50)
        Path("binary").write_bytes(b"\xff\xfe\x00")
        Path("conf/experiment/bad.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: many\n")
        assert main(["train", *TINY, "hydra.run.dir=runs/fim/good"]) == 0
        shutil.copytree("runs/fim/good", "runs/fim/damaged")
        for checkpoint in Path("runs/fim/damaged/checkpoints").glob("*.ckpt"):
            checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    return folder


def tiny(*given: str) -> list[str]:
    """TINY with some of it given otherwise."""
    keys = {override.split("=")[0] for override in given}
    return [*(override for override in TINY if override.split("=")[0] not in keys), *given]


ASK = ["infill", "max_new_tokens=2"]
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "list of wrong types": (["train", "optimizer.betas=[a,b]"], ["optimizer.betas=[a,b]", "optimizer.betas takes"]),
    "a value for a group": (["train", "objective=0.5"], ["objective=0.5", "chosen by name"]),
    "an option as a key": (["train", "fim=true"], ["fim does not exist"]),
    "no equals sign": (["train", "objective", "mlm"], ["`objective` has no value", "objective=VALUE"]),
    "space around equals": (["train", "objective", "=", "mlm"], ["objective"]),
    "a field of a number": (["train", "seed.value=3"], ["seed.value=3"]),
    "a setting as a flag": (["train", "--objective=mlm"], ["--objective is not a flag", "objective=VALUE"]),
    "empty data folder": (["train", *tiny("data.root=empty")], ["empty"]),
    "one small file": (["train", *tiny("data.root=one", "data.include=[*.py]")], ["one document", "name a folder"]),
    "sequences beyond the positions": (["train", *tiny("backbone.position=learned", "backbone.max_positions=16")], ["max_positions"]),
    "a folder that is no run": ([*ASK, "checkpoint=one", "--", "a", "b"], ["one holds no checkpoint"]),
    "another word for checkpoint": ([*ASK, "run=runs/fim/good", "--", "a", "b"], ["run does not exist", "Did you mean checkpoint?"]),
    "a file that is no checkpoint": ([*ASK, "checkpoint=one/a.py", "--", "a", "b"], ["one/a.py is damaged or not a checkpoint (no"]),
    "a damaged checkpoint": ([*ASK, "checkpoint=runs/fim/damaged", "--", "a", "b"], ["is damaged", "use the one before it"]),
    "a bad cell": (["train", "-m", "objective=causal,mln"], ["objective=mln does not exist", "objective=mlm"]),
    "a bad value in a cell": (["train", "-m", *tiny("optimizer.learning_rate=1e-3,abc")], ["optimizer.learning_rate=abc"]),
    "nothing to resume": (["train", "resume=nowhere"], ["nowhere is not a run folder"]),
    "a folder that holds a run": (["train", *tiny("hydra.run.dir=runs/fim/good")], ["holds a run already", "resume="]),
    "resume with another backbone": (["train", "resume=runs/fim/good", "backbone.d_model=64"], ["backbone.d_model=32", "leave out"]),
    "a text that is not there": ([*ASK, "checkpoint=runs/fim/good", "prefix_file=none"], ["prefix_file=none cannot be read"]),
    "a text that is not text": ([*ASK, "checkpoint=runs/fim/good", "prefix_file=binary"], ["prefix_file=binary is not UTF-8"]),
    "a device that is not there": ([*ASK, "checkpoint=runs/fim/good", "device=gpu", "--", "a", "b"], ["gpu is no device", "device=cpu"]),
    "a run without numbers": (["compare", "runs/fim/good"], ["evaluate it first"]),
    "a port that cannot be": (["ui", "port=99999"], ["port=99999", "1 to 65535"]),
    "a folder as a store": (["train", "tracking.uri=mlruns"], ["tracking.uri=sqlite:///mlruns/mlflow.db"]),
    "a recipe with a wrong type": (["train", "--config-dir", "conf", "experiment=bad"], ["experiment/bad.yaml", "whole number"]),
    "a folder of recipes that is not there": (["train", "--config-dir", "nope"], ["--config-dir nope"]),
    "a run folder that is a file": (["train", *tiny("hydra.run.dir=binary")], ["binary"]),
    "a run root that is a file": (["train", *tiny("run_root=binary")], ["binary"]),
    "a cache that cannot be written": (["train", *tiny("data.cache_dir=/dev/full/x")], ["/dev/full/x", "cache_dir=FOLDER"]),
}  # fmt: skip
"""Command, and what its one line must say: what was given, and what works."""


@pytest.mark.parametrize("title", MISTAKES)
def test_a_mistake_ends_in_one_line(title: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if "data" not in path.parts}
    command, said = MISTAKES[title]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert all(text in err for text in said), err
    assert {path for path in folder.rglob("*") if "data" not in path.parts} >= before


def test_what_looks_like_a_mistake_and_is_none(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that no training text had, and a server that is down when the run starts: both work, with a warning at most."""
    monkeypatch.chdir(folder)
    assert main([*ASK, "checkpoint=runs/fim/good", "--", "你好 \U0001f600", "\x00"]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    down = [override for override in TINY if override != "tracking=none"]
    down += [f"tracking.uri=http://127.0.0.1:{port}", "tracking.exit_seconds=0.5", "hydra.run.dir=runs/fim/untracked"]
    assert main(["train", *down]) == 0
    capsys.readouterr()
    assert main(["train", "resume=runs/fim/good"]) == 0  # a run that is done
    assert "has done its 4 steps already; to go on: trainer.max_steps=8" in capsys.readouterr().out
    assert Path("runs/fim/untracked/summary.txt").is_file()
    assert "Traceback" not in capsys.readouterr().err
