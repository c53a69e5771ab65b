"""A report as Markdown, for where HTML cannot go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jobs.judging.rendering import fenced
from jobs.reporting.blocks import Bar, Code, Figures, Heat, Lines, Page, Sample, Section, Table, Text


def markdown(page: Page, pictures: Sequence[str]) -> str:
    """The file. pictures: names of files beside it."""
    parts = [f"# {_plain(page.title)}", _plain(page.lead), *map(_block, page.blocks)]
    parts += [f"![{_plain(page.title)}: {name}](<{name}>)" for name in pictures]
    for section in page.sections:
        parts += _section(section, 2)
    return "\n\n".join(parts) + "\n"


def _section(section: Section, level: int) -> list[str]:
    inside = [part for below in section.below for part in _section(below, level + 1)]
    return [f"{'#' * level} {_plain(section.title)}", *map(_block, section.blocks), *inside]


def _block(part: Any) -> str:
    return WRITERS[type(part)](part)


def _plain(text: str) -> str:
    """A text that is no Markdown and no HTML."""
    return "".join(f"\\{char}" if char in "\\`*_<>[]#|&" else char for char in text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    written = [[_plain(cell) for cell in row] for row in rows]
    return "\n".join(
        ["| " + " | ".join(row) + " |" for row in ([_plain(c) for c in head], ["---"] * len(head), *written)]
    )


def _figures(part: Figures) -> str:
    return _table(["what", "figure"], part.rows)


def _bar(part: Bar) -> str:
    rows = [[name, f"{count:,}", f"{100 * count / part.total:.2f} %"] for name, count, _ in part.parts]
    return _table([part.caption.lower(), "count", "share"], [*rows, ["together", f"{part.total:,}", "100.00 %"]])


def _heat(part: Heat) -> str:
    rows = [[name, *("" if value is None else part.form.format(value) for value in row)] for name, row in part.rows]
    return f"{_plain(part.caption)}:\n\n{_table([part.corner, *part.columns], rows)}"


WRITERS: dict[type, Callable[[Any], str]] = {
    Text: lambda part: _plain(part.text),
    Figures: _figures,
    Table: lambda part: f"{_plain(part.caption)}:\n\n{_table(part.head, part.rows)}",
    Lines: lambda part: f"{_plain(part.caption)}: {_plain(part.in_words)}.",
    Bar: _bar,
    Heat: _heat,
    Sample: lambda part: f"{_plain(part.title)}:\n\n{fenced(part.text)}",
    Code: lambda part: fenced("\n".join(part.lines)),
}
