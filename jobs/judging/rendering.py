"""How a report reads, in a terminal and as Markdown. Nothing is counted here."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.judging.rules import CHRF, HIGHER, LOSS, LOWER, PERPLEXITY, SHARE
from jobs.judging.scorecard import BASE, COLUMNS, RUN, WANTED

LONGEST = 300  # characters of a text that is shown in a terminal
ARROWS = "↑ higher is better, ↓ lower is better"
COUNTS = "(3 : 1) is better than the base on 3 prompts and worse on 1"


def shown(row: Mapping[str, Any], column: str, interval: bool = False) -> str:
    """A figure of a row of the report in its unit, with its interval where that is asked for; empty for none."""
    if not (figure := row.get(column)):
        return ""
    scale, unit, digits = {SHARE: (100, " %", 1), LOSS: (1, "", 3), PERPLEXITY: (1, "", 1)}[row["kind"]]
    told = f"{scale * figure['value']:.{digits}f}{unit}"
    if not interval or "low" not in figure:
        return told
    digits -= row["kind"] == SHARE
    return f"{told} ({scale * figure['low']:.{digits}f} to {scale * figure['high']:.{digits}f})"


def columns_of(report: Mapping[str, Any]) -> list[str]:
    """The columns that there are, in order."""
    return [name for name in COLUMNS if any(name in row for row in report["rules"])]


def title(report: Mapping[str, Any]) -> str:
    """The run, and what is beside it."""
    beside = f" beside its base {report['base']}" if report["base"] else ""
    return f"{report['run']}{beside}"


def described(report: Mapping[str, Any]) -> list[str]:
    """What was asked, and how, a line each."""
    data, how = report["data"], report["how"]
    some = "all" if data["prompts"] == data["of"] else f"{data['prompts']:,} of"
    names = ("temperature", "top_p", "top_k", "seed")
    sampled = ", ".join(f"{name} {how[name]}" for name in names if how[name] is not None)
    chosen = "the likeliest token each time (greedy)" if how["greedy"] else sampled
    strength = f", the adapter at strength {how['strength']:g}" if how["strength"] not in (None, 1) else ""
    return [
        f"Prompts: {some} {data['of']:,} {data['what']}",
        f"Answers: {chosen}, at most {how['max_new_tokens']} tokens, on {how['machine']}{strength}",
    ]


def signs(report: Mapping[str, Any]) -> str:
    """What the signs in a scorecard mean."""
    return f"{ARROWS}; {COUNTS}." if report["base"] else f"{ARROWS}."


def _sign(row: Mapping[str, Any]) -> str:
    return {HIGHER: "↑", LOWER: "↓"}.get(row["better"], " ")


def _n(row: Mapping[str, Any]) -> str:
    """Of how many prompts the figures are, which may be fewer than were asked."""
    return str((row.get(RUN) or row[BASE])["n"])


def _outcome(row: Mapping[str, Any]) -> str:
    return f"{row['outcome']} ({row['better_on']} : {row['worse_on']})" if "outcome" in row else ""


def scorecard_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The scorecard as a table, the first row being the heads."""
    columns = columns_of(report)
    compared = ["run against base"] if BASE in columns else []
    found = [["rule", *columns, *compared, "n", "how it is measured"]]
    for row in report["rules"]:
        figures = [shown(row, column, interval=True) for column in columns]
        outcome = [_outcome(row)] if compared else []
        name = f"{row['group']}: {row['name']} {_sign(row)}".strip()
        found.append([name, *figures, *outcome, _n(row), row["rule"]])
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: verdict, scorecard, notes, the worst answers."""
    heads, *rows = scorecard_rows(report)
    lines = [f"# {title(report)}", "", *(f"* {line}" for line in described(report)), ""]
    lines += [f"**Verdict: {report['verdict']}.**", "", _cells(heads), _cells(["---"] * len(heads))]
    lines += [*map(_cells, rows), "", signs(report), "", *(f"* {note}" for note in report["notes"]), ""]
    lines.append(f"## {_of_worst(report)}")
    for i, answer in enumerate(report["worst"], 1):
        near = answer["scores"][RUN][CHRF]
        lines += ["", f"### {i}. {answer['where']}, {CHRF} {100 * near:.1f} %", ""]
        lines += [part for name, text in _texts(answer) for part in (f"{name}:", "", fenced(text), "")]
        lines += [f"Faults: {', '.join(answer['faults']) or 'none that a rule finds'}"]
    return "\n".join(lines) + "\n"


def _of_worst(report: Mapping[str, Any]) -> str:
    count = len(report["worst"])
    if not count:
        return "Every answer is the wanted one"
    return "The one answer that is not the wanted one" if count == 1 else f"The {count} worst answers, by {CHRF}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _texts(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [name for name in ("asked", *COLUMNS) if name in answer]
    return [(name.capitalize(), answer[name]) for name in names]


def fenced(text: str) -> str:
    """A text as a block of code, whatever backticks it has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def plain(report: Mapping[str, Any]) -> str:
    """The same for a terminal, the verdict last: each rule's figures, and below them how it is measured."""
    width, columns = max(60, min(110, shutil.get_terminal_size().columns)), columns_of(report)
    lines, group = [title(report), *described(report), signs(report)], ""
    table = [_line(row, columns) for row in report["rules"]]
    widths = [max(map(len, column)) for column in zip(["", *columns, "", ""], *table, strict=True)]
    heads = _padded(["", *columns, "", "n"], widths)
    for row, cells in zip(report["rules"], table, strict=True):
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"{group}{heads[len(group) :]}"]
        lines.append(_padded(cells, widths))
        lines += textwrap.wrap(row["rule"], width, initial_indent="      ", subsequent_indent="      ")
    for note in report["notes"]:
        lines += ["", *textwrap.wrap(note, width)]
    lines += ["", _of_worst(report)]
    for i, answer in enumerate(report["worst"], 1):
        faults = f"; faults: {', '.join(answer['faults'])}" if answer["faults"] else ""
        lines += ["", f"{i}. {answer['where']}, {CHRF} {100 * answer['scores'][RUN][CHRF]:.1f} %{faults}"]
        lines += [f"   {name + ':':8} {_short(text)}" for name, text in _texts(answer)]
    return "\n".join([*lines, "", f"Verdict: {report['verdict']}"])


def _line(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    figures = [shown(row, column, interval=column != WANTED) for column in columns]
    return [f"  {_sign(row)} {row['name']}", *figures, _outcome(row), _n(row)]


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _short(text: str) -> str:
    """The beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."
