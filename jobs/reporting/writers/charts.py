"""Charts as SVG, drawn by hand: axes, ticks and lines, and a bar of parts. Colours are classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import count

from jobs.reporting.blocks import Bar, Lines, Series

WIDTH, HEIGHT = 420, 250  # units, about as many pixels on a wide screen and 0.8 of them on a phone
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 10, 40
COLOURS = 8

_numbers = count(1)  # what an SVG's title and description are called must be new in the page


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low to high, in steps of 1, 2 or 5 times a power of ten."""
    if not low < high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in words, all with as many digits as tell them apart: `10k` for ten thousand, `1e-3` for small ones."""
    largest, step = max(map(abs, values)), values[1] - values[0]
    if largest < 1e-2:
        return [f"{value:.2g}" if value else "0" for value in values]
    scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1, "")
    digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    return [f"{value / scale:,.{digits}f}{unit if value else ''}" for value in values]


def image(kind: str, title: str, description: str, inside: Sequence[str], view: str = "") -> str:
    """An SVG with a title and a description for who cannot see it. view: the units that it is drawn in, if any."""
    name = f"chart-{next(_numbers)}"
    told = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    names = f'aria-labelledby="{name}-title {name}-desc"'
    return f'<svg class="{kind}"{view} role="img" {names}>{told}{"".join(inside)}</svg>'


def lines(chart: Lines) -> str:
    """A chart of lines, without its legend."""
    points = [point for series in chart.series for point in series.points]
    xs, ys = ticks(0, max(x for x, _ in points)), ticks(*_reach([y for _, y in points], chart.from_zero))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - BOTTOM - TOP)

    inside = []
    for y, label in zip(ys, labels(ys), strict=True):
        _, down = place(xs[0], y)
        inside.append(f'<path class="grid" d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}"/>')
        inside.append(f'<text class="tick" x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>')
    for x, label in zip(xs, labels(xs), strict=True):
        across, _ = place(x, ys[0])
        inside.append(f'<path class="grid" d="M{across:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        inside.append(
            f'<text class="tick" x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    inside.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x)}</text>')
    inside += [_line(series, [place(*point) for point in series.points]) for series in chart.series]
    return image("chart", chart.caption, chart.in_words, inside, f' viewBox="0 0 {WIDTH} {HEIGHT}"')


def _reach(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    return (min(0.0, *values) if from_zero else min(values)), max(values)


def _line(series: Series, places: Sequence[tuple[float, float]]) -> str:
    kind = f"c{series.colour % COLOURS}{' faint' * series.faint}{' dashed' * (series.colour >= COLOURS)}"
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places if series.dots or len(places) == 1]
    return f'<g class="line {kind}"><path d="{path}"/>{"".join(dots)}</g>'


def swatch(colour: int, faint: bool = False) -> str:
    """The sample of a colour in a legend."""
    kind = f"c{colour % COLOURS}{' faint' * faint}{' dashed' * (colour >= COLOURS)}"
    return f'<svg class="swatch line {kind}" viewBox="0 0 24 10" aria-hidden="true"><path d="M1 5H23"/></svg>'


def bar(chart: Bar) -> str:
    """A bar of parts, without its legend; a part that would not be seen has a hair's breadth."""
    least = chart.total / 300
    widths = [max(least, count) if count else 0 for _, count, _ in chart.parts]
    inside, left = [], 0.0
    for (_, _, colour), width in zip(chart.parts, widths, strict=True):
        share = 100 * width / (sum(widths) or 1)
        inside.append(f'<rect class="c{colour}" x="{left:.3f}%" y="0" width="{share:.3f}%" height="100%"/>')
        left += share
    told = "; ".join(f"{name}: {count:,} of {chart.total:,}" for name, count, _ in chart.parts)
    return image("bar", chart.caption, told, inside)
