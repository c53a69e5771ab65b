"""The charts of a report as a picture by matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.reporting.blocks import Lines, Page, Section
from runtime.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def charts_of(page: Page) -> list[Lines]:
    """All charts of lines, in their order."""

    def inside(section: Section) -> Iterator[Lines]:
        yield from (block for block in section.blocks if isinstance(block, Lines))
        for below in section.below:
            yield from inside(below)

    return [chart for section in page.sections for chart in inside(section)]


def draw_charts(charts: list[Lines], title: str) -> Figure:
    """Charts of lines, two in a row."""
    rows = -(-len(charts) // 2)
    figure = new_figure(title, (11, 0.6 + 3.6 * rows))
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, chart in zip(panels, charts, strict=False):
        for series in chart.series:
            xs, ys = zip(*series.points, strict=True)
            style = "--" if series.colour >= 8 else "-"
            axes.plot(
                xs, ys, style, marker="o" if series.dots else None, ms=3, c=f"C{series.colour}",
                alpha=0.5 if series.faint else 1, lw=1 if series.faint else 1.6, label=series.name.replace("$", r"\$"),
            )  # fmt: skip
        axes.set_title(chart.caption, fontsize=10)
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        axes.set_ylim(bottom=0 if chart.from_zero else None)
        axes.grid(alpha=0.3)
        if len(chart.series) > 1:
            axes.legend(fontsize=8)
    for axes in panels[len(charts) :]:
        axes.set_visible(False)
    return figure
