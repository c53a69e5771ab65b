"""Pictures of results as PNG files. matplotlib, which is an extra, is imported where something is drawn."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.console import say
from runtime.errors import UsageError
from runtime.start import install_line
from runtime.storage import folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def without_pictures() -> str:
    """How to get what pictures need; empty where it is there."""
    needed = f"pictures need matplotlib; get it with: {install_line('requirements-plots.txt')}"
    return "" if importlib.util.find_spec("matplotlib") else needed


def check_picture(path: str) -> None:
    """Raises UsageError where a picture was asked for, by --out, that could not be drawn, or not be written there."""
    if path:
        folders.check_free(Path(path))
        if needed := without_pictures():
            raise UsageError(f"--out {path}: {needed}")


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure, with its size in inches; it needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def save_picture(path: Path, draw: Callable[..., Figure], *what: Any) -> bool:
    """Draw and write a PNG; returns whether there is one. Without matplotlib, stderr tells how to get it."""
    if needed := without_pictures():
        say(f"No picture: {needed}")
        return False
    data = io.BytesIO()
    draw(*what).savefig(data, format="png", dpi=150)
    folders.write_file(path, data.getvalue())
    return True
