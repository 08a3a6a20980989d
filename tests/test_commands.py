"""Every command alike: help with two examples, exit codes, --quiet, --json; no traceback for a user's mistake unless one is asked for."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import heads_lightning.__main__ as program
from heads_lightning.commands.arguments import read
from heads_lightning.commands.dispatch import COMMANDS, EXIT_CODES, HYDRA_COMMANDS, READS_OVERRIDES, available
from heads_lightning.composition import compose
from heads_lightning.configs.requests import PlanRequest

MISTAKES = {
    "train": "objectiv=fim", "evaluate": "checkpoint=no/such/run", "generate": "checkpoint=no/such/run -- x",
    "infill": "checkpoint=no/such/run -- a b", "prepare": "data=no_such", "check": "objectiv=fim", "list": "hed", "config": "objectiv=fim",
    "schema": "hed", "new": "hed mine", "convert": "from=no/such/run out=there", "compare": "no/such/run", "ui": "run_root=no/such/folder",
    "runs": "run_root=no/such/folder",
}  # fmt: skip
"""A mistake of each command that only the command itself can find."""
AS_JSON = {"list": "list head --json", "config": "config objective=mlm head=mlm --json", "schema": "schema head",
           "check": "check --config-only --json", "runs": "runs run_root=runs --json", "compare": "compare RUN RUN --json"}  # fmt: skip
"""Commands whose output is data and that need no model; those of a model are in test_end_to_end.py."""
COMMAND = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    code = program.main(shlex.split(line))
    return code, *capsys.readouterr()


def test_every_command_is_there() -> None:
    assert available() == COMMANDS
    assert set(MISTAKES) == set(COMMANDS)


@COMMAND
def test_help_has_two_examples_of_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, f"{name} --help")
    examples = out.split("examples:\n")[1].splitlines()
    assert (code, err, len(examples)) == (0, "", 2)
    assert all(line.startswith(f"  heads-lightning {name}") for line in examples)
    assert len(set(examples)) == 2


@COMMAND
def test_the_examples_of_the_help_are_understood(name: str) -> None:
    """Every argument that an example shows exists; the commands themselves are run by other tests."""
    for example in COMMANDS[name].examples:
        words = shlex.split(example)[1:]
        if name in READS_OVERRIDES:
            choices = [word.split(",")[0] for word in words if "=" in word and not word.startswith("-")]
            if name == "check":
                own = {field.name for field in fields(PlanRequest)}
                choices = [word for word in choices if word.partition("=")[0] not in own]
            assert compose(choices).name
        elif "=" in example and name not in ("list", "new"):
            from importlib import import_module

            module = import_module(f"heads_lightning.commands.{COMMANDS[name].target.split(':')[0]}")
            runs = [word for word in words if "=" not in word and word != "--" and not word.startswith("-")] if name == "compare" else []
            read(module.Arguments, [word for word in words if word not in (*runs, "--reap")])


@COMMAND
def test_a_mistake_is_one_line_and_code_2(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = answer(capsys, f"{name} {MISTAKES[name]}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("heads-lightning: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    assert answer(capsys, f"{name} {MISTAKES[name]}".replace(name, f"{name} --quiet", 1)) == (2, "", err)


@COMMAND
def test_the_full_error_is_shown_when_it_is_asked_for(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HYDRA_FULL_ERROR=1, which the program reads when it starts."""
    monkeypatch.setattr(program, "USER_WANTS_TRACEBACK", True)
    code, _, err = answer(capsys, f"{name} {MISTAKES[name]}")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("heads-lightning: ")


@COMMAND
def test_an_unknown_flag_is_one_line_and_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, f"{name} --jsn")
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = answer(capsys, "--help")
    assert all(f"{code} {meaning}" in out for code, meaning in EXIT_CODES.items())
    assert sorted(EXIT_CODES) == [0, 1, 2, 130, 143]


@pytest.mark.parametrize("name", AS_JSON)
def test_data_is_printed_as_json(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, loss in enumerate((1.5, 1.25)):
        write_run(tmp_path / "runs" / "fim" / str(number), {"left_to_right_bits_per_byte": loss, "protocol": "p"})
    line = AS_JSON[name].replace("RUN RUN", "runs/fim/0 runs/fim/1")
    code, out, err = answer(capsys, line)
    assert (code, err) == (0, "")
    assert json.loads(out)
    assert answer(capsys, f"{line} --quiet") == (0, "", "")


def test_a_comparison_is_a_page_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number, loss in enumerate((1.5, 1.25)):
        write_run(tmp_path / str(number), {"left_to_right_bits_per_byte": loss, "protocol": "p"}, rate=number)
    assert answer(capsys, "compare 0 1 html=both.html")[0] == 0
    page = Path("both.html").read_text()
    assert page.count("<polyline") == 2  # a held-out curve for each run
    assert page.index("1.2500") < page.index("1.5000")
    assert "objective.rate" in page
    assert "seed" not in page  # which is the same in both
    assert "http" not in page
    code, _, err = answer(capsys, "compare 0 1 html=no/such/folder/both.html")
    assert (code, err.count("\n")) == (2, 1)


def write_run(folder: Path, report: dict[str, Any], *, rate: int = 0) -> None:
    """What a run leaves that was evaluated."""
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": {"name": "fim", "rate": rate}, "seed": 0}))
    (folder / "tracking.jsonl").write_text(json.dumps({"kind": "open", "time": 1.0, "name": "fim", "pid": 1}) + "\n")
    points = [{"step": step, "tokens": step, "time": 1.0, "values": {"val/loss": 3.0 / step}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def test_texts_after_two_dashes_are_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "infill checkpoint=no/such/run -- --help --quiet")
    assert (code, out) == (2, "")
    assert "no/such/run" in err


def test_hydra_commands_are_of_the_registry() -> None:
    assert set(HYDRA_COMMANDS) < set(COMMANDS)


def test_a_flag_or_a_run_that_is_nearly_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/fim/monday").mkdir(parents=True)
    Path("runs/fim/monday/tracking.jsonl").touch()
    for line, meant in {
        "runs --reep": "--reap",
        "ui --prot": "--port",
        "compare runs/fim/munday runs/fim/monday": "runs/fim/monday",
    }.items():
        code, _, err = answer(capsys, line)
        assert (code, err.count("\n")) == (2, 1)
        assert err.endswith(f"Did you mean {meant!r}?\n"), err
