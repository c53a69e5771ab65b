"""What a report is made of, before it is HTML, Markdown or a picture: sections of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


def _figure(value: float) -> str:
    """Four digits, or all of a large number."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Figures:
    """The few numbers that matter, each with what it is: (name, figure)."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows below their heads; the first cell of each row says what it is about. folded: shown when asked for."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Bar:
    """A whole and the parts that add up to it, each with its count and the number of its colour."""

    caption: str
    parts: Sequence[tuple[str, int, int]]

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(count for _, count, _ in self.parts)


@dataclass(frozen=True)
class Series:
    """A line of a chart. points: x and y, by x. colour: its number. dots: whether each point is marked. faint: whether
    it stands behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Lines:
    """A chart of lines over the same axes."""

    caption: str
    x: str
    y: str
    series: Sequence[Series]
    from_zero: bool = False

    @property
    def in_words(self) -> str:
        """What the chart shows, for who cannot see it."""
        return "; ".join(f"{s.name}: {self._course(s.points)}" for s in self.series)

    def _course(self, points: Sequence[tuple[float, float]]) -> str:
        """Where a line begins, ends and is lowest; one point by itself."""
        (first, begins), (last, ends), lowest = points[0], points[-1], min(y for _, y in points)
        if len(points) == 1:
            return f"{_figure(begins)} at {self.x} {first:g}"
        return (
            f"{_figure(begins)} at {self.x} {first:g}, {_figure(ends)} at {self.x} {last:g}, lowest {_figure(lowest)}"
        )


@dataclass(frozen=True)
class Heat:
    """A grid of numbers, the larger the darker; None where there is none."""

    caption: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    form: str


@dataclass(frozen=True)
class Sample:
    """A text that a model made, with some of its words marked."""

    title: str
    text: str
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    lines: Sequence[str]


Block = Text | Figures | Table | Bar | Lines | Heat | Sample | Code


@dataclass(frozen=True)
class Section:
    """A heading with its blocks, and sections below it."""

    title: str
    blocks: Sequence[Block] = ()
    below: Sequence[Section] = field(default=())


@dataclass(frozen=True)
class Page:
    """A report. lead: what was run, in sentences."""

    title: str
    lead: str
    blocks: Sequence[Block]
    sections: Sequence[Section]
