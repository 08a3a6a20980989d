"""The Optuna study of a sweep: its storage, its search space, and what the pruner says. The only file that imports Optuna."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from heads_lightning.composition.mistakes import parse
from heads_lightning.configs.sweep import Pruner, Sampler, SweepConfig
from heads_lightning.registry import ConfigError
from heads_lightning.sweeps.ledger import Entry, State

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

JOURNAL = "optuna.journal"
CELL = "cell"
"""User attribute of a trial: the hash of its cell."""


def require_optuna() -> Any:
    """The module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("hydra/sweeper=optuna needs Optuna; install it with: pip install 'heads-lightning[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(sweep_dir: Path, options: SweepConfig) -> optuna.Study:
    """The study of a sweep, created where it is missing; any number of processes may have it open."""
    optuna = require_optuna()
    return optuna.create_study(
        study_name=sweep_dir.name,
        storage=_storage(sweep_dir, options),
        load_if_exists=True,
        direction=str(options.direction),
        sampler=_sampler(options),
        pruner=_pruner(options),
    )


def _storage(sweep_dir: Path, options: SweepConfig) -> Any:
    if options.storage is not None:
        return options.storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(sweep_dir / JOURNAL)))


def _sampler(options: SweepConfig) -> Any:
    from optuna import samplers

    if options.sampler == Sampler.random:
        return samplers.RandomSampler(seed=options.seed)
    if options.sampler == Sampler.quasi_random:
        return samplers.QMCSampler(seed=options.seed)
    # several cells are proposed before any is finished: a running one counts as a bad one, so that they differ
    return samplers.TPESampler(seed=options.seed, n_startup_trials=options.startup_trials, constant_liar=options.batch > 1)


def _pruner(options: SweepConfig) -> Any:
    from optuna import pruners

    return {
        Pruner.none: pruners.NopPruner,
        Pruner.median: lambda: pruners.MedianPruner(n_startup_trials=options.startup_trials),
        Pruner.halving: pruners.SuccessiveHalvingPruner,
        Pruner.hyperband: pruners.HyperbandPruner,
    }[options.pruner]()


def judge(study: optuna.Study, number: int, *, step: int, value: float) -> bool:
    """Report a trial's value at a step; returns whether the pruner would end it."""
    storage = study._storage
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    known = storage.get_trial(trial_id).intermediate_values
    if step not in known:  # a cell that went on from a checkpoint passes some steps again
        storage.set_trial_intermediate_value(trial_id, step, value)
    return study.pruner.prune(study, storage.get_trial(trial_id))


def tell(study: optuna.Study, number: int, entry: Entry, metric: str) -> None:
    """What became of the cell of a trial; nothing where it is to be run again."""
    value = entry.metrics.get(metric, math.nan)
    if entry.state == State.done and not math.isnan(value):
        study.tell(number, value)
    elif entry.state == State.pruned:
        study.tell(number, state=require_optuna().trial.TrialState.PRUNED)
    elif entry.state in (State.done, State.failed):  # done without a value: its held-out data has no target
        tell_failed(study, number)


def tell_failed(study: optuna.Study, number: int) -> None:
    """The trial has no value to learn from."""
    study.tell(number, state=require_optuna().trial.TrialState.FAIL)


# --------------------------------------------------------------------------------------------------------- search space


def search_space(overrides: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """(overrides that are fixed, what is searched by key).

    Raises:
        ConfigError: a sweep that has no meaning here.
    """
    fixed, space = [], {}
    for override in parse(overrides):
        if override.is_sweep_override():
            space[override.get_key_element()] = _distribution(override)
        else:
            fixed.append(str(override.input_line))
    if not space:
        raise ConfigError("nothing is searched; write e.g. optimizer.learning_rate='tag(log, interval(1e-4, 1e-2))' or head=default,mlm")
    return fixed, space


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, text = override.value(), str(override.input_line)
    if isinstance(sweep, ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    log = "log" in sweep.tags if isinstance(sweep, IntervalSweep | RangeSweep) else False
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        if low is None or high is None or not low < high:
            raise ConfigError(f"`{text}`: the first end of an interval is the smaller one")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    if isinstance(sweep, RangeSweep) and not log and sweep.start is not None and sweep.stop is not None:
        whole = all(isinstance(value, int) for value in (sweep.start, sweep.stop, sweep.step))
        # Hydra's ranges leave out their end, Optuna's hold it
        values = [float(v) for v in override.sweep_string_iterator()]
        if whole:
            return IntDistribution(int(values[0]), int(values[-1]), step=int(sweep.step))
        return FloatDistribution(values[0], values[-1], step=float(sweep.step))
    raise ConfigError(
        f"`{text}` cannot be searched; use A,B,C or interval(LOW, HIGH) or tag(log, interval(LOW, HIGH)) or range(LOW, HIGH, STEP)"
    )


def ask(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> tuple[optuna.Trial, list[str]]:
    """A new trial and its overrides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=Warning)  # samplers announce that they are experimental
        trial = study.ask(dict(space))
    return trial, [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in trial.params.items()]
