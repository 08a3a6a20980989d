"""What `tracking.log_model=true` leaves in MLflow: a model that `mlflow models predict` and pyfunc load, and that infills; its data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from heads_lightning import compose, infill, load, train
from heads_lightning.configs.objective import objectives
from heads_lightning.configs.requests import InfillRequest
from heads_lightning.configs.tracking import MLflowConfig
from heads_lightning.evaluation.continuation import continuation
from heads_lightning.registry import ConfigError
from heads_lightning.served_model import signature_of
from heads_lightning.tracking.mlflow_opening import connect
from heads_lightning.tracking.mlflow_store import resolve_store
from heads_lightning.tracking.open_run import send_later

RUN = [*(o for o in TINY if o != "tracking=none"), "tracking.log_model=true", "tracking.system_metrics=false"]
ROWS = [{"prefix": "def add(a, b):\n", "suffix": "    return c\n"}, {"prefix": "import ", "suffix": None}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(run folder, client of its store, its MLflow run)."""
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        result = train(compose([*RUN, f"run_root={root}"]), run_dir=root / "fim" / "one", quiet=True)
        client = connect(resolve_store(MLflowConfig(), root))
    run_id = json.loads((result.run_dir / "mlflow.json").read_text())["run_id"]
    return result.run_dir, client, client.get_run(run_id)


def environment(client: Any) -> dict[str, str]:
    """Of a process that asks the store, with this checkout on its path."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "MLFLOW_TRACKING_URI": client.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": path}


@pytest.mark.slow
def test_mlflow_models_predict_infills(run: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """The real command, in a process of its own, on the model that the store holds."""
    folder, client, found = run
    (model,) = client.search_logged_models([found.info.experiment_id])
    (tmp_path / "rows.json").write_text(json.dumps({"dataframe_records": ROWS, "params": {"max_new_tokens": 5}}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--model-uri", f"models:/{model.model_id}", "--env-manager", "local",
               "--input-path", "rows.json", "--output-path", "answers.json", "--content-type", "json"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment(client), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    given = [row["middle"] for row in json.loads((tmp_path / "answers.json").read_text())["predictions"]]
    trained = load(folder)
    assert given == [infill(trained, row["prefix"], row["suffix"] or "", max_new_tokens=5) for row in ROWS]
    assert any(given)


def test_pyfunc_has_the_signature_and_checks_it(run: tuple[Path, Any, Any]) -> None:
    import mlflow.pyfunc
    import pandas
    from mlflow.exceptions import MlflowException

    model = mlflow.pyfunc.load_model(str(run[0] / "model"))
    signature = model.metadata.signature
    assert (signature.inputs.input_names(), signature.outputs.input_names()) == (["prefix", "suffix"], ["middle"])
    assert {spec.name: spec.default for spec in signature.params} == {"max_new_tokens": 100, "temperature": 0.0, "seed": 0}
    answers = model.predict(pandas.DataFrame({"prefix": ["a = ", "b"]}, index=[7, 3]), params={"max_new_tokens": 2})
    assert answers.index.tolist() == [7, 3]  # a missing suffix is an empty one, and rows keep their names
    with pytest.raises(MlflowException, match="prefix"):
        model.predict(pandas.DataFrame({"prefix": [1.5]}))


def test_the_store_holds_the_model_of_the_run(run: tuple[Path, Any, Any]) -> None:
    _, client, found = run
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert (model.source_run_id, str(model.status), model.tags["step"]) == (found.info.run_id, "READY", "4")
    assert [output.model_id for output in found.outputs.model_outputs] == [model.model_id]


def test_what_was_read_is_recorded(run: tuple[Path, Any, Any]) -> None:
    folder, _, found = run
    inputs = {item.tags[0].value: item.dataset for item in found.inputs.dataset_inputs}
    assert set(inputs) == {"train", "validation"}
    assert len({dataset.digest for dataset in inputs.values()}) == 2
    assert json.loads(inputs["train"].source)["uri"] == json.loads(inputs["validation"].source)["uri"] != ""
    profile = json.loads(inputs["train"].profile)
    manifest = next((folder.parents[1]).glob(f"**/{inputs['train'].name}/manifest.json"))
    assert profile["tokens"] == json.loads(manifest.read_text())["splits"]["train"]["tokens"] > 0


def test_sending_again_makes_no_second_model(run: tuple[Path, Any, Any]) -> None:
    folder, client, found = run
    (folder / "mlflow_sent.json").unlink()
    assert send_later(folder) == (0, 0)
    assert len(client.search_logged_models([found.info.experiment_id])) == 1
    assert len(client.get_run(found.info.run_id).inputs.dataset_inputs) == 2


def test_what_writes_no_text_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.log_model=false"):
        train(compose([*RUN, f"run_root={tmp_path}", "objective=mlm", "head=mlm"]), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_every_objective_is_served_as_it_was_trained() -> None:
    """Infilling where that is trained, else continuing, else nothing: none is forgotten."""
    columns = {
        name: signature.inputs if (signature := signature_of(cls())) else () for name, cls in objectives.items() if name != "mixture"
    }
    assert {name for name, inputs in columns.items() if not inputs} == {"mlm", "value"}
    assert {name for name, inputs in columns.items() if len(inputs) == 2} == {"fim", "masked_diffusion", "span_corruption", "ul2"}


def test_a_model_that_only_continues_takes_a_prefix(tmp_path: Path) -> None:
    import pandas

    from heads_lightning.served_model import ServedModel, _load_pyfunc, write_model

    overrides = [*TINY, f"run_root={tmp_path}", "objective=causal", "trainer.max_steps=2"]
    trained = load(train(compose(overrides), run_dir=tmp_path / "one", quiet=True).run_dir)
    served = _load_pyfunc(str(write_model(tmp_path / "model", trained) / "model.ckpt"))
    assert isinstance(served, ServedModel)
    answer = served.predict(pandas.DataFrame({"prefix": ["import "], "other": ["x"]}), {"max_new_tokens": 4})
    assert answer["middle"].tolist() == [continuation(trained, "import ", InfillRequest(checkpoint="", max_new_tokens=4))]
