"""What linting found, in words."""

from __future__ import annotations

from collections import Counter

from data.linting.lint import Report
from data.linting.rules import RULES
from runtime.report import table


def counted(number: int, what: str) -> str:
    """A number of things, as `1 record` and `2 records`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def splits_in_words(splits: Counter[str]) -> str:
    """How many records each split has, where there are several."""
    told = [f"{split} {count:,}" for split, count in splits.items() if count]
    return f" ({', '.join(told)})" if len(told) > 1 else ""


def summary(name: str, report: Report, how: str) -> str:
    """The first lines: how many records there are, and for each rule how many break it."""
    none = report.rows - report.records
    lost = f"; {counted(none, 'row')} cannot be read as {'a record' if none == 1 else 'records'}" if none else ""
    lines = [f"{name}: {counted(report.records, 'record')}{splits_in_words(report.splits)}{lost}; {how}", ""]
    rows = [("rule", "found", "share", "what breaks it")]
    for rule, tally in report.tallies.items():
        part = tally.count / report.rows if rule != "unbalanced" else 0  # which counts values, not records
        share = "" if not part else f"{part:.1%}" if part >= 0.001 else "<0.1%"
        rows.append((rule, f"{tally.count:,}", share, RULES[rule].says))
    return "\n".join([*lines, table(rows), *_balance(report)])


def _balance(report: Report) -> list[str]:
    """The shares of the fields whose balance was looked at."""
    lines = [""] if report.fields else []
    for name, counts in report.fields.items():
        shares = ", ".join(f"{value} {count / counts.total():.1%}" for value, count in counts.most_common(8))
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        lines.append(f"{name}: {shares}{more}")
    return lines


def examples(report: Report) -> str:
    """The worst of what each rule found, by where it stands."""
    lines = []
    for rule, tally in report.broken.items():
        lines += ["", f"{rule}: {tally.count:,} found{', the worst' if tally.count > len(tally.worst) else ''}"]
        lines += [f"  {where}: {what}" for where, what in tally.examples()]
    return "\n".join(lines)
