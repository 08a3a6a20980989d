"""A checkpoint of one layout and format goes on in another; kept by count and by metric; a kill during a save leaves a whole one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
from test_parallel import FSDP, GRADIENT, TENSOR, curve, train_ranks
from test_training import largest_difference, weights
from torch.utils._pytree import tree_flatten

from heads_lightning.composition import compose
from heads_lightning.experiment import load
from heads_lightning.registry import RunError
from heads_lightning.run import train
from heads_lightning.training import distributed_checkpoints
from heads_lightning.training.checkpoints import FOLDER, checkpoint_path, newest_checkpoint, read_checkpoint, saved_checkpoints, step_of

FOLDERS = "trainer.checkpoint_format=distributed"
SIX = ["trainer.max_steps=6", "trainer.checkpoint_every_steps=3", "trainer.micro_batch_size=4", "objective=causal"]
DROPOUT = [*SIX, "backbone.dropout=0.1", "optimizer=muon"]
DATA = [*FSDP, "trainer.micro_batch_size=2", "trainer.parallel=data"]
SHARDED = [*FSDP, "trainer.micro_batch_size=2"]


LAYOUTS = ["exact_fsdp", "full_fsdp", "tensor"]
MOVES = [
    *[("one", "fsdp"), ("fsdp", "data"), ("fsdp", "one")],
    *[("tensor", "fsdp"), ("fsdp", "tensor"), ("one", "tensor"), ("tensor", "one")],
]


def after(step: int, run_dir: Path) -> str:
    return f"resume={checkpoint_path(run_dir, step)}"


@pytest.fixture(scope="module")
def runs(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two ranks, unbroken and gone on from each other's third step."""
    folder = tmp_path_factory.mktemp("layouts")
    exact = [*tiny, *SIX, *GRADIENT, "optimizer.average_decay=0.5"]
    train(compose([*exact, FOLDERS]), folder / "one")
    train_ranks(
        {
            folder / "data": [*tiny, *DROPOUT, *DATA],
            folder / "data_resumed": [*tiny, *DROPOUT, *DATA, after(3, folder / "data")],
            folder / "fsdp": [*tiny, *DROPOUT, *SHARDED, FOLDERS],
            folder / "fsdp_resumed": [*tiny, *DROPOUT, *SHARDED, FOLDERS, after(3, folder / "fsdp")],
            folder / "exact_fsdp": [*exact, *SHARDED, FOLDERS],
            folder / "full_fsdp": [*exact, *SHARDED],
            folder / "one_to_fsdp": [*exact, *SHARDED, after(3, folder / "one")],
            folder / "fsdp_to_data": [*exact, *DATA, FOLDERS, after(3, folder / "full_fsdp")],
            folder / "tensor": [*exact, *TENSOR, FOLDERS],
            folder / "tensor_to_fsdp": [*exact, *SHARDED, after(3, folder / "tensor")],
            folder / "fsdp_to_tensor": [*exact, *TENSOR, after(3, folder / "exact_fsdp")],
            folder / "one_to_tensor": [*exact, *TENSOR, after(3, folder / "one")],
            folder / "data_to_tensor": [*exact, *TENSOR, "trainer.max_steps=7", after(6, folder / "fsdp_to_data")],
            folder / "data_to_fsdp": [
                *exact,
                *SHARDED,
                FOLDERS,
                "trainer.max_steps=7",
                after(6, folder / "fsdp_to_data"),
            ],
        }
    )
    train(compose([*exact, after(3, folder / "exact_fsdp")]), folder / "fsdp_to_one")
    train(compose([*exact, after(3, folder / "tensor")]), folder / "tensor_to_one")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_a_resumed_run_of_two_ranks_equals_an_unbroken_one_to_the_bit_with_dropout(runs: Path, layout: str) -> None:
    assert largest_difference(weights(runs / layout), weights(runs / f"{layout}_resumed")) == 0.0
    assert curve(runs / f"{layout}_resumed", "train/loss") == curve(runs / layout, "train/loss")[3:]


