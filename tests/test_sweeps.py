"""Sweeps end to end: cells as processes, the ledger, what survives failures, kills and a second command; and their parts alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from heads_lightning.composition import compose, config_hash, from_yaml, to_yaml
from heads_lightning.experiment import find_checkpoint
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps import settings
from heads_lightning.sweeps.comparison import Comparison, Row, compare, rank, summary
from heads_lightning.sweeps.grid import grid, meets
from heads_lightning.sweeps.ledger import Entry, Ledger, State
from heads_lightning.sweeps.slots import own_gpus, slots, visible_gpus
from heads_lightning.sweeps.warm import ParentEnded, WarmParent
from heads_lightning.tracking.process import is_there
from heads_lightning.tracking.run_folder import read_records


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "heads_lightning", "train", "-m", *overrides]


def sweep(sweep_dir: Path, *overrides: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep in `sweep_dir`."""
    line = [*command(*overrides), f"hydra.sweep.dir={sweep_dir}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, env=os.environ | environment, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def states(sweep_dir: Path) -> list[str]:
    return [str(entry.state) for entry in Ledger.of(sweep_dir).entries().values()]


def starts(sweep_dir: Path) -> list[str]:
    """Hash of a cell for every time that it was begun."""
    return [record["cell"] for record in read_records(sweep_dir / "ledger.jsonl") if record.get("state") == "running"]


def saved(sweep_dir: Path, number: int) -> dict:
    return yaml.safe_load((sweep_dir / str(number) / "config.yaml").read_text())


# ---------------------------------------------------------------------------------------------------------------- cells


def test_a_grid_with_keys_that_advance_together() -> None:
    cells = list(grid(["seed=1,2", "backbone.d_model=32,64", "name=x", "backbone.num_heads=2,4"], ["backbone.d_model+backbone.num_heads"]))
    assert [cell[1:] for cell in cells] == [
        [f"seed={seed}", f"backbone.d_model={width}", f"backbone.num_heads={heads}"]
        for seed in (1, 2)
        for width, heads in ((32, 2), (64, 4))
    ]
    assert all(cell[0] == "name=x" for cell in cells)


@pytest.mark.parametrize(
    ("zipped", "message"),
    [
        (["seed+name"], "name is not given several values"),
        (["seed+data.sequence_length"], "seed has 2, data.sequence_length has 3"),
        (["seed+backbone.d_model", "seed+backbone.num_heads"], "names seed twice"),
    ],
)
def test_keys_that_cannot_advance_together(zipped: list[str], message: str) -> None:
    values = ["seed=1,2", "data.sequence_length=8,16,32", "backbone.d_model=32,64", "backbone.num_heads=2,4"]
    with pytest.raises(ConfigError, match=message):
        list(grid(values, zipped))


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("backbone.d_model * backbone.num_layers <= 64", True),
        ("backbone.d_model > 32", False),
        ("objective == 'fim' and seed in [0, 3]", True),
        ("not (1 < data.sequence_length < 65) or optimizer.name != 'muon'", False),
        ("head.bias == null", True),
    ],
)
def test_conditions(condition: str, kept: bool, tiny: list[str]) -> None:
    assert meets(compose(tiny), [condition]) is kept


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("backbone.dmodel > 3", "names backbone.dmodel.*Did you mean 'backbone.d_model'"),
        ("__import__('os').system('true')", "nothing else"),
        ("seed.__class__ == 3", "no setting"),
        ("seed >", "cannot be decided"),
        ("seed > 'a'", "cannot be decided"),
    ],
)
def test_conditions_that_are_refused(condition: str, message: str, tiny: list[str]) -> None:
    with pytest.raises(ConfigError, match=message):
        meets(compose(tiny), [condition])


