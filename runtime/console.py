"""What is said to the person at the terminal while a command runs."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """A line on stderr, so that stdout holds results only."""
    print(message, file=sys.stderr, flush=True)
