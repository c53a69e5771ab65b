"""Ctrl-C, SIGTERM and SIGHUP ask the work to stop when it can: the first is noted, the second acts at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Self

from runtime.errors import UserError

# SIGHUP comes when the terminal is closed; Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class InterruptedRunError(UserError):
    """A run was asked to stop, and has saved all it did; the status is the shell's for that signal, as 130 or 143."""

    label = "\n"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """While this is entered, `asked` is the number of the first of these signals that came, or 0.

    A second one does what it does elsewhere; with `repeats`, one that comes within a second is none. One that is
    ignored, as SIGHUP is under nohup, stays ignored. Only the main thread gets signals; in others this changes nothing.
    """

    asked, at = 0, 0.0

    def __init__(self, repeats: bool = False) -> None:
        self.repeats = repeats

    def __enter__(self) -> Self:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self.before = {n: signal.signal(n, self._note) for n in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self.repeats and time.monotonic() - self.at < 1:
            return
        if self.asked:
            self.__exit__()
            signal.raise_signal(number)
        self.asked, self.at = number, time.monotonic()
