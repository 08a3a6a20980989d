"""`heads-lightning new`: what it writes passes the contract checks and trains, as it is, under another name than the walkthrough's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from heads_lightning.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"head": "my_head", "objective": "turned_round", "backbone": "small_net"}
DRIVER = """
import importlib, runpy, sys, torch
torch.set_num_threads(1)
from heads_lightning.__main__ import main
for name in sys.argv[1].split(","):
    for function in [value for key, value in runpy.run_path(f"tests/test_{name}.py").items() if key.startswith("test_")]:
        function()
code = main(sys.argv[2:])
print("CODE", code)
"""


def run(folder: Path, names: list[str], arguments: list[str], environment: dict[str, str]) -> None:
    """The tests that were written, and one training run, in a process that knows the new parts."""
    command = [sys.executable, "-c", DRIVER, ",".join(names), *arguments]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert "CODE 0" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def tiny(folder: Path, *changes: str) -> list[str]:
    """A run of two steps in `folder`."""
    return ["train", *[o for o in TINY if not o.startswith("backbone.")], "trainer.max_steps=2", *changes, f"run_root={folder / 'runs'}"]


def test_the_parts_of_a_new_plugin_work_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, name in PARTS.items():
        assert main(["new", kind, name, "package=my_lab"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "export PYTHONPATH=. HEADS_LIGHTNING_PLUGINS=my_lab" in said
    written = "\n".join(path.read_text() for path in tmp_path.rglob("*.py"))
    assert not [old for old in ("my_parts", "low_rank", "LowRank", "min_gru", "MinGRU", "ReverseConfig", "checkpointed") if old in written]
    overrides = [f"{kind}={name}" for kind, name in PARTS.items()]
    environment = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "HEADS_LIGHTNING_PLUGINS": "my_lab",
        "HEADS_LIGHTNING_STRICT_PLUGINS": "1",
    }
    run(tmp_path, list(PARTS.values()), tiny(tmp_path, *overrides, "backbone.d_model=32", "backbone.num_layers=2"), environment)
    assert list((tmp_path / "runs").glob("turned_round-my_head-small_net/*/summary.txt"))


@pytest.mark.slow
def test_a_new_loss_joins_the_enum_of_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "loss", "my_loss"]) == 2
    assert "run `new loss my_loss` in a clone of the project" in capsys.readouterr().err
    shutil.copytree(ROOT / "heads_lightning", tmp_path / "heads_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    assert main(["new", "loss", "my_loss"]) == 0, capsys.readouterr().err
    where = {"PYTHONPATH": str(tmp_path)}
    run(tmp_path, ["my_loss"], tiny(tmp_path, "head.loss_implementation=my_loss", "backbone.d_model=32", "backbone.num_layers=1"), where)


@pytest.mark.slow
def test_a_new_study_runs_and_makes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "study", "fim_or_not"]) == 0
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])[1:]
    changes = ["seed=0", "backbone.d_model=32", "backbone.num_layers=1", "hydra.sweep.dir=swept"]
    assert main([*command, *tiny(tmp_path, *changes)[1:]]) == 0, capsys.readouterr().err
    table = subprocess.run([sys.executable, "experiments/fim_or_not/analysis.py", "swept"], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout.splitlines()  # fmt: skip
    assert [row.split(" | ")[0] for row in table[2:]] == ["| causal", "| fim"]
    assert all(float(row.split("|")[3]) > 0 for row in table[2:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "new takes a kind and a name, e.g. new head my_head. Kinds: head, objective, backbone, loss, study"),
        (["haed", "x"], "Did you mean 'head'?"),
        (["objective"], "a kind and a name, e.g. new objective my_objective. Kinds"),
        (["head", "x", "--pakage"], "Did you mean '--package'?"),
        (["head", "My-Head"], "NAME=My-Head cannot name a module"),
        (["head", "normalized"], "head=normalized exists already"),
        (["head", "x", "pakage=y"], "pakage does not exist. Did you mean package?"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "head", "mine"]) == 0
    kept = (tmp_path / "my_parts/mine.py").read_text()
    capsys.readouterr()
    assert main(["new", "head", "mine"]) == 2
    assert "my_parts/mine.py exists already" in capsys.readouterr().err
    assert (tmp_path / "my_parts/mine.py").read_text() == kept
