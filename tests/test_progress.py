"""What a run shows while it trains: plain lines in a log, a bar on a terminal, the same numbers in both."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from heads_lightning import compose
from heads_lightning.run import train
from heads_lightning.training.callbacks import ProgressCallback


def shown(tiny: list[str], run_dir: Path, *, terminal: bool) -> tuple[str, float]:
    """(everything that a run printed before its summary, its last training loss)."""
    out = io.StringIO()
    result = train(compose(tiny), run_dir, console=Console(file=out, force_terminal=terminal, width=140, legacy_windows=False))
    return out.getvalue().split("Training\n")[0], result.metrics["train/loss"]


def test_plain_lines_say_stage_numbers_memory_and_time_left(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressCallback, "PLAIN_SECONDS", 0.0)
    text, loss = shown(tiny, tmp_path / "run", terminal=False)
    lines = [line for line in text.splitlines() if line.startswith("train ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(re.search(r"loss \d\.\d{3}  tok/s [\d,]+  \d+\.\d GB  0:\d\d:\d\d left$", line) for line in lines[:-1]), lines
    assert re.search(r"loss (\d\.\d{3})", lines[-1])[1] == f"{loss:.3f}"  # pyright: ignore[reportOptionalSubscript]
    assert "left" not in lines[-1]
    assert "\x1b" not in text


def test_a_terminal_gets_a_bar_that_is_closed(tiny: list[str], tmp_path: Path) -> None:
    text, _ = shown(tiny, tmp_path / "run", terminal=True)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").strip().splitlines()[-1]
    assert re.match(r"train .* 4/4 .*loss \d\.\d{3}  val \d\.\d{3}.* GB", last), last
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
