"""Progress of a preparation: one line a stage in a log, a bar that leaves nothing behind on a terminal."""

import io

from rich.console import Console

from heads_lightning.data.progress import PreparationProgress


def steps(progress: PreparationProgress) -> None:
    for stage, total in (("tokenizer", 1), ("tokens", 3), ("shards", 3)):
        for done in range(total + 1):
            progress(stage, done, total)
    progress.close()


def test_one_line_a_stage_in_a_log():
    out = io.StringIO()
    steps(PreparationProgress(Console(file=out, force_terminal=False)))
    assert out.getvalue().splitlines() == [
        "preparing data: training the tokenizer …", "preparing data: tokenising …", "preparing data: writing shards …"]  # fmt: skip


def test_a_bar_on_a_terminal_counts_parts():
    out = io.StringIO()
    progress = PreparationProgress(Console(file=out, force_terminal=True, width=100))
    progress("tokens", 0, 3)
    progress("tokens", 2, 3)
    assert progress._bar is not None
    (task,) = progress._bar.tasks
    assert (task.completed, task.total) == (2, 3)
    steps(progress)
    assert progress._bar is None
