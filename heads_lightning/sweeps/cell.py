"""One cell of a sweep, as a process of its own: `python -m heads_lightning.sweeps.cell SWEEP_DIR HASH`.

It reads the resolved config that the sweep wrote and trains in the folder that the sweep chose: nothing is composed, parsed or named
again. So every rank of the cell, whether Lightning, torchrun or srun starts it with this same command line, runs the same experiment in
the same place. The first rank holds the claim and writes the ledger.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from heads_lightning.composition.saved import from_yaml
from heads_lightning.configs.experiment import ExperimentConfig
from heads_lightning.registry import ConfigError, RunError
from heads_lightning.sweeps.ledger import FINISHED, Entry, Ledger, State
from heads_lightning.tracking.open_run import open_ahead
from heads_lightning.tracking.process import is_first_rank, status_of
from heads_lightning.tracking.stopping import raise_on_signals
from heads_lightning.training.attempts import continued, set_aside

CLAIMED = 75
"""Exit code of a process that found the cell taken or finished (EX_TEMPFAIL: nothing is wrong, it is for somebody else)."""
PROGRAM = "heads_lightning.sweeps.cell"


def main(arguments: list[str]) -> int:
    """Run the cell; returns the exit code."""
    sweep_dir, identity = Path(arguments[0]), arguments[1]
    if not os.environ.get("LOCAL_RANK"):  # a rank that Lightning started is ended by Lightning
        end_with_parent(signal.SIGTERM)
    raise_on_signals()
    ledger = Ledger.of(sweep_dir)
    if not is_first_rank():
        return _report(lambda: _train(ledger, ledger[identity]))[0]
    with ledger.claim(identity) as free:
        entry = ledger[identity]
        if not free or entry.state in FINISHED:
            return CLAIMED
        return _run(ledger, entry)


def _run(ledger: Ledger, entry: Entry) -> int:
    """Train and write what became of it."""
    began = time.monotonic()
    set_aside(ledger.sweep_dir / entry.folder)
    ledger.record(entry.hash, State.running)
    metrics: dict[str, float] = {}

    def train() -> None:
        metrics.update(_train(ledger, entry))

    code, reason, state = _report(train)
    facts: dict[str, Any] = {"metrics": metrics} if metrics else {}
    ledger.record(entry.hash, state, reason=reason, seconds=round(time.monotonic() - began, 3), **facts)
    return code


def _report(action: Any) -> tuple[int, str, State]:
    """Call it; returns (exit code, reason in one line, what became of the cell). The reason is also the last line of the log."""
    from heads_lightning.sweeps.pruning import Pruned

    try:
        action()
        return 0, "", State.done
    except Pruned as pruned:
        print(pruned, flush=True)
        return 0, str(pruned), State.pruned
    except (ConfigError, RunError) as error:
        print(f"heads-lightning: {error}", file=sys.stderr, flush=True)
        return (2 if isinstance(error, ConfigError) else 1), str(error), State.failed
    except KeyboardInterrupt:
        return 130, "interrupted", State.stopped
    except SystemExit as exit_:
        if status_of(exit_) in ("KILLED", "SCHEDULED"):
            print(f"heads-lightning: {exit_}", file=sys.stderr, flush=True)
            return int(exit_.code or 0), str(exit_), State.stopped
        traceback.print_exc()
        return 1, f"something called sys.exit({exit_.code}) in the middle of training", State.failed
    except BaseException as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500], State.failed


def _train(ledger: Ledger, entry: Entry) -> dict[str, float]:
    """Train in the cell's folder, from its newest checkpoint where it has one; returns the last value of every metric."""
    run_dir = ledger.sweep_dir / entry.folder
    config = continued(from_yaml(ledger.config_file(entry.hash)), run_dir)
    config = replace(config, name=f"{config.name}-{entry.number}")
    open_ahead(config.tracking, run_root=Path(config.run_root))
    from heads_lightning.run import train

    result = train(config, run_dir, parent=str(ledger.sweep_dir), callbacks=_callbacks(ledger, entry, config))
    return result.metrics | (result.report.metrics() if result.report else {})


def _callbacks(ledger: Ledger, entry: Entry, config: ExperimentConfig) -> list[Any]:
    """What acts on this cell alone: the pruner of an Optuna sweep."""
    if entry.trial is None:
        return []
    from heads_lightning.sweeps.pruning import pruning

    return pruning(ledger.sweep_dir, entry.trial)


def end_with_parent(number: int) -> None:
    """Have the kernel send this signal when the process that started this one dies: `kill -9` of a sweep leaves nothing running."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        from heads_lightning.sweeps.warm import serve

        serve()
    else:
        sys.exit(main(sys.argv[1:]))
