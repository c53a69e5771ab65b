"""A histogram of lengths: on the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from runtime.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS, WIDTH = 12, 40  # bins, of which the last has everything longer; characters of the longest bar
STEPS = (1, 2, 5)


def edges_of(lengths: Sequence[int]) -> list[int]:
    """Where bins of one round width begin, such that all but the longest hundredth are in those before the last."""
    low, high = min(lengths), int(np.percentile(np.asarray(lengths), 99))
    widths = (step * 10**power for power in range(12) for step in STEPS)
    width = next(width for width in widths if low - low % width + width * (BINS - 1) > high)
    return list(range(low - low % width, high + width + 1, width))


def histogram(lengths: Sequence[int], context: int) -> str:
    """A bar a bin, with how many records are in it and which of them are too long for the context."""
    edges = edges_of(lengths)
    counts = np.histogram(np.asarray(lengths), [*edges, np.inf])[0].tolist()
    names = [_range(low, high - 1) for low, high in zip(edges, edges[1:], strict=False)] + [f"{edges[-1]:,} or more"]
    while not counts[-1]:
        counts.pop()
    most, wide = max(counts), max(map(len, names[: len(counts)]))
    lines = []
    for name, low, count in zip(names, edges, counts, strict=False):
        bar = "█" * round(WIDTH * count / most) or "▏" * bool(count)
        beyond = "  beyond the context" if low > context and count else ""
        lines.append(f"{name:>{wide}}  {count:>{len(f'{most:,}')},}  {bar}{beyond}".rstrip())
    return "\n".join(lines)


def _range(low: int, high: int) -> str:
    return f"{low:,}-{high:,}" if low < high else f"{low:,}"


def draw_lengths(lengths: Sequence[int], learned: Sequence[int], context: int, title: str, label: str) -> Figure:
    """Histograms of records and of what is learned of them, with the context's end; the longest are in the last bar."""
    figure = new_figure(title, (7, 4.2))
    axes = figure.subplots()
    shown = max(1, int(np.percentile(np.asarray(lengths), 99.5)))  # one record of a whole book hides all others
    edges = np.linspace(0, shown + 1, 61)
    axes.hist(np.minimum(lengths, shown), edges, color="0.72", label="whole records")
    axes.hist(np.minimum(learned, shown), edges, color="tab:green", alpha=0.7, label="what is learned of them")
    if context < 2 * shown:
        axes.axvline(context, color="tab:red", ls="--", lw=1.2, label=f"context: {context:,}")
    more = f" (above {shown:,}: in the last bar)" if max(lengths) > shown else ""
    axes.set_xlim(0)
    axes.set_xlabel(f"{label}{more}")
    axes.set_ylabel("records")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
