"""What is in files of records: columns, lengths, a few records as a model is given them, the steps of an epoch."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.instructions.records import Record
from data.linting.forms import columns_of
from data.linting.reading import try_record
from jobs.looking.measure import Measure
from runtime.errors import UserError
from runtime.report import table
from runtime.settings.config import Settings

SHOWN = 3  # records
VALUES = 12  # different values of a column that are counted, before it is taken for free text
GIVEN, LEARNED = "  │ ", "  ┃ "
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
LONGEST = 2000  # characters of a part of a record that is shown


@dataclass
class Column:
    """What is known of a column of the rows."""

    filled: int = 0
    characters: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    example: str = ""

    def add(self, value: Any) -> None:
        """A row's value."""
        if value is None or value in ("", [], {}):
            return
        self.filled += 1
        self.kinds[KINDS.get(type(value), type(value).__name__)] += 1
        text = value if isinstance(value, str) else repr(value)
        self.characters += len(text)
        self.example = self.example or text[:200]
        if len(self.values) <= VALUES:
            self.values[text[:40]] += 1

    def content(self, free: bool) -> str:
        """Its values with how often each is there, or the first of them, where they are free text or many."""
        if not free and 1 < len(self.values) <= VALUES:
            return ", ".join(f"{_line(value, 16)} {count:,}" for value, count in self.values.most_common(5))
        return _line(self.example, 48)


KINDS = {str: "text", list: "list", dict: "object", bool: "yes or no", int: "number", float: "number"}


@dataclass
class Overview:
    """What is gathered of rows. splits: their records. lengths, learned: tokens of each record, and of its answers."""

    measure: Measure
    columns: Mapping[str, str]
    seed: int
    val_size: float  # share of training records that is held out, where no file has it
    splits: Counter[str] = field(default_factory=Counter)
    table: dict[str, Column] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)  # a column of the file -> what it is in a record
    lengths: array = field(default_factory=lambda: array("L"))
    learned: array = field(default_factory=lambda: array("L"))
    trained: int = 0  # records, and their tokens, as far as they fit into the context
    trained_tokens: int = 0
    sample: list[tuple[int, Record]] = field(default_factory=list)  # by their numbers
    bad: list[UserError] = field(default_factory=list)  # the first row that is no record
    bad_rows: int = 0

    def add_all(self, rows: Iterable[tuple[str, str, dict[str, Any] | UserError]]) -> None:
        """All rows with their splits. Raises UserError where none is a record."""
        draw = random.Random(self.seed)
        for split, where, row in rows:
            record = try_record(row, where, self.columns)
            lengths = record if isinstance(record, UserError) else self._lengths(record)
            if isinstance(lengths, UserError):
                self.bad_rows += 1
                self.bad = self.bad or [lengths]
                continue
            self.splits[split] += 1
            self.lengths.append(lengths[0])
            self.learned.append(lengths[1])
            if split == "train" and record.fraction() >= self.val_size:
                self.trained += 1
                self.trained_tokens += min(lengths[0], self.measure.context)
            self._columns(record.row)
            number = len(self.lengths)
            place = draw.randrange(number)  # each record is as likely among those that are shown
            if len(self.sample) < SHOWN:
                self.sample.append((number, record))
            elif place < SHOWN:
                self.sample[place] = number, record
        if not self.lengths:
            raise self.bad[0] if self.bad else UserError("there are no records")

    @property
    def held_out(self) -> int:
        """How many records of the training files are held out for validation."""
        return self.splits["train"] - self.trained

    def _lengths(self, record: Record) -> tuple[int, int] | UserError:
        try:
            return self.measure.lengths(record)
        except UserError as error:
            return error

    def _columns(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            self.table.setdefault(name, Column()).add(value)
        if not self.used:
            self.used = {theirs: ours for ours, theirs in columns_of(row, self.columns).items()}


def columns_told(overview: Overview) -> str:
    """A table of the columns."""
    rows = [("column", "is the record's", "type", "filled", "characters", "values")]
    for name, column in overview.table.items():
        kind = "/".join(kind for kind, _ in column.kinds.most_common(2))
        mean = f"{column.characters / column.filled:,.0f}" if column.filled else ""
        share, used = f"{column.filled / len(overview.lengths):.0%}", overview.used.get(name, "")
        rows.append((_line(name, 24), used, kind, share, mean, column.content(bool(used))))
    return table(rows)


def lengths_told(overview: Overview) -> str:
    """A table of lengths in tokens."""
    rows = [("tokens", "mean", "median", "95 %", "longest", "in all")]
    for name, values in (("record", overview.lengths), ("learned of it", overview.learned)):
        found = np.frombuffer(values, values.typecode)
        middle, high = np.percentile(found, (50, 95))
        told = (found.mean(), middle, high, found.max(), found.sum())
        rows.append((name, *(f"{number:,.0f}" for number in told)))
    return table(rows)


def epoch_told(overview: Overview, settings: Settings) -> str:
    """How many steps go once through the records that are trained on."""
    rows = settings.batch_size * settings.gradient_accumulation_steps
    steps, packed = -(-overview.trained // rows), -(-overview.trained_tokens // (rows * overview.measure.context))
    accumulated = f"GRADIENT_ACCUMULATION_STEPS={settings.gradient_accumulation_steps}"
    kept = f"; {overview.held_out:,} of {overview.splits['train']:,} are held out" if overview.held_out else ""
    return (
        f"An epoch: {steps:,} step{'' if steps == 1 else 's'} of {rows} records (BATCH_SIZE={settings.batch_size}, "
        f"{accumulated}{kept}); about {packed:,} with PACKING, rows of up to {overview.measure.context:,} tokens"
    )


def rendered(record: Record, measure: Measure, colour: bool) -> str:
    """A record as a model is given it, with what it learns marked, and coloured where the terminal has colours."""
    tokens, learned = measure.lengths(record)
    lines = [f"{record.where}: {tokens:,} token{'' if tokens == 1 else 's'}, {learned:,} of them learned"]
    for text, said in measure.pieces(record):
        lines += _marked(text, said, colour)
    return "\n".join(lines)


def _marked(text: str, said: bool, colour: bool) -> list[str]:
    more = f" ... ({len(text) - LONGEST:,} characters more)" if len(text) > LONGEST else ""
    shown = "".join(char if char.isprintable() or char == "\n" else "�" for char in text[:LONGEST].strip("\n"))
    start, end = (GREEN, PLAIN) if said and colour else ("", "")
    lines = f"{shown}{more}".split("\n")
    return [f"{start}{LEARNED if said else GIVEN}{line}{end}" for line in lines] if text else []


def _line(text: str, longest: int) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text[:200]).split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
