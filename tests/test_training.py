"""Training: one curve however a global batch is cut, resuming to the bit, stopping without loss."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from heads_lightning.composition import compose
from heads_lightning.configs.schedule import schedules
from heads_lightning.module import TrainingStopped
from heads_lightning.registry import ConfigError
from heads_lightning.run import train
from heads_lightning.tracking.run_folder import EVENTS, read_metrics, read_records
from heads_lightning.training.checkpoints import (
    KEY,
    checkpoint_path,
    newest_checkpoint,
    read_checkpoint,
    saved_checkpoints,
)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(newest_checkpoint(run_dir))["state_dict"]


def points(run_dir: Path) -> list[dict]:
    return [{"step": point.step} | point.values for point in read_metrics(run_dir)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


OBJECTIVES = {
    "causal": ["objective=causal"],
    "fim_middle": ["objective=fim", "objective.rate=1.0", "objective.loss_on=middle"],
    "mlm": ["objective=mlm", "head=mlm"],
}


LINEAR = ["optimizer=adamw", "optimizer.learning_rate=1e-3", "optimizer.eps=1.0"]
"""eps far above the gradients makes AdamW linear in them: a wrong scale cannot cancel, and rounding is not blown up (as Muon, which
orthogonalises in bf16, would)."""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_weights_do_not_depend_on_how_the_batch_is_cut(tiny: list[str], tmp_path: Path, objective: str) -> None:
    """Micro-batches of 8, 3 and 1 sequences: SGD-like comparison through AdamW would hide a scale, so the logged loss is compared too."""
    found = {}
    for micro in (8, 3, 1):
        run_dir = tmp_path / str(micro)
        train(compose([*tiny, *OBJECTIVES[objective], f"trainer.micro_batch_size={micro}", *LINEAR]), run_dir)
        found[micro] = (weights(run_dir), [p["train/loss"] for p in points(run_dir) if "train/loss" in p])
    for micro in (3, 1):
        assert largest_difference(found[8][0], found[micro][0]) < 1e-6  # fp32 rounding of sums in another order
        assert found[micro][1] == pytest.approx(found[8][1], rel=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("objective", ["fim_middle", pytest.param("mlm", marks=pytest.mark.slow)])
def test_two_processes_give_the_weights_of_one(tiny: list[str], tmp_path: Path, objective: str) -> None:
    """With batches that double: 2, 4, 8 and 8 sequences."""
    overrides = [*tiny, *OBJECTIVES[objective], *LINEAR, "trainer.batch_start=2", "trainer.batch_warmup_steps=2"]
    train(compose(overrides), tmp_path / "one")
    command = [sys.executable, "-m", "heads_lightning", "train", *overrides, "trainer.devices=2", "trainer.micro_batch_size=2"]
    subprocess.run([*command, f"hydra.run.dir={tmp_path / 'two'}"], check=True, timeout=240, capture_output=True)
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-6
    losses = [[p["train/loss"] for p in points(tmp_path / name) if "train/loss" in p] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    tokens = [[point.tokens for point in read_metrics(tmp_path / name) if "train/loss" in point.values] for name in ("one", "two")]
    assert tokens[0] == tokens[1] == [64 * sequences for sequences in (2, 6, 14, 22)]
    held_out = [[p["val/loss"] for p in points(tmp_path / name) if "val/loss" in p] for name in ("one", "two")]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


WARM_UP = ["trainer.batch_start=2", "trainer.batch_warmup_steps=5", "data.length_start=32", "data.length_warmup_steps=4"]
"""Of the batch 2, 2, 4, 4, 4, 8 sequences, the first four of half the length: step 3 is in the middle of both."""


@pytest.mark.parametrize(("optimizer", "warm_up"), [("adamw", []), ("muon", WARM_UP)])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tiny: list[str], tmp_path: Path, optimizer: str, warm_up: list[str]) -> None:
    """Break a copy of a run as a kill does: the newest checkpoint is that of step 3, step 4 was logged already."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = ["backbone.dropout=0.1", "trainer.micro_batch_size=4", "trainer.max_steps=6", "trainer.checkpoint_every_steps=3"]
    overrides = [*tiny, f"optimizer={optimizer}", *changes, *warm_up]
    train(compose(overrides), whole)
    shutil.copytree(whole, broken)
    checkpoint_path(broken, 6).unlink()
    rows = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= 4))
    train(compose([*overrides, f"resume={broken}"]), broken)
    assert largest_difference(weights(whole), weights(broken)) == 0.0
    assert [record["first_step"] for record in read_records(broken / EVENTS) if record["kind"] == "open"] == [0, 3]
    losses = [[(p["step"], p["train/loss"]) for p in points(run) if "train/loss" in p] for run in (whole, broken)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_can_be_trained_further(tiny: list[str], tmp_path: Path) -> None:
    train(compose(tiny), tmp_path / "run")
    train(compose([*tiny, "trainer.max_steps=6", f"resume={tmp_path / 'run'}"]), tmp_path / "run")
    assert read_checkpoint(newest_checkpoint(tmp_path / "run"))["global_step"] == 6


def test_a_run_shorter_than_the_logging_interval_logs_once(tiny: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    train(compose([*tiny, "trainer.max_steps=2", "trainer.log_every_steps=10"]), tmp_path)
    assert [p["step"] for p in points(tmp_path) if "train/loss" in p] == [2]
    assert not [w for w in recwarn if "logging interval" in str(w.message)]


def test_a_different_seed_gives_different_weights(tiny: list[str], tmp_path: Path) -> None:
    for seed in (0, 1):
        train(compose([*tiny, f"seed={seed}"]), tmp_path / str(seed))
    assert largest_difference(weights(tmp_path / "0"), weights(tmp_path / "1")) > 1e-3


def test_steps_whose_gradient_is_not_finite_are_skipped_counted_and_end_the_run(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null", "trainer.max_steps=30", "trainer.max_bad_steps=3"]
    with pytest.raises(TrainingStopped, match=r"not finite.*3 steps in a row.*token ids.*optimizer\.learning_rate"):
        train(compose(overrides), tmp_path / "run")
    assert not any(torch.isnan(v).any() for v in weights(tmp_path / "run").values())


def test_the_checkpoint_holds_what_wrote_it_and_needs_no_pickle(tiny: list[str], tmp_path: Path) -> None:
    train(compose(tiny), tmp_path / "run")
    checkpoint = torch.load(newest_checkpoint(tmp_path / "run"), weights_only=True)
    assert "objective:" in checkpoint[KEY]["config"]
    assert checkpoint["global_step"] == 4
    assert [p.name for p in saved_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002.ckpt", "step-00000004.ckpt"]


def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tiny: list[str], tmp_path: Path) -> None:
    train(compose(tiny), tmp_path / "run")
    newest = newest_checkpoint(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"step-00000004\.ckpt is damaged.*use the one before it.*step-00000002\.ckpt"):
        read_checkpoint(newest)


_FULL_DISK = """
import resource, sys, torch
from heads_lightning.training.checkpoints import AtomicCheckpointIO
from pathlib import Path
path = Path(sys.argv[1])
io = AtomicCheckpointIO()
io.save_checkpoint({"heads_lightning": {}, "x": torch.zeros(10)}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    io.save_checkpoint({"heads_lightning": {}, "x": torch.zeros(1 << 20)}, path)
except (OSError, RuntimeError) as error:
    print("refused", type(error).__name__)
print(io.load_checkpoint(path)["x"].numel(), sorted(p.name for p in path.parent.iterdir()))
"""


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The kernel refuses to write beyond a file size limit, as it does beyond a full disk."""
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path / "a.ckpt")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout
    assert "10 ['a.ckpt']" in done.stdout


# SIGTERM, its exit code and its words: also test_ten_mistakes.py
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_says_so(tiny: list[str], tmp_path: Path, number: int, code: int) -> None:
    run_dir = tmp_path / "run"
    overrides = [*tiny, "trainer.max_steps=100000", "trainer.checkpoint_every_steps=50", f"hydra.run.dir={run_dir}"]
    command = [sys.executable, "-m", "heads_lightning", "train", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not saved_checkpoints(run_dir / "checkpoints"):
        time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    newest = newest_checkpoint(run_dir)
    assert str(newest) in stderr
    assert "resume=" in stderr
    assert read_checkpoint(newest)["global_step"] == int(newest.stem.split("-")[1])


@pytest.mark.parametrize("name", list(schedules))
def test_schedules_rise_from_almost_nothing_and_stay_within_the_peak(name: str) -> None:
    schedule = schedules[name](warmup_fraction=0.1)
    factors = [schedule.factor(step, 100) for step in range(100)]
    assert 0 < factors[0] < 0.2
    assert max(factors) == pytest.approx(1.0, abs=0.01)
    assert all(b >= a for a, b in itertools.pairwise(factors[:10]))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(factors[10:]))


def test_every_parameter_is_trained_once(tiny: list[str]) -> None:
    from heads_lightning.experiment import build_model
    from heads_lightning.training.optimizers import build_optimizer

    for overrides in (["optimizer=adamw"], ["optimizer=muon"], ["optimizer=muon", "head.tie_embeddings=true"]):
        config = compose([*tiny, *overrides])
        backbone, head = build_model(config, 512)
        optimizer = build_optimizer(config.optimizer, backbone, head)
        trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(trained) == len(set(trained))
        assert set(trained) == {id(p) for module in (backbone, head) for p in module.parameters()}
        undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
        assert id(backbone.embedding.weight) in undecayed
        assert all(id(p) in undecayed for p in backbone.parameters() if p.ndim == 1)
