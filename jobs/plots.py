"""Pictures of results. matplotlib is imported here only: it is an extra."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("Agg")  # pictures go to files, also where there is a screen
FULL = "#444444"


def _colours(rows: list[dict[str, Any]]) -> list[Any]:
    """Grey for full fine-tuning, one hue from light to dark for the kinds of LoRA."""
    shades = pyplot.get_cmap("viridis")
    kinds = max(1, len(rows) - 1)
    return [FULL, *(shades(0.15 + 0.7 * i / kinds) for i in range(len(rows) - 1))]


def _curves(axes: Axes, rows: list[dict[str, Any]], column: int, label: str) -> None:
    for row, colour in zip(rows, _colours(rows), strict=True):
        axes.plot(
            [p[column] for p in row["curve"]], [p[2] for p in row["curve"]], "-o", ms=3, c=colour, label=row["method"]
        )
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)


def _bars(axes: Axes, rows: list[dict[str, Any]], values: list[float], title: str, form: str) -> None:
    bars = axes.bar([row["method"] for row in rows], values, color=_colours(rows))
    axes.bar_label(bars, labels=[form.format(value) for value in values], fontsize=8, padding=2)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", rotation=30, labelsize=8)
    axes.margins(y=0.15)


def _stacked_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names, bottom = [row["method"] for row in rows], [0.0] * len(rows)
    for phase, shade in (("forward", 1.0), ("backward", 0.7), ("optimizer", 0.4)):
        values = [row["milliseconds"][phase] for row in rows]
        axes.bar(names, values, bottom=bottom, color=_colours(rows), alpha=shade, edgecolor="white", linewidth=0.5)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    for i, total in enumerate(bottom):
        axes.annotate(f"{total:.1f}", (i, total), ha="center", va="bottom", fontsize=8)
    axes.set_title("ms a step: forward, backward, optimizer (from below)", fontsize=10)
    axes.tick_params(axis="x", rotation=30, labelsize=8)
    axes.margins(y=0.15)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    pyplot.close(figure)
    return data.getvalue()


def draw_comparison(rows: list[dict[str, Any]], title: str) -> bytes:
    """Loss over steps and over seconds, step times and memory of each method, as the bytes of a PNG."""
    figure, ((steps, seconds), (times, memory)) = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(textwrap.fill(title, 110), fontsize=11)
    _curves(steps, rows, 0, "steps")
    steps.legend(fontsize=8)
    _curves(seconds, rows, 1, "seconds of training")
    _stacked_times(times, rows)
    if all(row["peak_memory"] for row in rows):
        _bars(memory, rows, [row["peak_memory"] / 1e6 for row in rows], "peak memory, MB", "{:.0f}")
    else:
        _bars(memory, rows, [row["file_bytes"] / 1e6 for row in rows], "size of what is saved, MB", "{:.2f}")
    return _png(figure)
