"""Ctrl-C and SIGTERM outside training (in it they wait for the end of the step: training/saving.py).

They raise where they arrive. In the middle of an import that may be lost (importlib has callbacks) or come out as a module that is broken,
so they are remembered too, and raised again at the next `obey`.
"""

import signal
from types import FrameType

_asked: list[int] = []


class Stopped(SystemExit):
    """A signal asked the process to end. Exits with 128 + the signal's number, as shells expect."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}"


def raise_on_signals() -> None:
    """From now on Ctrl-C and SIGTERM raise, where nobody else handles them."""
    _asked.clear()
    try:
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:
                signal.signal(number, _stop)
    except ValueError:
        pass  # not the main thread: the host program handles its signals


def _stop(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    obey()


def obey() -> None:
    """Raise what a signal has asked for, if one has.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Stopped: SIGTERM.
    """
    if _asked:
        raise KeyboardInterrupt if _asked[-1] == signal.SIGINT else Stopped(_asked[-1])
