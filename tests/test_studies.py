"""Studies below experiments/: what their READMEs show is what their results.json says, and their commands compose."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from heads_lightning.composition import compose
from heads_lightning.sweeps.grid import grid

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("experiments/*/README.md") if "<!-- table -->" in path.read_text(encoding="utf-8"))
COMMANDS = [
    pytest.param(shlex.split(line), id=f"{path.parent.name}-{i}")
    for path in sorted(ROOT.glob("experiments/*/README.md"))
    for block in re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for i, line in enumerate(block.replace("\\\n", " ").splitlines())
    if line.startswith("heads-lightning train")
]


@pytest.fixture(scope="module")
def tabulate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tabulate", ROOT / "experiments/tabulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_studies() -> None:
    assert {"fim_rate", "yardstick", "context_or_document", "masking_rate", "ngpt"} <= {path.name for path in STUDIES}
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_table_is_what_the_results_say(study: Path, tabulate: ModuleType) -> None:
    readme = (study / "README.md").read_text(encoding="utf-8")
    results = tabulate.load(study / "results.json")
    assert results.cells
    assert tabulate.with_table(readme, tabulate.table(results)) == readme, f"python experiments/tabulate.py {study.name}"
    for name in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (study / name).is_file()


def _composed(words: list[str]) -> list[list[str]]:
    """The cells of a study's command: every choice of an option, the first of a list of numbers."""
    overrides = [word for word in words if "=" in word and not word.startswith(("sweep.", "hydra"))]
    overrides = [re.sub(r"=BEST,.*|=([\d.]+),[\d.,]+$", lambda found: f"={found[1] or 0.001}", word) for word in overrides]
    varied = {word.split("=")[0] for word in overrides if "," in word}
    zipped = [word.removeprefix("sweep.zip=[").removesuffix("]").split("+") for word in words if word.startswith("sweep.zip=")]
    return list(grid(overrides, ["+".join(together) for keys in zipped if len(together := [key for key in keys if key in varied]) > 1]))


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_of_a_study_composes(words: list[str]) -> None:
    assert words[:2] == ["heads-lightning", "train"]
    config_dir = words[words.index("--config-dir") + 1] if "--config-dir" in words else None
    cells = _composed(words[2:])
    assert cells
    for cell in cells:
        compose(cell, config_dir=ROOT / config_dir if config_dir else None)


def test_a_table_has_mean_and_spread_over_seeds_and_dashes(tabulate: ModuleType, tmp_path: Path) -> None:
    cells = [
        tabulate.Cell({"k": "a"}, 0, {"eval/x_bits_per_byte": 1.0}),
        tabulate.Cell({"k": "a"}, 1, {"eval/x_bits_per_byte": 2.0}),
        tabulate.Cell({"k": "b"}, 0, {}),
    ]
    results = tabulate.Results(["k"], ["eval/x_bits_per_byte"], cells)
    tabulate.save(tmp_path / "results.json", results)
    assert tabulate.load(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["cells"][2]["values"] == {}
    assert tabulate.table(results).splitlines()[2:] == ["| a | 1.500 ± 0.707 | 2 |", "| b | – | 1 |"]


def test_tables_that_are_made_otherwise_show_their_results() -> None:
    """Every number of the results stands in the README, rounded as there."""
    experiments = ROOT / "experiments"
    structure = json.loads((experiments / "fim_structure/results/structure.json").read_text())
    bigs = json.loads((experiments / "bigs_mlm/results.json").read_text())["held_out_loss_by_step"]
    leak = json.loads((experiments / "leak/results/losses.json").read_text())["final_loss"]
    seen = ("broken_pieces", "middle_tokens_that_see_all", "windows_with_a_broken_piece")
    measured = {
        "fim_structure": ([100 * row[key] for row in structure for key in seen], 0.051),
        "bigs_mlm": ([loss for losses in bigs.values() for loss in losses.values()], 0.00051),
        "leak": ([loss for losses in leak.values() for loss in losses], 0.00051),
    }
    for study, (numbers, rounding) in measured.items():
        shown = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", (experiments / study / "README.md").read_text(encoding="utf-8"))]
        missing = [number for number in numbers if not any(abs(number - other) <= rounding for other in shown)]
        assert numbers
        assert not missing, study
