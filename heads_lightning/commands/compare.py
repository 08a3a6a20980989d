"""Compare: runs side by side, ranked by one measure of the held-out protocol; or the cells of one sweep, with its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import CompareRequest
from heads_lightning.registry import ConfigError

Arguments = CompareRequest
"""What the command takes, beside the runs."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning compare (SWEEP | RUN RUN … [by=MEASURE] [json=true | --json])`."""
    if len(arguments) == 1 and _is_sweep(Path(arguments[0])):
        from heads_lightning.sweeps.comparison import report

        print(report(Path(arguments[0])))
        return
    from heads_lightning.comparison import compare, read_run, table_text

    settings = ["json=true" if word == "--json" else word for word in arguments if word == "--json" or _is_setting(word)]
    runs = [word for word in arguments if word != "--json" and not _is_setting(word)]
    request, _ = read(CompareRequest, settings)
    if not runs:
        raise ConfigError("compare needs runs: heads-lightning compare runs/NAME/DATE runs/NAME/DATE")
    rows = [read_run(folder) for run in runs for folder in [_folder(run, request)]]
    comparison = compare(rows, request.by)
    print(json.dumps(comparison, indent=1) if request.json else table_text(comparison))


def _is_sweep(folder: Path) -> bool:
    from heads_lightning.sweeps.ledger import FILE

    return (folder / FILE).is_file()


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).exists()  # a run folder may have an = in its name


def _folder(run: str, request: CompareRequest) -> Path:
    """The run folder that a folder, a checkpoint in it or an MLflow run id names."""
    path = Path(run).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent.parent
    from heads_lightning.training.tracking import find_run_dir

    folder = find_run_dir(run, Path(request.run_root))
    if folder is None:
        raise ConfigError(f"{run} is no run folder and no MLflow run id known in {request.run_root}")
    return folder