@pytest.mark.distributed
def test_each_rank_draws_its_own_dropout_and_saves_how(runs: Path) -> None:
    states = read_checkpoint(newest_checkpoint(runs / "data"))["heads_lightning"]["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


@pytest.mark.distributed
@pytest.mark.parametrize("other", [*LAYOUTS, *(f"{a}_to_{b}" for a, b in MOVES)])
def test_a_run_goes_on_in_another_layout_from_either_format(runs: Path, other: str) -> None:
    assert largest_difference(weights(runs / "one"), weights(runs / other)) < 1e-6
    averages = [dict(read_checkpoint(newest_checkpoint(runs / name))["average"]) for name in ("one", other)]
    assert largest_difference(*averages) < 1e-6


@pytest.mark.distributed
def test_a_checkpoint_folder_of_two_ranks_holds_shares_and_loads_as_a_model(runs: Path) -> None:
    newest = newest_checkpoint(runs / "exact_fsdp")
    assert len(list(newest.glob("*.distcp"))) == 2
    model = load(str(newest))
    assert model.step == 6
    saved = read_checkpoint(newest)["average"]
    assert all(torch.equal(value, saved[f"backbone.{name}"]) for name, value in model.backbone.state_dict().items())


def test_a_folder_holds_what_a_file_holds_and_nothing_is_left_over(tiny: list[str], tmp_path: Path) -> None:
    """Also that training, which goes on while the folder is written, does not change what is written."""
    overrides = [*tiny, "optimizer=muon", "trainer.checkpoint_every_steps=1", "trainer.keep_checkpoints=4"]
    train(compose(overrides), tmp_path / "file")
    train(compose([*overrides, FOLDERS]), tmp_path / "folder")
    assert len(saved_checkpoints(tmp_path / "file" / FOLDER)) == 4
    for step in (1, 2, 3, 4):
        file, folder = (read_checkpoint(checkpoint_path(tmp_path / name, step)) for name in ("file", "folder"))
        assert file.keys() == folder.keys()
        assert largest_difference(file["state_dict"], folder["state_dict"]) == 0.0
        first, other = (tree_flatten(state["optimizer_states"]) for state in (file, folder))
        assert first[1] == other[1]
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(first[0], other[0], strict=True)
            if a is not None and not isinstance(a, str)
        )
    assert all(path.name.startswith("step-") for path in (tmp_path / "folder" / FOLDER).iterdir())


def test_the_best_checkpoints_stay_beside_the_newest(tiny: list[str], tmp_path: Path) -> None:
    fields = ["trainer.max_steps=8", "trainer.val_every_steps=2", "trainer.keep_checkpoints=1", "trainer.keep_best=2"]
    rising = ["optimizer.learning_rate=3e-1", "optimizer=adamw", "schedule=constant", "schedule.warmup_fraction=0"]
    train(compose([*tiny, *fields, *rising]), tmp_path)
    values = {int(step): value for step, value in json.loads((tmp_path / FOLDER / "values.json").read_text()).items()}
    assert sorted(values) == [2, 4, 6, 8]
    candidates = {step: value for step, value in values.items() if step < 8}  # the last one was judged after it was saved
    best = sorted(candidates, key=candidates.__getitem__)[:2]
    assert {step_of(path) for path in saved_checkpoints(tmp_path / FOLDER)} == {8, *best}


def test_a_metric_that_is_not_reported_is_named_with_those_that_are(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"keep_best_metric=val/los is not reported by validation; use one of val/loss"):
        train(compose([*tiny, "trainer.keep_best=1", "trainer.keep_best_metric=val/los"]), tmp_path)


class Witness(lightning.Callback):
    """After every step, what a kill would leave."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.left: dict[int, int] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        saved = saved_checkpoints(self.run_dir / FOLDER)
        self.left[batch_idx + 1] = step_of(saved[-1]) if saved else 0


@pytest.mark.parametrize("interval", [1, 4, 5])
def test_no_step_is_further_than_the_interval_from_a_complete_checkpoint(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """On a disk so slow that a folder is complete only when it is waited for."""
    publish = distributed_checkpoints.replace_folder

    def late(source: Path, target: Path) -> None:
        time.sleep(0.2)
        publish(source, target)

    monkeypatch.setattr(distributed_checkpoints, "replace_folder", late)
    witness = Witness(tmp_path)
    overrides = [*tiny, FOLDERS, "trainer.max_steps=13", f"trainer.checkpoint_every_steps={interval}", "trainer.keep_checkpoints=13"]
    train(compose(overrides), tmp_path, callbacks=[witness])
    assert max(step - saved for step, saved in witness.left.items()) <= interval
    regular = {step for step in range(1, 14) if step % interval == 0} | {13}
    assert {step_of(path) for path in saved_checkpoints(tmp_path / FOLDER)} == regular


@pytest.mark.slow
@pytest.mark.parametrize(("form", "interval"), [("full", 1), ("distributed", 1), ("distributed", 4)])
def test_a_kill_at_any_moment_loses_no_more_than_the_interval(tiny: list[str], tmp_path: Path, form: str, interval: int) -> None:
    """Saved so often that most kills hit a save."""
    overrides = [*tiny, "trainer.max_steps=100000", f"trainer.checkpoint_every_steps={interval}", f"trainer.checkpoint_format={form}"]
    for attempt in range(3):
        run_dir = tmp_path / str(attempt)
        command = [sys.executable, "-m", "heads_lightning", "train", *overrides, f"hydra.run.dir={run_dir}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(curve(run_dir, "train/loss")) < 8 + 3 * attempt:
            time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = len(curve(run_dir, "train/loss"))
        newest = newest_checkpoint(run_dir)
        assert read_checkpoint(newest)["global_step"] == step_of(newest) >= reached - interval
        train(compose([*overrides, f"trainer.max_steps={reached + 2}", f"resume={run_dir}"]), run_dir)
        assert read_checkpoint(newest_checkpoint(run_dir))["global_step"] == reached + 2
