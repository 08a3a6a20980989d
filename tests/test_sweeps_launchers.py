"""Sweeps through Hydra's launchers, and cells that Optuna proposes and prunes. Each launcher is real; those not installed are skipped."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_sweeps import starts, states, sweep

from heads_lightning.configs.sweep import Pruner, Sampler, SweepConfig
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps import settings
from heads_lightning.sweeps.ledger import Entry, Ledger, State
from heads_lightning.tracking.run_folder import read_metrics, read_records

LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"]),
    "ray": (
        "hydra_plugins.hydra_ray_launcher",
        [
            "+hydra.launcher.ray.remote.num_cpus=1",
            "+hydra.launcher.ray.init.num_cpus=2",
            "+hydra.launcher.ray.init.include_dashboard=false",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_cells_side_by_side_in_processes_of_a_launcher(launcher: str, tiny: list[str], tmp_path: Path) -> None:
    """One cell of three fails; every launcher runs each cell once, in its own folder, and the exit code tells."""
    plugin, options = LAUNCHERS[launcher]
    pytest.importorskip(plugin)
    unstable = ["optimizer=adamw", "optimizer.max_grad_norm=null", "trainer.max_bad_steps=1", "optimizer.learning_rate=1e-3,1e30,1e-2"]
    done = sweep(tmp_path, *tiny, *unstable, f"hydra/launcher={launcher}", *options, check=False)
    assert done.returncode == 1, done.stderr
    assert states(tmp_path) == ["done", "failed", "done"]
    assert len(starts(tmp_path)) == len(set(starts(tmp_path))) == 3
    assert "1 of 3 cells are not done (failed: 1)" in done.stderr
    assert all((tmp_path / str(i) / "config.yaml").is_file() for i in (0, 1, 2))


SEARCH = ["optimizer=adamw", "optimizer.learning_rate=tag(log, interval(1e-5, 1e-1))", "hydra/sweeper=optuna"]


@pytest.mark.slow
def test_optuna_prunes_across_processes_and_its_study_goes_on(tiny: list[str], tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    from heads_lightning.sweeps.study import open_study

    length = ["trainer.max_steps=6", "trainer.val_every_steps=2"]
    sweep(tmp_path, *tiny, *SEARCH, *length, "sweep.trials=5", "sweep.pruner=median", "sweep.startup_trials=2")
    found = states(tmp_path)
    assert len(found) == 5
    assert "pruned" in found
    study = open_study(tmp_path, settings.read(tmp_path).options)
    assert [str(trial.state.name) for trial in study.trials] == [{"done": "COMPLETE", "pruned": "PRUNED"}[state] for state in found]
    best = min((entry for entry in Ledger.of(tmp_path).entries().values() if entry.state == "done"), key=lambda e: e.metrics["val/loss"])
    assert study.best_value == best.metrics["val/loss"]
    for entry in Ledger.of(tmp_path).entries().values():
        steps = [point.step for point in read_metrics(tmp_path / entry.folder)]
        assert (max(steps) == 6) is (entry.state == "done")
    # the same study, one cell more; nothing is run again
    sweep(tmp_path, f"sweep.resume={tmp_path}", "sweep.trials=6")
    assert states(tmp_path)[:5] == found
    assert len(starts(tmp_path)) == 6
    assert optuna is not None


@pytest.mark.slow
def test_optuna_with_cells_side_by_side(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    together = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep.batch=2", "sweep.trials=3", "seed=1,2,3"]
    sweep(tmp_path, *tiny, *SEARCH, *together)
    assert states(tmp_path) == ["done"] * 3
    running = [(record["state"], record["time"]) for record in read_records(tmp_path / "ledger.jsonl") if "state" in record]
    assert [state for state, _ in sorted(running, key=lambda item: item[1])][:2] == ["running", "running"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=range(1,4)", None),
        ("optimizer.learning_rate=interval(1e-2, 1e-4)", "the first end"),
        ("optimizer.learning_rate=glob(*)", "cannot be searched"),
        ("seed=3", "nothing is searched"),
    ],
)
def test_search_spaces(override: str, message: str | None) -> None:
    pytest.importorskip("optuna")
    from heads_lightning.sweeps.study import search_space

    if message is None:
        (space,) = search_space([override])[1].values()
        assert (space.low, space.high) == (1, 3)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        with pytest.raises(ConfigError, match=message):
            search_space([override])


def test_a_cell_without_the_metric_is_nothing_to_learn_from(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from heads_lightning.sweeps.study import ask, open_study, search_space, tell

    study = open_study(tmp_path, SweepConfig())
    _, space = search_space(["seed=1,2"])
    for metrics, state in (
        ({"val/loss": 2.0}, "done"),
        ({"train/loss": 1.0}, "done"),
        ({"val/loss": math.nan}, "done"),
        ({}, "pruned"),
        ({}, "failed"),
    ):
        trial, _ = ask(study, space)
        tell(study, trial.number, Entry("hash", 0, "0", (), state=State(state), metrics=metrics), "val/loss")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL", "PRUNED", "FAIL"]
    assert study.best_value == 2.0


@pytest.mark.parametrize("options", [*({"sampler": s} for s in Sampler), *({"pruner": p} for p in Pruner)], ids=str)
def test_every_sampler_and_pruner_opens(options: dict, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    from heads_lightning.sweeps.study import ask, judge, open_study, search_space

    study = open_study(tmp_path, SweepConfig(**options))
    _, space = search_space(["optimizer.learning_rate=tag(log, interval(1e-5, 1e-1))"])
    trial, (override,) = ask(study, space)
    assert 1e-5 <= float(override.partition("=")[2]) <= 1e-1
    assert judge(study, trial.number, step=2, value=1.0) is False
