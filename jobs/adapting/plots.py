"""Pictures of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora.combine import DeltaSize
from runtime.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def grid_of(sizes: Mapping[str, DeltaSize], of: str) -> tuple[list[str], list[str], np.ndarray]:
    """Values by block or head (rows) and kind of linear (columns); NaN where there is none."""
    split = {path: path.rpartition(".")[::2] for path in sizes}
    places = [(parent.removeprefix("blocks.").split(".")[0] or "-", leaf) for parent, leaf in split.values()]
    rows, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in zip(places, sizes.values(), strict=True):
        grid[rows.index(row), columns.index(column)] = getattr(value, of)
    return [f"block {row}" if row != "-" else "head" for row in rows], columns, grid


def _heat(axes: Axes, sizes: dict[str, DeltaSize], of: str, title: str, form: str) -> None:
    rows, columns, grid = grid_of(sizes, of)
    picture = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value) and len(rows) <= 32:
            light = value > 0.6 * np.nanmax(grid)
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, c="black" if light else "white")
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(picture, ax=axes, shrink=0.8)


def draw_sizes(sizes: dict[str, DeltaSize], title: str) -> Figure:
    """How much of each weight an adapter changes, and in how many directions."""
    height = 2 + 0.35 * len(grid_of(sizes, "norm")[0])
    figure = new_figure(title, (12, height))
    left, right = figure.subplots(1, 2)
    _heat(left, sizes, "relative", "size of the change, as a share of the weight's", "{:.2f}")
    _heat(right, sizes, "effective_rank", "effective rank of the change", "{:.1f}")
    return figure


def draw_strengths(strengths: list[float], losses: dict[str, list[float]], roles: dict[str, str], title: str) -> Figure:
    """Held-out loss on each text over the adapter's strength."""
    figure = new_figure(title, (7, 4.5))
    axes = figure.subplots()
    for text, values in losses.items():
        order = sorted(range(len(strengths)), key=strengths.__getitem__)
        label = f"{Path(text).name} ({roles[text]})"
        axes.plot([strengths[i] for i in order], [values[i] for i in order], "-o", ms=4, label=label)
    axes.set_xlabel("strength of the adapter: 0 is the base, 1 the adapter as it was trained")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
