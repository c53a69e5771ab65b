"""What the environment asks of what is drawn on a terminal, by the variables that all programs share."""

from __future__ import annotations

import os


def can_draw_over() -> bool:
    """Whether a line on the terminal can be drawn over; TERM=dumb says that none can."""
    return os.environ.get("TERM") != "dumb"


def wants_colours() -> bool:
    """Whether colours are welcome: not where NO_COLOR is set to anything (no-color.org)."""
    return not os.environ.get("NO_COLOR")
