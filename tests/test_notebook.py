"""The notebook's code runs, cell by cell, in one namespace; only its number of steps and of documents is made small."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.ipynb"
SMALL = '"trainer.max_steps=2", "data.num_documents=500", "backbone.d_model=32"'


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict[str, Any]) -> str:
    """What the notebook shows below a cell."""
    return "".join(line for output in cell["outputs"] for line in (output.get("text") or output["data"]["text/plain"]))


def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in code_cells()]
    assert sum(source.count('"trainer.max_steps=600"') for source in sources) == 1
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for source in sources:
            exec(compile(source.replace('"trainer.max_steps=600"', SMALL), str(NOTEBOOK), "exec"), namespace)
    assert "trainer.max_stps does not exist. Did you mean trainer.max_steps?" in said.getvalue()
    assert (namespace["result"].run_dir / "report.html").is_file()
    assert {"build", "compose", "infill", "load", "train"} <= namespace.keys()


def test_what_it_shows_is_what_it_claims() -> None:
    """The outputs are of a full run: the model was right, and no cell failed."""
    cells = code_cells()
    asked = next(cell for cell in cells if "infill(model" in "".join(cell["source"]))
    assert shown(asked) == "'efgh\\n'"
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
