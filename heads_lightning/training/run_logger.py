"""Lightning's logger interface on a RunLog, so that `self.log` in any LightningModule lands in the run's record.

The RunLog owns the run: Lightning's `finalize` only flushes, since Lightning calls it too late (never for an exception before `fit`) and
with the wrong word (Ctrl-C is "failed"). Lightning calls a logger on the first rank alone.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from heads_lightning.tracking.open_run import RunLog


class RunLogger(Logger):
    """Passes metrics on. A metric called `tokens` becomes the point's token count."""

    def __init__(self, log: RunLog) -> None:
        super().__init__()
        self.log = log

    @property
    @override
    def name(self) -> str:
        return self.log.run_dir.name

    @property
    @override
    def version(self) -> str:
        return self.log.run_id or ""

    @property
    @override
    def save_dir(self) -> str:
        # Lightning puts checkpoints without a folder of their own here, instead of in the working folder
        return str(self.log.run_dir)

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        # Lightning adds `epoch` to every point; here the position in the data is the step and the token count
        values = {name: value for name, value in metrics.items() if name not in ("epoch", "tokens")}
        tokens = metrics.get("tokens")
        self.log.log_metrics(values, step=step or 0, tokens=None if tokens is None else int(tokens))

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the whole configuration was recorded when the run was opened."""

    @override
    @rank_zero_only
    def save(self) -> None:
        """Nothing: Lightning calls it after every point, and a point is in the folder once it is logged."""

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.log.flush()
