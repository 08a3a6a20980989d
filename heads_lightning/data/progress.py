"""How far a preparation is: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STAGES = {
    "waiting": "waiting for another run that prepares the same data",
    "tokenizer": "training the tokenizer",
    "tokens": "tokenising",
    "shards": "writing shards",
}
_LAST = "shards"


class PreparationProgress:
    """Call it as data.prepare.Progress: progress(stage, done, total). Says nothing when nothing is done.

    Args:
        console: where to draw or print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A stage has got so far."""
        if not self._console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = 0
                self._console.print(f"preparing data: {STAGES.get(stage, stage)} …", highlight=False, soft_wrap=True)
            return
        if self._bar is None:
            columns = (TextColumn("preparing data: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(STAGES.get(stage, stage), total=total)
        self._bar.update(self._bar.task_ids[list(self._tasks).index(stage)], completed=done, total=total)
        if stage == _LAST and done == total:
            self.close()

    def close(self) -> None:
        """Leave the terminal in order, also after a failure."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
