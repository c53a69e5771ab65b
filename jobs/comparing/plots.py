"""Pictures of comparisons and sweeps."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from runtime.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = "#444444"


def _colours(rows: list[dict[str, Any]]) -> list[Any]:
    """Grey for full fine-tuning, one hue from light to dark for the kinds of LoRA."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
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


def draw_comparison(rows: list[dict[str, Any]], title: str) -> Figure:
    """Loss over steps and over seconds, step times and memory of each method."""
    figure = new_figure(textwrap.fill(title, 110), (11, 8))
    (steps, seconds), (times, memory) = figure.subplots(2, 2)
    _curves(steps, rows, 0, "steps")
    steps.legend(fontsize=8)
    _curves(seconds, rows, 1, "seconds of training")
    _stacked_times(times, rows)
    if all(row["peak_memory"] for row in rows):
        _bars(memory, rows, [row["peak_memory"] / 1e6 for row in rows], "peak memory, MB", "{:.0f}")
    else:
        _bars(memory, rows, [row["file_bytes"] / 1e6 for row in rows], "size of what is saved, MB", "{:.2f}")
    return figure


def draw_kinds(rows: list[dict[str, Any]], title: str) -> Figure:
    """What each kind of adapter comes to: its loss over what it trains, and its step beside full fine-tuning's.

    The bars of a loss are the range of its seeds, the dashed line is full fine-tuning's.
    """
    figure = new_figure(textwrap.fill(title, 110), (11, 4.6))
    losses, times = figure.subplots(1, 2)
    for row, colour in zip(rows, _colours(rows), strict=True):
        middle, size = row["loss_at_equal_steps"], row["adapter"] or row["trainable"]
        reach = [[middle - min(row["losses"])], [max(row["losses"]) - middle]]
        losses.errorbar(size, middle, reach, fmt="o", c=colour, capsize=3, label=row["method"])
    losses.axhline(rows[0]["loss_at_equal_steps"], c=FULL, lw=0.8, ls="--")
    losses.set_xscale("log")
    losses.set_xlabel("trained parameters beside the embeddings")
    losses.set_ylabel("validation loss at equal steps")
    losses.grid(alpha=0.3)
    losses.legend(fontsize=8)
    _bars(times, rows, [row["step_over_full"].value for row in rows], "time of a step, full fine-tuning = 1", "{:.2f}")
    return figure


def draw_sweep(cells: list[dict[str, Any]], title: str) -> Figure:
    """LoRA's part of a full step's time over width and rank, a panel for each batch.

    Blue is where LoRA's step is the faster one, red where the full step is.
    """
    batches, ranks, widths = (sorted({cell[key] for cell in cells}) for key in ("batch", "rank", "width"))
    by = {(cell["batch"], cell["width"], cell["rank"]): cell["ratio"] for cell in cells}
    size = (2.2 + 0.75 * len(ranks) * len(batches) + 0.6 * len(batches), 1.9 + 0.55 * len(widths))
    figure = new_figure(textwrap.fill(title, int(10 * size[0])), size)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        found = [[by[batch, width, rank] for rank in ranks] for width in widths]
        values = [[ratio.value for ratio in row] for row in found]
        image = axes.imshow(values, cmap="RdBu_r", vmin=0.7, vmax=1.3, aspect="auto", origin="lower")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "white" if abs(value - 1) > 0.2 else "black"
                axes.text(
                    j,
                    i,
                    f"{value:.2f}{'?' * (found[i][j].below_one is None)}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=colour,
                )
        axes.set_title(f"batch {batch}", fontsize=10)
        axes.set_xticks(range(len(ranks)), ranks)
        axes.set_yticks(range(len(widths)), widths)
        axes.set_xlabel("rank")
    panels[0][0].set_ylabel("width")
    figure.colorbar(image, ax=panels[0].tolist(), label="LoRA step / full step\n(?: too noisy to say)", extend="both")
    return figure
