"""The whole program as a user runs it: train, infill, generate, evaluate, resume, sweep; each as a real process once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from heads_lightning.__main__ import main


def program(*arguments: str, text: str | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "heads_lightning", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout, env=environment)


def succeed(*arguments: str, text: str | None = None) -> str:
    done = program(*arguments, text=text)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of four steps, with MLflow and the evaluation."""
    run_dir = tmp_path_factory.mktemp("end_to_end") / "run"
    changes = ["tracking=mlflow", "evaluation.enabled=true", "evaluation.infill_lines=6", "evaluation.text_tokens=2000"]
    overrides = [o for o in tiny if not o.startswith(("tracking=", "evaluation."))]
    out = succeed("train", *overrides, *changes, "evaluation.max_new_tokens=8", f"hydra.run.dir={run_dir}")
    (run_dir / "stdout").write_text(out)
    return run_dir


def test_the_summary_says_what_was_reached_and_how_to_go_on(trained: Path) -> None:
    out = (trained / "stdout").read_text()
    for phrase in ("bits per byte of held-out files", "5-gram byte model", "given prefix and suffix", "given the prefix alone",
                   "line lookup", "model ▸", "truth ▸", "mlflow ui",
                   f"infill checkpoint={trained}", f"train resume={trained}"):  # fmt: skip
        assert phrase in out, phrase
    report = json.loads((trained / "evaluation.json").read_text())
    assert 0 < report["infill_bits_per_byte"] < 20
    assert report["hidden_lines"] == 6


def test_the_run_folder_explains_itself(trained: Path) -> None:
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["objective"]["name"] == "fim"
    assert config["trainer"]["precision"] == "32-true"
    packages = json.loads((trained / "provenance.json").read_text())
    assert "torch" in json.dumps(packages)
    assert (trained / "summary.txt").read_text() in (trained / "stdout").read_text()


def test_mlflow_has_the_same_facts(trained: Path) -> None:
    from mlflow import MlflowClient

    sidecar = json.loads((trained / "mlflow.json").read_text())
    client = MlflowClient(sidecar["uri"])
    run = client.get_run(sidecar["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["objective.rate"] == "0.5"
    assert len(client.get_metric_history(sidecar["run_id"], "train/loss")) == 4
    assert run.data.metrics["eval/infill_bits_per_byte"] == json.loads((trained / "evaluation.json").read_text())["infill_bits_per_byte"]
    names = {artifact.path for artifact in client.list_artifacts(sidecar["run_id"])}
    assert {"config.yaml", "samples.txt", "summary.txt", "loss.png", "report.html"} <= names


def test_infill_takes_files_words_and_standard_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text("def add(a, b):\n")
    (tmp_path / "b.py").write_text("\n    return c\n")
    asked = ["infill", f"checkpoint={trained}", "max_new_tokens=5"]
    piped = succeed(*asked, text="def add(a, b):\n<FILL>\n    return c\n")
    for given in ([f"prefix_file={tmp_path / 'a.py'}", f"suffix_file={tmp_path / 'b.py'}"], ["--", "def add(a, b):\n", "\n    return c\n"]):
        assert main([*asked, *given]) == 0
        assert capsys.readouterr().out == piped


def test_generate_and_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"checkpoint={trained}", "max_new_tokens=5", "--", "import os"]) == 0
    assert capsys.readouterr().out.startswith("import os")
    newest = sorted((trained / "checkpoints").glob("*.ckpt"))[-1]
    numbers = json.loads(succeed("evaluate", f"checkpoint={newest}", "json=true"))
    assert numbers == json.loads((trained / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["infill", "checkpoint=nowhere", "--", "a", "b"], ["nowhere is not a run folder", "MLflow run id"]),
        pytest.param(
            ["infill", "checkpoint=RUN", "prefix_file=missing.py"],
            ["prefix_file=missing.py cannot be read: No such file"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["infill", "checkpoint=RUN", "layuot=psm", "--", "a", "b"], ["layuot does not exist", "layout"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["generate", "checkpoint=RUN", "temperature=-1", "--", "a"],
            ["temperature=-1.0 is out of range", "0 or more"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["infill", "checkpoint=RUN", "--", "a", "b", "c"], ["3 texts after --", "-- PREFIX SUFFIX"], marks=pytest.mark.slow),
    ],
)
def test_mistakes_end_in_one_line(trained: Path, arguments: list[str], phrases: list[str]) -> None:
    done = program(*[a.replace("RUN", str(trained)) for a in arguments])
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for phrase in phrases:
        assert phrase in done.stderr


def test_a_sweep_trains_every_compatible_cell_under_one_parent(tiny: list[str], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    overrides = [o for o in tiny if not o.startswith(("tracking=", "run_root="))]
    swept = ["objective=causal,mlm", "head.loss_implementation=default,chunked", "trainer.max_steps=1", "tracking.system_metrics=false"]
    cache = next(o for o in tiny if o.startswith("run_root=")).replace("run_root=", "data.cache_dir=") + "/data"
    succeed("train", "-m", *overrides, *swept, f"run_root={tmp_path}", cache, "tracking=mlflow")
    runs = sorted(tmp_path.glob("sweeps/*/*/checkpoints"))
    assert len(runs) == 4
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("heads_lightning").experiment_id])
    parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1
    assert len(found) == 5
    assert {r.data.tags["mlflow.parentRunId"] for r in found if r is not parents[0]} - {parents[0].info.run_id} == set()
    assert {r.info.status for r in found} == {"FINISHED"}


@pytest.mark.slow
def test_the_synthetic_proof(tmp_path: Path) -> None:
    """Fill-in-the-middle finds what causal order can only guess."""
    for name, overrides in {"fim": [], "causal": ["objective=causal"]}.items():
        run_dir = tmp_path / name
        arguments = ["experiment=fim_proof", *overrides, f"run_root={tmp_path}", "tracking=none", f"hydra.run.dir={run_dir}"]
        assert program("train", *arguments, timeout=600).returncode == 0
    fim = json.loads((tmp_path / "fim" / "evaluation.json").read_text())
    causal = json.loads((tmp_path / "causal" / "evaluation.json").read_text())
    assert fim["copy_accuracy_infill"] > 0.99
    assert causal["copy_accuracy_prefix"] < 0.1
    assert causal["copy_accuracy_infill"] is None