def test_a_launcher_for_slurm_where_there_is_none_is_one_line(tmp_path: Path) -> None:
    done = sweep(tmp_path / "sweep", "hydra/launcher=submitit_slurm", "seed=1,2", check=False, PATH=str(tmp_path))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "needs Slurm, whose sbatch is not on this machine" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_cell_is_known_by_what_it_computes(tiny: list[str]) -> None:
    config = compose(tiny)
    same = [*tiny, "name=other", "run_root=elsewhere", "tracking=mlflow", "tracking.experiment=x", "sweep.trials=3"]
    assert config_hash(compose(same)) == config_hash(config)
    assert config_hash(compose([*tiny, "backbone.dropout=0.1"])) != config_hash(config)
    assert "sweep" not in yaml.safe_load(to_yaml(config))


# --------------------------------------------------------------------------------------------------------------- ledger


def filled(folder: Path, count: int = 3) -> Ledger:
    ledger = Ledger(folder)
    ledger.add([(f"hash{i}", None, [f"seed={i}"], f"seed: {i}\n") for i in range(count)])
    return ledger


def test_the_newest_record_is_the_state(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.record("hash1", State.running)
    ledger.record("hash1", State.failed, reason="boom")
    ledger.record("hash2", State.done, metrics={"val/loss": 1.5}, seconds=2.0)
    assert states(tmp_path) == ["pending", "failed", "done"]
    assert ledger["hash1"].reason == "boom"
    ledger.record("hash1", State.running)
    assert ledger["hash1"].reason == ""
    # more cells later get numbers and folders of their own
    (known, new) = ledger.add([("hash1", None, [], ""), ("hash9", None, [], "")])
    assert (known.number, new.number, new.folder) == (1, 3, "3")
    assert ledger.config_file("hash1").read_text() == "seed: 1\n"


def test_a_folder_belongs_to_one_cell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="to two cells, one of them seed=0"):
        filled(tmp_path).add([("other", "0", ["seed=7"], "")])


_CLAIM = """
import sys, time
from pathlib import Path
from heads_lightning.sweeps.ledger import Ledger
with Ledger(Path(sys.argv[1])).claim("hash0") as free:
    print(free, flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_cell_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", _CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    with ledger.claim("hash0") as free:
        assert not free
    assert ledger.is_claimed("hash0")
    process.kill()
    process.wait()
    assert not ledger.is_claimed("hash0")
    with ledger.claim("hash0") as free:
        assert free


_WRITE = """
import sys
from pathlib import Path
from heads_lightning.sweeps.ledger import Ledger, State
ledger = Ledger(Path(sys.argv[1]))
for i in range(50):
    ledger.add([(f"{sys.argv[2]}-{i}", None, [], "")])
    ledger.record(f"{sys.argv[2]}-{i}", State.done)
