"""The command `heads-lightning` (= `python -m heads_lightning`): picks the command, and turns what goes wrong into one line.

Commands are imported when they are called, and none imports torch before it needs it: help, a composed configuration and a
mistake are answered in a fraction of a second. Exit codes: 0 done, 1 failed, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM.
"""

import gc
import logging
import os
import sys

USER_WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
"""Read before Hydra is told to raise instead of print (commands/hydra_application.py)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit code.

    Args:
        arguments: what follows the program's name; None: the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    gc.set_threshold(50_000, 20, 50)  # what a command imports and composes stays: looking for cycles 70 times as often takes a tenth of it
    from heads_lightning.commands import dispatch

    code = dispatch.guarded(lambda: dispatch.run(given), traceback=USER_WANTS_TRACEBACK)
    if arguments is None and code > 128:
        logging.disable(logging.INFO)  # torch, stopped in the middle of its import, reports its caches on the way out
    if arguments is None and not {"torch", "mlflow"} & sys.modules.keys():
        gc.freeze()  # Python ends by looking for cycles in everything that was imported: a quarter of the time of a short command
    return code


if __name__ == "__main__":
    sys.exit(main())
