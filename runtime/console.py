"""What is said to the person at the terminal while a command runs."""

from __future__ import annotations

import os
import sys
import warnings

_silent = False


def say(message: str) -> None:
    """A line on stderr, so that stdout holds results only."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Whether a person sees what is drawn on stderr."""
    return not _silent and sys.stderr.isatty()


def silence() -> None:
    """Say and print nothing from now on, but for errors: another process of the same command speaks."""
    global _silent
    _silent = True
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    warnings.simplefilter("ignore")
