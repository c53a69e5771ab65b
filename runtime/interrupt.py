"""Ctrl-C and SIGTERM as a wish that the work grants when it can: the first is noted, the second acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self

from runtime.errors import UserError


class InterruptedRunError(UserError):
    """A run was asked to stop, and has saved all it did; the status is the shell's for that signal, 130 or 143."""

    label = "\n"

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruption:
    """While this is entered, `asked` is the number of the first SIGINT or SIGTERM that came, or 0.

    A second one does what it does elsewhere. Only the main thread gets signals; in others this changes nothing.
    """

    asked = 0

    def __enter__(self) -> Self:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.__exit__()
            signal.raise_signal(number)
        self.asked = number
