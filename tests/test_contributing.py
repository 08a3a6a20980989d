"""CONTRIBUTING.md does what it says: its files are written, its checks called, its commands run, in a folder beside a copy of the package.

A fenced block that starts with a path is a file; a `bash` block is commands. Runs are made tiny by overrides; nothing else is changed. All
of it happens in one process of its own, since importing Lightning is most of the cost.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
NAMED = [code.removeprefix("# ").split("\n", 1) for kind, code in BLOCKS if kind in ("python", "yaml")]
FILES = dict(NAMED)
LINES = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
COMMANDS = [line for line in LINES if not line.startswith("export ")]
EXPORTED = dict(line.removeprefix("export ").split("=", 1) for line in LINES if line.startswith("export "))
ENUM = "heads_lightning/configs/head.py, in LMLossImplementation"
"""The one block that is a part of a file."""
CHECKS = [path for path in FILES if path.startswith("tests/")]

DRIVER = """
import importlib, json, sys, traceback, warnings
from pathlib import Path

import torch

torch.set_num_threads(1)
commands, checks = json.loads(Path("todo.json").read_text())
from heads_lightning.__main__ main
results = {}
for name, argv in commands.items():
    sys.argv = ["heads-lightning", *argv]
    results[name] = str(main(argv))
for path in checks:
    module = importlib.import_module(Path(path).stem)
    try:
        for function in [value for key, value in vars(module).items() if key.startswith("test_")]:
            function()
        results[path] = "0"
    except Exception:
        results[path] = traceback.format_exc()
Path("results.json").write_text(json.dumps(results))
""".replace("__main__ main", "__main__ import main")


def arguments(command: str, run_dir: Path) -> list[str]:
    """The words after `heads-lightning`; a run is tiny, and its folder known."""
    program, *words = shlex.split(command)
    assert program == "heads-lightning", f"CONTRIBUTING.md shows {command!r} as safe to run; this test runs heads-lightning alone"
    if words[0] != "train" or "--cfg" in words:
        return words
    given = {word.split("=")[0] for word in words}
    tiny = [word for word in TINY if word.split("=")[0] not in given]
    if "backbone=min_gru" in words:
        tiny.remove("backbone.num_heads=2")
    where = ["hydra.sweep.dir" if "-m" in words else "hydra.run.dir", "run_root"]
    return [*words, *tiny, f"{where[0]}={run_dir}", f"run_root={run_dir.parent / 'runs'}"]


def run_dir_of(folder: Path, command: str) -> Path:
    return folder / f"run{COMMANDS.index(command)}"


def write_package(folder: Path) -> None:
    """A copy of the package and of conf/, with the loss implementation of the walkthrough."""
    for package in ("heads_lightning", "hydra_plugins"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", folder / "conf")
    config = folder / "heads_lightning/configs/head.py"
    last = '    auto = "auto"\n'
    assert config.read_text().count(last) == 1
    config.write_text(config.read_text().replace(last, FILES[ENUM] + last))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(folder, what each command and check answered, everything printed)."""
    folder = tmp_path_factory.mktemp("contributing")
    write_package(folder / "checkout")
    for path, code in FILES.items():
        if path != ENUM:
            target = folder / ("checkout" if path.startswith("heads_lightning/") else "") / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code, encoding="utf-8")
    commands = {command: arguments(command, run_dir_of(folder, command)) for command in COMMANDS}
    (folder / "todo.json").write_text(json.dumps([commands, CHECKS]))
    (folder / "driver.py").write_text(DRIVER)
    paths = os.pathsep.join(str(folder / name) for name in ("checkout", ".", "tests"))
    environment = {**os.environ, **EXPORTED, "PYTHONPATH": paths, "HEADS_LIGHTNING_STRICT_PLUGINS": "1"}
    process = subprocess.run(
        [sys.executable, "driver.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    printed = process.stdout + process.stderr
    assert (folder / "results.json").is_file(), printed
    return folder, json.loads((folder / "results.json").read_text()), printed


def test_every_walkthrough_is_there() -> None:
    assert EXPORTED == {"HEADS_LIGHTNING_PLUGINS": "my_parts"}
    assert len(FILES) == len(NAMED), "two blocks are named alike"
    for title, check in (("head", "low_rank"), ("objective", "reverse"), ("backbone", "min_gru"), ("loss implementation", "checkpointed")):
        section = TEXT.split(f"\n## Add a{'n' * (title[0] == 'o')} {title}\n")[1].split("\n## ")[0]
        assert f"# tests/test_{check}.py" in section
        assert "heads-lightning train " in section


@pytest.mark.parametrize("path", CHECKS)
def test_the_walkthroughs_part_keeps_its_contract(path: str, done: tuple[Path, dict[str, Any], str]) -> None:
    assert done[1][path] == "0", done[1][path]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_shown_works(command: str, done: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, printed = done
    assert results[command] == "0", printed[-6000:]
    if " train " not in command or "--cfg" in command:
        return
    sweep = " -m " in command
    runs = sorted(path.parent for path in run_dir_of(folder, command).glob("*/metrics.jsonl" if sweep else "metrics.jsonl"))
    assert len(runs) == (2 if sweep else 1)
    for run in runs:
        losses = [
            value for row in (run / "metrics.jsonl").read_text().splitlines() for value in [json.loads(row)["values"].get("val/loss")]
        ]
        assert [loss for loss in losses if loss is not None and 0 < loss < 20], losses
        config = yaml.safe_load((run / "config.yaml").read_text())
        for group in ("head", "objective", "backbone"):
            chosen = re.search(rf"\b{group}=(\w+)", command)
            assert chosen is None or config[group]["name"] == chosen[1]


def test_each_direction_of_the_objective_is_reported(done: tuple[Path, dict[str, Any], str]) -> None:
    command = next(command for command in COMMANDS if "train objective=reverse" in command and "--cfg" not in command)
    metrics = (run_dir_of(done[0], command) / "metrics.jsonl").read_text()
    assert "val/loss_forward" in metrics
    assert "val/loss_backward" in metrics


def test_options_of_plugins_and_files_are_listed(done: tuple[Path, dict[str, Any], str]) -> None:
    for said in (
        "A projection of low rank",
        "plugin my_parts.low_rank (HEADS_LIGHTNING_PLUGINS)",
        "a recurrent net that trains in parallel",
        "d_model: 512",
    ):
        assert said in done[2], said


def test_files_that_are_named_exist() -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    named = {name for name in re.findall(r"`([\w/.]+\.(?:py|md|toml))`", prose) if name not in ("analysis.py", "README.md", "utils.py")}
    assert named
    missing = [
        name for name in named if not any((base / name).is_file() for base in (ROOT, ROOT / "heads_lightning")) and "NAME" not in name
    ]
    missing = [name for name in missing if "GROUP" not in name]
    assert not missing