"""


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", _WRITE, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    entries = list(Ledger.of(tmp_path).entries().values())
    assert sorted(entry.number for entry in entries) == list(range(100))
    assert {entry.state for entry in entries} == {State.done}


# ----------------------------------------------------------------------------------------------------------------- GPUs


def test_jobs_do_not_share_a_slot(tmp_path: Path) -> None:
    with slots(["0", "1", "2"], 2, folder=tmp_path) as first, slots(["0", "1", "2"], 1, folder=tmp_path) as second:
        assert (first, second) == (["0", "1"], ["2"])
    with slots(["0", "1", "2"], 3, folder=tmp_path) as again:
        assert again == ["0", "1", "2"]


def test_which_gpus_a_cell_may_use(tiny: list[str]) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4, GPU-abc"}) == ["4", "GPU-abc"]
    on_gpu = compose([*tiny, "trainer.accelerator=auto"])
    with own_gpus(compose(tiny), {"CUDA_VISIBLE_DEVICES": "4"}) as own:
        assert own == {}  # a cell on the processor
    with own_gpus(on_gpu, {"CUDA_VISIBLE_DEVICES": "4", "SLURM_JOB_ID": "1"}) as own:
        assert own == {}  # the scheduler has handed them out
    with own_gpus(on_gpu, {"CUDA_VISIBLE_DEVICES": "14,15"}) as one, own_gpus(on_gpu, {"CUDA_VISIBLE_DEVICES": "14,15"}) as other:
        assert (one, other) == ({"CUDA_VISIBLE_DEVICES": "14"}, {"CUDA_VISIBLE_DEVICES": "15"})


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def failing(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """A sweep of three cells, the middle one of which fails at its first step; its folder, how it ended, and its overrides."""
    folder = tmp_path_factory.mktemp("failing")
    overrides = [
        *tiny,
        "trainer.linear_kernel=torch",  # as tiny's precision: a cell's saved config says what `auto` took
        "optimizer.max_grad_norm=null",
        "trainer.max_bad_steps=1",
        "optimizer=adamw",
        "optimizer.learning_rate=1e-3,1e30,1e-2",
    ]
    return folder, sweep(folder, *overrides, check=False), overrides


def test_a_failing_cell_is_told_and_the_others_go_on(failing: tuple) -> None:
    folder, done, _ = failing
    assert done.returncode == 1
    assert states(folder) == ["done", "failed", "done"]
    assert "cell 1 FAILED: " in done.stderr
    assert str(folder / "logs" / "1.log") in done.stderr
    assert (
        done.stderr.rstrip()
        .splitlines()[-1]
        .startswith(f"heads-lightning: 1 of 3 cells are not done (failed: 1). Go on with: heads-lightning train -m sweep.resume={folder}")
    )
    assert "Traceback" not in done.stderr
    assert "not finite" in (folder / "logs" / "1.log").read_text()
    assert [saved(folder, i)["optimizer"]["learning_rate"] for i in (0, 1, 2)] == [1e-3, 1e30, 1e-2]


def test_the_comparison_ranks_and_draws(failing: tuple) -> None:
    folder, done, _ = failing
    comparison = rank(folder)
    values = [row.value for row in comparison.rows[:2]]
    assert values == sorted(values)
    assert comparison.rows[2].entry.number == 1
    assert comparison.keys == ["optimizer.learning_rate"]
    assert summary(folder) in done.stderr
    for name in ("curves.png", "parallel.png"):
        (folder / "artifacts" / name).unlink()
    compare(folder)
    assert (folder / "artifacts" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "artifacts" / "parallel.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("metric", "varied", "told"),
    [
        ("val/loss", ("objective=fim", "objective=causal"), "depends on objective."),
        ("train/loss", ("objective.rate=0", "objective.rate=1"), "depends on objective.rate."),
        ("val/loss", ("optimizer.learning_rate=1", "optimizer.learning_rate=2"), ""),
        ("val/loss", ("data.cache_dir=a", "data.cache_dir=b"), ""),
        ("val/loss", ("objective=fim", "objective=fim"), ""),
        ("eval/left_to_right_bits_per_byte", ("objective=fim", "objective=causal"), ""),
    ],
)
def test_losses_over_different_targets_are_not_called_a_ranking(metric: str, varied: tuple[str, str], told: str) -> None:
    rows = [Row(Entry("", i, str(i), (override,)), 1.0, 1, dict([override.split("=")])) for i, override in enumerate(varied)]
    caution = Comparison(metric, rows).caution
    assert bool(caution) == bool(told)
    assert told in caution


def test_a_second_command_runs_what_is_left_and_new_cells(failing: tuple) -> None:
    folder, _, overrides = failing
    before = starts(folder)
    kept = (folder / "0" / "metrics.jsonl").read_bytes()
    more = [*overrides[:-1], "optimizer.learning_rate=1e-3,1e30,3e-3"]
    assert sweep(folder, f"sweep.resume={folder}", *more, check=False).returncode == 1
    assert starts(folder)[len(before) :] == [before[1], list(Ledger.of(folder).entries())[3]]
    assert states(folder) == ["done", "failed", "done", "done"]
    assert "not finite" in list(Ledger.of(folder).entries().values())[1].reason  # as before, from the beginning
    assert (folder / "1-attempt1" / "metrics.jsonl").is_file()
    assert saved(folder, 3)["optimizer"]["learning_rate"] == 3e-3
    assert (folder / "0" / "metrics.jsonl").read_bytes() == kept
    with pytest.raises(ConfigError, match="is the folder of a sweep; name one of its runs"):
        find_checkpoint(str(folder))
    with pytest.raises(ConfigError, match=r"is not the folder of a sweep.*it is one of a run: train resume="):
        settings.read(folder / "0")


def test_fail_fast_starts_no_further_cell(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "optimizer.max_grad_norm=null", "trainer.max_bad_steps=1", "optimizer=adamw", "optimizer.learning_rate=1e30,1e-3"]
    done = sweep(tmp_path, *overrides, "sweep.fail_fast=true", check=False)
    assert done.returncode == 1
    assert states(tmp_path) == ["failed", "pending"]
    assert "2 of 2 cells are not done (failed: 0; not finished: 1)" in done.stderr


_EXITS = """
import sys
from dataclasses import dataclass
from heads_lightning.configs.schedule import ConstantConfig, schedules

