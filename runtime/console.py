"""What is said to the person at the terminal while a command runs."""

from __future__ import annotations

import os
import sys
import warnings

from runtime.settings.terminal import can_draw_over, wants_colours

_silent = False


def say(message: str) -> None:
    """A line on stderr, so that stdout holds results only."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


def is_terminal() -> bool:
    """Whether a person sees what is drawn on stderr, one thing over another."""
    return not _silent and sys.stderr.isatty() and can_draw_over()


def terminal_width() -> int:
    """How many characters fit into a line of what is drawn there."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # whatever stands for stderr has no width
        return 80


def has_colours() -> bool:
    """Whether what is drawn there may be coloured."""
    return is_terminal() and wants_colours()


def silence() -> None:
    """Say and print nothing from now on, but for errors: another process of the same command speaks."""
    global _silent
    _silent = True
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    warnings.simplefilter("ignore")
