"""Runs side by side: ranked by one measure, never across protocols, from the files that runs leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from heads_lightning.commands import compare as command
from heads_lightning.evaluation.comparison import compare, measures, ranked, read_run, table_text
from heads_lightning.evaluation.protocol import Floors, Report
from heads_lightning.registry import ConfigError


def run(root: Path, name: str, objective: str, *, protocol: str = "p", **values) -> Path:
    from dataclasses import asdict

    folder = root / name
    folder.mkdir(parents=True)
    report = Report(protocol=protocol, floors=Floors(0.1, 0.2, 0.3, 0.4), **values)
    (folder / "evaluation.json").write_text(json.dumps(asdict(report)))
    (folder / "config.yaml").write_text(yaml.safe_dump({"objective": {"name": objective}, "head": {"name": "default"}}))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        run(tmp_path, "fim/1", "fim", left_to_right_bits_per_byte=2.0, infill_exact_match=0.2, infill_bits_per_byte=1.5),
        run(tmp_path, "causal/1", "causal", left_to_right_bits_per_byte=1.9),
        run(tmp_path, "mlm/1", "mlm", masked_bits_per_byte=1.2),
        run(tmp_path, "more=1/x", "fim", left_to_right_bits_per_byte=2.5, infill_exact_match=0.7),
    ]


def test_best_first_and_what_was_not_measured_last(runs):
    rows = [read_run(folder) for folder in runs]
    assert [r.name for r in ranked(rows, "left_to_right_bits_per_byte")] == ["causal/1", "fim/1", "more=1/x", "mlm/1"]
    assert [r.name for r in ranked(rows, "infill_exact_match")][:2] == ["more=1/x", "fim/1"]  # higher is better
    assert rows[0].values["floor_lookup_exact_match"] == 0.1
    assert measures(rows)[0] == "left_to_right_bits_per_byte"
    with pytest.raises(ConfigError, match="Did you mean 'infill_exact_match'"):
        ranked(rows, "exact_match_infill")


def test_reports_of_different_protocols_are_not_ranked_together(tmp_path, runs):
    other = run(tmp_path, "other/1", "fim", protocol="q", left_to_right_bits_per_byte=0.1)
    comparison = compare([read_run(folder) for folder in [*runs, other]])
    assert [len(group["runs"]) for group in comparison["groups"]] == [4, 1]
    assert [r["rank"] for r in comparison["groups"][0]["runs"]] == [1, 2, 3, None]
    text = table_text(comparison)
    assert text.index("causal/1") < text.index("not comparable with the above") < text.index("other/1")


def test_the_command(runs, capsys):
    command.main([*map(str, runs)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ranked by left_to_right_bits_per_byte")
    assert [line.split()[1] for line in out[3:]] == ["causal/1", "fim/1", "more=1/x", "mlm/1"]
    command.main([*map(str, runs), "--json", "by=infill_exact_match"])
    data = json.loads(capsys.readouterr().out)
    assert data["by"] == "infill_exact_match"
    assert data["groups"][0]["runs"][0]["objective"] == "fim"


def test_refusals(tmp_path, runs):
    with pytest.raises(ConfigError, match="compare needs runs"):
        command.main([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no evaluation.json: evaluate it first with .* save=true"):
        command.main([str(tmp_path / "empty")])
    (runs[0] / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        command.main([str(runs[0])])
    with pytest.raises(ConfigError, match="no run folder and no MLflow run id"):
        command.main(["nothing", f"run_root={tmp_path}"])
