"""Compare: runs side by side, ranked by one measure of the held-out protocol; or the cells of one sweep, with its pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from heads_lightning.commands.arguments import read
from heads_lightning.configs.requests import CompareRequest
from heads_lightning.registry import ConfigError, nearest
from heads_lightning.tracking.run_folder import EVENTS

Arguments = CompareRequest
"""What the command takes, beside the runs."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning compare (SWEEP | RUN RUN … [by=MEASURE]) [html=FILE] [--json]`."""
    runs = [word for word in arguments if not _is_setting(word)]
    request, _ = read(CompareRequest, [word for word in arguments if _is_setting(word)])
    if not runs:
        raise ConfigError("compare needs runs: heads-lightning compare runs/NAME/DATE runs/NAME/DATE")
    if len(runs) == 1 and _is_sweep(Path(runs[0])):
        _sweep(Path(runs[0]), request)
        return
    from heads_lightning.evaluation.comparison import compare, read_run, table_text

    folders = [_folder(run, request) for run in runs]
    rows = [read_run(folder) for folder in folders]
    comparison = compare(rows, request.by)
    print(json.dumps(comparison, indent=1) if request.json else table_text(comparison))
    if request.html is not None:
        from heads_lightning.html_comparison import comparison_page

        _write(request.html, comparison_page(comparison, {row.name: folder for row, folder in zip(rows, folders, strict=True)}))


def _sweep(folder: Path, request: CompareRequest) -> None:
    """The cells of a sweep."""
    if request.by is not None:
        raise ConfigError(f"by={request.by} ranks runs; a sweep is ranked by the sweep.metric that it was started with: leave by out")
    from heads_lightning.sweeps.comparison import PAGE, cells, columns, rank, report

    text = report(folder)
    if request.json:
        comparison = rank(folder)
        print(json.dumps([dict(zip(columns(comparison), row, strict=True)) for row in cells(comparison)], indent=1))
    else:
        print(text)
    if request.html is not None:
        _write(request.html, (folder / PAGE).read_text(encoding="utf-8"))


def _write(file: str, text: str) -> None:
    """Write a page; one line where that cannot be."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"html={file} cannot be written: {error.strerror}") from None


def _is_sweep(folder: Path) -> bool:
    from heads_lightning.sweeps.ledger import FILE

    return (folder / FILE).is_file()


def _is_setting(word: str) -> bool:
    return word.startswith("--") or ("=" in word and not Path(word).exists())  # a run folder may have an = in its name


def _folder(run: str, request: CompareRequest) -> Path:
    """The run folder that a folder, a checkpoint in it or an MLflow run id names."""
    path = Path(run).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent.parent
    from heads_lightning.tracking.open_run import find_run_dir

    folder = find_run_dir(run, Path(request.run_root))
    if folder is None:
        runs = (str(events.parent) for events in Path(request.run_root).rglob(EVENTS))
        raise ConfigError(f"{run} is no run folder and no MLflow run id known in {request.run_root}.{nearest(run, runs)}")
    return folder
