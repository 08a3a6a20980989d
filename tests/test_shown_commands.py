"""Every command and every override that README.md shows exists and composes; those that train do so, on a tiny model, in the slow tier.

The commands of CONTRIBUTING.md and MIGRATING.md are run by their own tests; what is only mentioned there is checked here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import TINY

from heads_lightning import compose
from heads_lightning.__main__ import main
from heads_lightning.commands.dispatch import COMMANDS
from heads_lightning.composition.describe import all_fields, group_options, groups, owners
from heads_lightning.composition.store import prepare_store
from heads_lightning.registry import ConfigError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "MIGRATING.md")}
TRAINED = list(dict.fromkeys(re.findall(r"`heads-lightning (train [^`]*)`", README)))
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…")
EXTRA = {"objective=value": ["head=value"], "objective=mlm": ["head=mlm"], "objective=masked_diffusion": ["head=mlm"],
         "objective=multi_token": ["head.steps_ahead=3"], "objective=span_corruption": ["backbone=t5", "head=t5"],
         "backbone=bigs": ["backbone.direction=causal"], "backbone=t5": ["objective=span_corruption", "head=t5"],
         "head=mlm": ["objective=mlm"],
         "head=value": ["objective=value"], "head=t5": ["objective=span_corruption", "backbone=t5"]}  # fmt: skip
"""What an option needs beside it; the refusal of each alone says so."""

UNKNOWN = "does not exist|is not allowed|belongs to|cannot be read|is out of range"
"""Refusals of the setting itself. Others ask for a partner: a second device, a checkpoint's folder."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_store()


def overrides_of_the_table() -> list[str]:
    """Every `KEY=VALUE` between backticks; a bare word in the table of overrides is another option of the group before it."""
    found: list[str] = []
    for line in README.splitlines():
        group = ""
        for quoted in re.findall(r"`([^`]+)`", line):
            words = [word for word in quoted.split() if not word.startswith("-")]
            if line.startswith("| ") and len(words) == 1 and group and re.fullmatch(r"[a-z_0-9]+", words[0]):
                found.append(f"{group}={words[0]}")
                continue
            shown = [
                word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*=\S+", word) and word.split("=")[0].split(".")[0] in known()
            ]
            found += shown
            group = shown[0].split("=")[0] if shown else group
    return list(dict.fromkeys(found))


def known() -> set[str]:
    prepare_store()
    return {*groups(), *(field.split(".")[0] for field in all_fields())}


SHOWN = overrides_of_the_table()


def test_the_table_is_read() -> None:
    some = {"objective=ul2", "backbone=ngpt", "schedule=inverse_square_root", "trainer.max_steps=1000", "head.loss_implementation=cce"}
    assert some <= set(SHOWN)
    assert len(SHOWN) > 60


@pytest.mark.parametrize("override", SHOWN)
def test_an_override_that_is_shown_exists(override: str) -> None:
    """An option is in its group; a field belongs to an option that takes this value."""
    key, _, value = override.partition("=")
    if PLACEHOLDER.search(value):
        assert key in groups() or key in all_fields()
        return
    if key in groups():
        assert set(value.split(",")) <= group_options(key).keys()
        return
    assert key in all_fields(), override
    group, _, field = key.rpartition(".")
    chosen = [f"{group}={name}" for name in owners(group, field)] if group in groups() else [""]
    refusals = []
    for option in chosen:
        try:
            compose([*filter(None, [option]), *EXTRA.get(option, []), f"{key}={value.split(',')[0]}"])
            return
        except ConfigError as error:
            refusals.append(str(error))
    assert not all(re.search(UNKNOWN, refusal) for refusal in refusals), refusals


@pytest.mark.parametrize("page", PAGES)
def test_a_command_that_is_mentioned_is_one(page: str) -> None:
    lines = re.findall(r"heads-lightning ([a-z]\w*)((?: [^`|\n]*)?)", PAGES[page])
    named = {word for word, _ in lines}
    assert named, page
    assert named <= {*COMMANDS, "is", "and"}, named - COMMANDS.keys()


def test_make_has_the_targets_that_are_shown() -> None:
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) | set(re.findall(r"`make ([\w-]+)`", "".join(PAGES.values())))
    assert {"train", "test", "check"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "heads-lightning train" in subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_recipe_is_named_and_no_other() -> None:
    said = README.split("Recipes (`experiment=…`):")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(group_options("experiment"))


def test_every_command_is_in_the_table() -> None:
    table = README.split("| command | does |")[1].split("\n\n")[0]
    assert {name for name in COMMANDS if re.search(rf"`(heads-lightning )?{name}\b", table)} == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAINED)
def test_a_run_that_is_shown_trains(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    proof = "experiment=fim_proof" in words
    tiny = [o for o in TINY if not (proof and o.startswith(("data", "tokenizer")))] + (["data.num_documents=500"] if proof else [])
    assert main(["train", *words, *tiny, f"hydra.run.dir={tmp_path}/run"]) == 0
    assert '"val/loss"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["evaluate", f"checkpoint={tmp_path}/run", "infill_lines=2", "text_tokens=200", "save=true"]) == 0
    assert main(["compare", f"{tmp_path}/run", f"{tmp_path}/run"]) == 0