@schedules.register("exits")
@dataclass
class ExitsConfig(ConstantConfig):
    name: str = "exits"

    def after_warmup(self, progress, *, steps):
        return 1.0 if progress == 0 else sys.exit(0)
"""


def test_a_cell_that_exits_with_0_in_the_middle_is_a_failure_and_ends_nothing(tiny: list[str], tmp_path: Path) -> None:
    """A plugin that calls sys.exit: Hydra's own sweep would end there, with exit code 0."""
    (tmp_path / "exits.py").write_text(_EXITS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    cells = [*tiny, "schedule=exits,constant", "sweep.warm=false"]
    done = sweep(tmp_path / "s", *cells, check=False, HEADS_LIGHTNING_PLUGINS="exits", PYTHONPATH=path)
    assert done.returncode == 1
    assert states(tmp_path / "s") == ["failed", "done"]
    assert "sys.exit(0) in the middle" in done.stderr
    assert (tmp_path / "s" / "0" / "metrics.jsonl").is_file()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -9),
    ],
)
def test_a_sweep_that_is_stopped_or_killed_goes_on_where_it_was(number: int, code: int, tiny: list[str], tmp_path: Path) -> None:
    line = command(*tiny, "seed=1,2", "trainer.max_steps=3000", "trainer.checkpoint_every_steps=5", f"hydra.sweep.dir={tmp_path}")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "0" / "checkpoints").glob("step-*.ckpt")), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert number == signal.SIGKILL or stderr.endswith(f"  go on with: heads-lightning train -m sweep.resume={tmp_path}\n")
    ledger = Ledger.of(tmp_path)
    identity = next(iter(ledger.entries()))
    end = time.monotonic() + 60
    while ledger.is_claimed(identity):  # a cell whose sweep was killed saves and stops by itself
        assert time.monotonic() < end
        time.sleep(0.1)
    assert states(tmp_path) == ["stopped", "pending"]
    step = max(int(path.stem.split("-")[1]) for path in (tmp_path / "0" / "checkpoints").glob("step-*.ckpt"))
    # the rest of 3000 steps is not waited for: what matters is that it begins there
    again = subprocess.Popen(command(f"sweep.resume={tmp_path}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    points = tmp_path / "0" / "metrics.jsonl"
    steps = lambda: [record["step"] for record in read_records(points) if "train/loss" in record["values"]]  # noqa: E731
    wait_until(lambda: max(steps()) > step + 3, again)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert steps() == list(range(1, max(steps()) + 1))


def servers(pid: int) -> list[psutil.Process]:
    """Warm parents of a process."""
    return [child for child in psutil.Process(pid).children() if child.cmdline()[-1:] == ["--serve"]]


def test_a_warm_parent_that_is_killed_costs_its_cell_alone(tiny: list[str], tmp_path: Path) -> None:
    cells = ["trainer.max_steps=3000,4", "trainer.checkpoint_every_steps=5"]
    process = subprocess.Popen([*command(*tiny, *cells), f"hydra.sweep.dir={tmp_path}"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "0" / "checkpoints").glob("step-*.ckpt")), process)
    (server,) = servers(process.pid)
    (cell,) = [child for child in server.children() if "--serve" in child.cmdline()]
    server.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert not is_there(cell.pid, since=time.time())
    assert states(tmp_path) == ["failed", "done"], stderr
    (lost, _) = Ledger.of(tmp_path).entries().values()
    assert lost.reason == "its warm parent was lost (killed by SIGKILL), so it was stopped"
    assert f"cell 0 FAILED: {lost.reason}" in stderr
    assert stderr.count("the warm parent of the cells was lost (killed by SIGKILL); another one is started") == 1
    assert "Traceback" not in stderr


def test_a_warm_parent_that_is_killed_before_it_forks_says_so(tmp_path: Path) -> None:
    parent = WarmParent(uri=None)
    assert (parent.refusal, parent.ending) == ("", "")
    (server,) = servers(os.getpid())
    server.kill()
    while not parent.ending:
        time.sleep(0.01)
    with pytest.raises(ParentEnded, match="killed by SIGKILL"):
        parent.fork([], log=tmp_path / "log", environment={})
    parent.close()


def test_a_cell_is_run_from_its_resolved_config(failing: tuple) -> None:
    folder, _, _ = failing
    for identity, entry in Ledger.of(folder).entries().items():
        config = from_yaml(folder / "cells" / f"{identity}.yaml")
        assert config_hash(config) == identity
        assert config_hash(from_yaml(folder / entry.folder / "config.yaml")) == identity
    assert json.loads((folder / "sweep.json").read_text())["options"]["resume"] is None


# ------------------------------------------------------------------------------------------------- commands over folders


def test_compare_prints_the_table_of_a_sweep(failing: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    from heads_lightning.__main__ import main

    folder, _, _ = failing
    (folder / "artifacts" / "curves.png").unlink()
    assert main(["compare", str(folder)]) == 0
    assert summary(folder) in capsys.readouterr().out
    assert (folder / "artifacts" / "curves.png").is_file()


_OPEN = """
import os, sys, time
from pathlib import Path
from heads_lightning.configs.tracking import NoTrackingConfig
from heads_lightning.tracking.open_run import open_run

root = Path(sys.argv[1])
log = open_run(NoTrackingConfig(), run_dir=root / sys.argv[2], run_root=root, name=sys.argv[2], config_flat={}, config_yaml="")
log.log_metrics({"val/loss": 2.5}, step=7)
print("open", flush=True)
if sys.argv[2] == "finished":
    log.finish()
else:
    time.sleep(60)
"""


def test_runs_are_listed_and_those_without_a_process_are_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from heads_lightning.__main__ import main

    processes = {}
    for name in ("finished", "alive", "killed"):
        processes[name] = subprocess.Popen([sys.executable, "-c", _OPEN, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        assert processes[name].stdout.readline() == "open\n"
    processes["killed"].kill()
    for name in ("finished", "killed"):
        processes[name].wait()

    def listed() -> dict[str, tuple[str, int, float]]:
        assert main(["runs", f"run_root={tmp_path}", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return {Path(run["folder"]).name: (run["status"], run["step"], run["loss"]) for run in found}

    try:
        assert listed() == {"finished": ("FINISHED", 7, 2.5), "alive": ("RUNNING", 7, 2.5), "killed": ("GONE", 7, 2.5)}
        assert main(["runs", f"run_root={tmp_path}", "--reap"]) == 0
        assert f"KILLED  {tmp_path / 'killed'}\n1 of 3" in capsys.readouterr().out
        assert {name: status for name, (status, *_) in listed().items()} == {"finished": "FINISHED", "alive": "RUNNING", "killed": "KILLED"}
        assert main(["runs", f"run_root={tmp_path}"]) == 0
        assert "KILLED" in capsys.readouterr().out
    finally:
        processes["alive"].kill()
