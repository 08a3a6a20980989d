"""The five names from Python do what their examples show, and refuse what the commands refuse."""

from __future__ import annotations

import doctest
import inspect
from dataclasses import replace
from pathlib import Path

import pytest

import heads_lightning
from heads_lightning import compose, library
from heads_lightning.registry import ConfigError

NAMES = ("compose", "build", "train", "load", "infill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples have run, one after the other."""
    folder = tmp_path_factory.mktemp("library")
    finder = doctest.DocTestFinder(recurse=False)
    tests = {name: finder.find(getattr(heads_lightning, name), name)[0] for name in NAMES}
    assert all(test.examples for test in tests.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runner = doctest.DocTestRunner(verbose=False)
        for name in NAMES:
            said: list[str] = []
            runner.run(tests[name], out=said.append)
            assert not said, "".join(said)
    return folder


def test_the_examples_run(folder: Path) -> None:
    assert (folder / "runs/example/summary.txt").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_typed_and_documented(name: str) -> None:
    function = getattr(heads_lightning, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    documentation = inspect.getdoc(function) or ""
    assert all(f"{parameter}:" in documentation for parameter in signature.parameters)


def test_a_run_goes_on_in_its_own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = heads_lightning.load("runs/example").config
    further = replace(config, resume="runs/example", trainer=replace(config.trainer, max_steps=3))
    with pytest.raises(ConfigError, match="goes on in runs/example, not in run_dir=elsewhere; leave run_dir out"):
        heads_lightning.train(further, run_dir="elsewhere", quiet=True)
    other = replace(further, head=compose(["head=normalized"]).head)
    with pytest.raises(ConfigError, match="was trained with another head than this config has; start from the run's own"):
        heads_lightning.train(other, quiet=True)
    result = heads_lightning.train(further, quiet=True)
    assert result.run_dir == Path("runs/example")
    assert heads_lightning.load(result.run_dir).step == 3


def test_the_folder_of_a_run_is_named_after_it(tmp_path: Path) -> None:
    first, second = (library._new_folder(compose(["name=mine", f"run_root={tmp_path}"])) for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "mine"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -1.0}, "temperature=-1.0 is out of range; it takes 0 or more"), ({"layout": "pms"}, "layout=pms was not trained")],
)
def test_a_mistake_gets_the_line_of_the_command(folder: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        heads_lightning.infill(heads_lightning.load(folder / "runs/example"), "a", "b", **wrong)
