"""A report as one HTML file: no script, nothing fetched, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data.corpora import WORD
from jobs.looking.linted import counted
from jobs.reporting.blocks import Bar, Code, Figures, Heat, Lines, Page, Sample, Section, Table, Text
from jobs.reporting.writers import charts

SHADES = 9  # of a heat map
NUMERIC = re.compile(
    r"|–|[-+]?[\d.,]+(e[-+]?\d+)?( %| [kMG]B| s)?( \([^()]*\))?"
)  # a figure, perhaps with its interval


def document(page: Page) -> str:
    """The file. The style sheet is the only one that the page allows, by its hash, and it allows no script."""
    style = Path(__file__).with_name("page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    body = [*map(block, page.blocks), *(section(part, 2) for part in page.sections)]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(page.title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
            f'<h1>{_breakable(page.title)}</h1>\n<p class="lead">{escape(page.lead)}</p>',
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def section(part: Section, level: int) -> str:
    """A section and what is below it."""
    inside = [*map(block, part.blocks), *(section(below, level + 1) for below in part.below)]
    return "\n".join(["<section>", f"<h{level}>{_breakable(part.title)}</h{level}>", *inside, "</section>"])


def block(part: Any) -> str:
    """A block of any kind."""
    return WRITERS[type(part)](part)


def _breakable(text: str) -> str:
    """A text whose long names may be broken after a hyphen, a dot, an underscore or a slash."""
    return re.sub(r"([-._/])(?=[^\W\d])", r"\1<wbr>", escape(text))


def _text(part: Text) -> str:
    return f"<p>{escape(part.text)}</p>"


def _figures(part: Figures) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}</dd></div>" for name, figure in part.rows)
    return f'<dl class="figures">{rows}</dl>'


def _table(part: Table) -> str:
    numeric = [all(NUMERIC.fullmatch(row[i]) for row in part.rows) for i in range(len(part.head))]
    kinds = [' class="number"' if each else "" for each in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{_breakable(cell)}</th>' if cell else "<td></td>"
        for cell, kind in zip(part.head, kinds, strict=True)
    )
    rows = "\n".join(f"<tr>{_row(row, kinds)}</tr>" for row in part.rows)
    table = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(part.caption)}"><table>'
        f"<caption>{escape(part.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
    if part.folded:
        return f"<details><summary>{escape(part.caption)} ({counted(len(part.rows), 'row')})</summary>{table}</details>"
    return table


def _row(row: Sequence[str], kinds: Sequence[str]) -> str:
    cells = [f"{kind}>{escape(cell) if kind else _breakable(cell)}" for cell, kind in zip(row, kinds, strict=True)]
    return f'<th scope="row"{cells[0]}</th>{"".join(f"<td{cell}</td>" for cell in cells[1:])}'


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    """Swatches with what they stand for."""
    return f'<ul class="legend">{"".join(f"<li>{mark} {escape(text)}</li>" for mark, text in entries)}</ul>'


def _lines(part: Lines) -> str:
    legend = [(charts.swatch(series.colour, series.faint), series.name) for series in part.series]
    title = f"{part.caption}, {part.y}" if part.y.lower() != part.caption.lower() else part.caption
    shown = _legend(legend) if len(legend) > 1 else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{charts.lines(part)}{shown}</figure>"


def _bar(part: Bar) -> str:
    legend = [
        (f'<svg class="swatch" aria-hidden="true"><rect class="c{colour}" width="100%" height="100%"/></svg>',
         f"{name}: {count:,} ({100 * count / part.total:.2f} %)")
        for name, count, colour in part.parts
    ]  # fmt: skip
    legend.append(('<svg class="swatch" aria-hidden="true"></svg>', f"together: {part.total:,}"))
    return f'<figure class="whole">{charts.bar(part)}{_legend(legend)}</figure>'


def _heat(part: Heat) -> str:
    most = max((value for _, row in part.rows for value in row if value is not None), default=0) or 1

    def cell(value: float | None) -> str:
        if value is None:
            return "<td></td>"
        return f'<td class="h{round(SHADES * value / most)}">{part.form.format(value)}</td>'

    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in part.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(cell, row))}</tr>' for name, row in part.rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(part.caption)}"><table class="heat">'
        f'<caption>{escape(part.caption)}</caption>\n<thead><tr><th scope="col">{escape(part.corner)}</th>{head}</tr>'
        f"</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _sample(part: Sample) -> str:
    return f'<h4>{escape(part.title)}</h4>\n<pre class="sample">{_marked(part.text, part.marked)}</pre>'


def _marked(text: str, marked: frozenset[str]) -> str:
    """A text with some of its words marked. They are found as they were counted."""
    found, last = [], 0
    for match in WORD.finditer(text):
        if match[0].lower() in marked:
            found += [escape(text[last : match.start()]), f"<mark>{escape(match[0])}</mark>"]
            last = match.end()
    return "".join([*found, escape(text[last:])])


def _code(part: Code) -> str:
    return f'<pre class="code"><code>{escape(chr(10).join(part.lines))}</code></pre>'


WRITERS: dict[type, Callable[[Any], str]] = {
    Text: _text, Figures: _figures, Table: _table, Lines: _lines, Bar: _bar, Heat: _heat, Sample: _sample, Code: _code,
}  # fmt: skip
