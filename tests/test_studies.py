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


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_of_a_study_composes(words: list[str], tmp_path: Path) -> None:
    """Every cell of it, of one seed: names of options and fields are those that exist."""
    assert words[:2] == ["heads-lightning", "train"]
    config_dir = words[words.index("--config-dir") + 1] if "--config-dir" in words else None
    overrides = [word for word in words[2:] if "=" in word and not word.startswith(("sweep.", "hydra", "seed="))]
    overrides = [re.sub(r"=BEST(,BEST)*$", "=0.001,0.002", word) for word in overrides]
    zipped = [word.removeprefix("sweep.zip=[").removesuffix("]") for word in words if word.startswith("sweep.zip=")]
    zipped = [keys for keys in zipped if all(any(word.startswith(f"{key}=") and "," in word for word in overrides) for key in keys.split("+"))]
    cells = list(grid(overrides, zipped))
    assert cells
    for cell in cells:
        compose(cell, config_dir=str(ROOT / config_dir) if config_dir else None)


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
