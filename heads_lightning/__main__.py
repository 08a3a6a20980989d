"""The command `heads-lightning` (= `python -m heads_lightning`): picks the command, and turns what goes wrong into one line.

Commands are imported when they are called, and none imports torch before it needs it: help, a composed configuration and a
mistake are answered in a fraction of a second. Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command of the program."""

    target: str
    """`module:function`; the function takes the arguments after the command's name."""
    summary: str
    """One line for the list of commands."""
    usage: str
    """What follows the command's name."""
    examples: tuple[str, str]
    """Two lines that work as they are."""


HYDRA = "[GROUP=OPTION] [GROUP.FIELD=VALUE] … [-m] [--cfg job]"

COMMANDS: dict[str, Command] = {
    "train": Command(
        "heads_lightning.commands.hydra_application:train",
        "prepare data, train, evaluate, save",
        HYDRA,
        ("train experiment=fim_proof", "train -m objective=causal,fim head.loss_implementation=default,chunked"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module, function = COMMANDS[arguments[0]].target.split(":")
    getattr(importlib.import_module(module), function)(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
