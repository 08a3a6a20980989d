"""MIGRATING.md: its Python runs as it stands, its commands on a tiny model, and every override that a table names composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import TINY

from heads_lightning import compose
from heads_lightning.__main__ import main
from heads_lightning.composition.describe import all_fields, groups
from heads_lightning.composition.store import prepare_store

TEXT = (Path(__file__).resolve().parents[1] / "MIGRATING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for kind, code in BLOCKS if kind == "python"]
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]
TITLES = ["OLMo-core", "TRL", "run_clm", "lightning-hydra-template"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the texts that the commands name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "scored"):
        (tmp_path / folder).mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"line {i}\n" * 60)
    record = '{"text": "an answer to question NUMBER, and why", "outcome": 1.0}\n'
    (tmp_path / "scored" / "records.jsonl").write_text("".join(record.replace("NUMBER", str(i)) for i in range(200)))


def test_each_of_the_four_has_a_table_and_a_block() -> None:
    sections = TEXT.split("\n## ")[1:]
    assert len(sections) == len(TITLES)
    for title, section in zip(TITLES, sections, strict=True):
        assert title in section.split("\n")[0]
        assert "| --- | --- |" in section
        assert "```" in section


@pytest.mark.parametrize("code", PYTHON, ids=[code.splitlines()[-1][:40] for code in PYTHON])
def test_python_runs_as_it_stands(code: str) -> None:
    exec(compile(code, "MIGRATING.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command: str) -> None:
    program, name, *words = shlex.split(command)
    assert (program, name) == ("heads-lightning", "train")
    assert compose([word.split(",")[0] for word in words if word != "-m"]).name


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[2:]
    given = {word.split("=")[0] for word in words}
    proof = "experiment=fim_proof" in words
    tiny = [o for o in TINY if o.split("=")[0] not in given and not (proof and o.startswith(("data", "tokenizer")))]
    tiny = [o for o in tiny if not (o.startswith(("data.root", "data.include")) and "data" in given)]
    tiny = [o for o in tiny if not (o == "tracking=none" and "+tracking.tags.team" in given)]
    tiny += ["data.num_documents=500"] if proof else []
    where = "hydra.sweep.dir" if "-m" in words else "hydra.run.dir"
    assert main(["train", *words, *tiny, f"{where}={tmp_path}/done"]) == 0
    runs = list((tmp_path / "done").rglob("metrics.jsonl"))
    assert any("val/loss" in run.read_text() for run in runs)


def test_settings_named_in_the_tables_exist() -> None:
    prepare_store()
    known = {field.partition("=")[0] for field in all_fields()}
    right = [cell for row in re.findall(r"^\|.*\|.*\|$", TEXT, flags=re.MULTILINE) for cell in row.split("|")[2:3]]
    named = {name for cell in right for name in re.findall(rf"\b((?:{'|'.join(groups())})\.\w+)", cell)}
    assert len(named) > 15
    assert not {name for name in named if name not in known}, sorted(known)[:20]
