"""Training values: how a batch is cut, two processes, what a run reports, from records and from text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from heads_lightning.composition import compose
from heads_lightning.experiment import load
from heads_lightning.heads import ValueHead
from heads_lightning.run import train
from heads_lightning.training.checkpoints import newest_checkpoint, read_checkpoint

# -- training -------------------------------------------------------------------------------------------------------------

VALUE = ["objective=value", "head=value"]
LINEAR = ["optimizer=adamw", "optimizer.learning_rate=1e-3", "optimizer.eps=1.0"]
"""AdamW that is linear in the gradients: a wrong scale cannot cancel (see test_training)."""
KINDS = {
    "outcome": [],
    "sequences": ["objective.reduction=seq_mean_token_mean", "objective.loss=bce"],
    "pairs": ["objective.loss=bradley_terry"],
    "joint": ["head.lm_weight=0.5", "head.tie_embeddings=true", "objective.target=monte_carlo", "objective.alignment=state_before_action"],
}


def weights(run_dir: Path) -> dict[str, Tensor]:
    return read_checkpoint(newest_checkpoint(run_dir))["state_dict"]


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_batch_is_cut_changes_nothing(tiny: list[str], tmp_path: Path, kind: str) -> None:
    """O8: micro-batches with unequal numbers of targets."""
    found = {}
    for micro in (8, 3):
        result = train(compose([*tiny, *VALUE, *KINDS[kind], *LINEAR, f"trainer.micro_batch_size={micro}"]), tmp_path / str(micro))
        found[micro] = weights(tmp_path / str(micro)), result.metrics
    assert furthest(found[8][0], found[3][0]) < 1e-6
    for name in ("train/loss", "val/loss", "val/calibration_error", "val/value_mean"):
        assert found[3][1][name] == pytest.approx(found[8][1][name], rel=1e-4), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "parallel", "micro"),
    [("joint", "fsdp", 3), *(pytest.param(kind, "data", 2, marks=pytest.mark.slow) for kind in ("sequences", "pairs"))],
)
def test_two_processes_give_the_weights_of_one(tiny: list[str], tmp_path: Path, kind: str, parallel: str, micro: int) -> None:
    """O8 on two ranks, DDP and FSDP2: the same gradients, the same metrics."""
    overrides = [*tiny, *VALUE, *KINDS[kind], *LINEAR]
    one = train(compose(overrides), tmp_path / "one")
    ranks = ["trainer.devices=2", f"trainer.parallel={parallel}", f"trainer.micro_batch_size={micro}"]
    command = [sys.executable, "-m", "heads_lightning", "train", *overrides, *ranks]
    subprocess.run([*command, f"hydra.run.dir={tmp_path / 'two'}"], check=True, timeout=240, capture_output=True)
    assert furthest(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    from heads_lightning.tracking.run_folder import read_metrics

    two = {name: value for point in read_metrics(tmp_path / "two") for name, value in point.values.items()}
    for name in ("train/loss", "val/loss", "val/calibration_error", "val/value_mean"):
        assert two[name] == pytest.approx(one.metrics[name], rel=1e-5, abs=1e-7), name


def test_a_run_reports_values_and_draws_their_reliability(tiny: list[str], tmp_path: Path) -> None:
    overrides = [o for o in tiny if not o.startswith("tracking=")]
    result = train(compose([*overrides, *VALUE, "tracking=mlflow", "trainer.max_steps=2", f"run_root={tmp_path}"]), tmp_path / "run")
    summary = (tmp_path / "run" / "summary.txt").read_text()
    for phrase in ("explained variance", "calibration error", "per target", "reliability.png"):
        assert phrase in summary, phrase
    assert "nats" not in summary
    assert result.metrics["val/calibration_error"] >= 0
    assert "val/explained_variance" in result.metrics
    assert list((tmp_path / "run").rglob("reliability.png"))
    model = load(str(tmp_path / "run"))
    assert isinstance(model.head, ValueHead)
    assert model.head.num_statistics == 38
    asked = subprocess.run(
        [sys.executable, "-m", "heads_lightning", "evaluate", f"checkpoint={tmp_path / 'run'}", "json=true"],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    again = json.loads(asked.stdout)
    assert again["val/explained_variance"] == pytest.approx(result.metrics["val/explained_variance"], abs=1e-6)
    from mlflow import MlflowClient

    sidecar = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    client = MlflowClient(sidecar["uri"])
    assert "reliability.png" in {artifact.path for artifact in client.list_artifacts(sidecar["run_id"])}
    assert client.get_run(sidecar["run_id"]).data.metrics["val/explained_variance"] == result.metrics["val/explained_variance"]


def test_training_from_records_finds_what_they_say(tiny: list[str], tmp_path: Path) -> None:
    """The outcome is whether a text has an `x`; a tiny model learns it in a few steps, and resumes."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 6)) + rng.choice(["x", "y"]) + "z" for _ in range(300)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "r.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "outcome": int("x" in t), "n": i}) for i, t in enumerate(texts))
    )
    kept = [o for o in tiny if not o.startswith(("data=", "data.root", "data.include", "tokenizer.", "trainer.max_steps", "data.seq"))]
    overrides = [
        *kept, *VALUE, "data=jsonl", f"data.root={tmp_path}/data", "data.sequence_length=12", "tokenizer=byte", "objective.loss=bce",
        "objective.positions=last", "trainer.max_steps=40", "trainer.val_every_steps=40", "optimizer=adamw", "optimizer.learning_rate=1e-2",
        "data.validation_sequences=64", "trainer.global_batch_size=32", "trainer.micro_batch_size=32", "trainer.log_every_steps=10",
        f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    result = train(compose(overrides), tmp_path / "run")
    assert result.metrics["val/accuracy"] == 1.0
    assert result.metrics["val/explained_variance"] > 0.9
    train(compose([*overrides, "trainer.max_steps=42", f"resume={tmp_path / 'run'}"]), tmp_path / "run")
