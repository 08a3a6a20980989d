"""`compare`: the cells of a sweep ranked, and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heads_lightning.registry import ConfigError


@dataclass
class Arguments:
    """Nothing but the folder."""


def main(arguments: Sequence[str]) -> None:
    """`heads-lightning compare SWEEP`: the folder of a sweep, finished or not."""
    from heads_lightning.sweeps.comparison import report
    from heads_lightning.sweeps.ledger import FILE

    if len(arguments) != 1 or not (Path(arguments[0]) / FILE).is_file():
        raise ConfigError(f"compare takes the folder of a sweep (it holds {FILE}): heads-lightning compare runs/sweeps/DATE")
    print(report(Path(arguments[0])))
