"""Several ranks run one experiment: in every cell of a sweep, under torchrun, and never with different settings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_sweeps import states, sweep

from heads_lightning.sweeps.ledger import Ledger

pytestmark = pytest.mark.distributed

RANKS = """
import json, os
from pathlib import Path
from heads_lightning.training.saving import CheckpointCallback

original = CheckpointCallback.on_train_start

def on_train_start(self, trainer, module):
    original(self, trainer, module)
    group = trainer.optimizers[0].param_groups[0]
    facts = {"rate": group["peak_lr"], "folder": str(self.run_dir.resolve())}
    self.run_dir.mkdir(parents=True, exist_ok=True)
    (self.run_dir / f"rank{trainer.global_rank}of{trainer.world_size}.json").write_text(json.dumps(facts))

CheckpointCallback.on_train_start = on_train_start
"""
"""A plugin by which every rank writes down what it trains with."""


@pytest.fixture
def witness(tmp_path: Path) -> dict[str, str]:
    """Environment in which ranks write down what they train with."""
    (tmp_path / "ranks_plugin.py").write_text(RANKS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {"HEADS_LIGHTNING_PLUGINS": "ranks_plugin", "PYTHONPATH": path}


def facts(run_dir: Path) -> list[dict]:
    """What each of two ranks trained with."""
    return [json.loads((run_dir / f"rank{rank}of2.json").read_text()) for rank in (0, 1)]


TWO = ["trainer.devices=2", "trainer.micro_batch_size=4", "optimizer=adamw"]


def test_both_ranks_of_every_cell_train_the_same(tiny: list[str], tmp_path: Path, witness: dict[str, str]) -> None:
    folder = tmp_path / "s"
    sweep(folder, *tiny, *TWO, "optimizer.learning_rate=1e-3,1e-2", **witness)
    found = [facts(folder / str(i)) for i in (0, 1)]
    assert all(first == other for first, other in found)
    assert [first["rate"] for first, _ in found] == [1e-3, 1e-2]
    assert not list(folder.parent.glob("s*/[2-9]*"))


@pytest.mark.slow
def test_both_ranks_of_every_proposed_cell_train_the_same(tiny: list[str], tmp_path: Path, witness: dict[str, str]) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "s"
    search = "optimizer.learning_rate=tag(log, interval(1e-4, 1e-1))"
    sweep(folder, *tiny, *TWO, "hydra/sweeper=optuna", "sweep.trials=2", search, **witness)
    found = [facts(folder / str(i)) for i in (0, 1)]
    assert all(first == other for first, other in found)
    assert len({first["rate"] for first, _ in found}) == 2
    proposed = [float(entry.overrides[0].partition("=")[2]) for entry in Ledger.of(folder).entries().values()]
    assert [first["rate"] for first, _ in found] == pytest.approx(proposed, rel=1e-12)
    assert states(folder) == ["done", "done"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_with_different_settings_train_nothing(tiny: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    processes = []
    for rank in (0, 1):
        line = [*tiny, *TWO, f"optimizer.learning_rate={10 ** -(rank + 2)}", f"hydra.run.dir={tmp_path / 'run'}"]
        environment = os.environ | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "heads_lightning", "train", *line]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    for error in errors:
        assert "rank 0 and rank 1 were started with different configurations ('learning_rate: 0.01' and 'learning_rate: 0.001')" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_torchrun_gives_all_ranks_one_folder(tiny: list[str], tmp_path: Path, witness: dict[str, str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "heads_lightning", "train"]
    data = [override for override in tiny if not override.startswith("run_root=")]
    done = subprocess.run(
        [*torchrun, *data, *TWO, f"run_root={tmp_path / 'runs'}", "name=x"],
        capture_output=True, text=True, timeout=240, env=os.environ | witness, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "x").iterdir()
    first, other = facts(folder)
    assert first == other
