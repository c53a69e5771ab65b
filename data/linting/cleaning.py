"""What linting can mend without a person: white space, boilerplate, URLs that can go, exact copies.

Boilerplate and URLs are taken out of answers alone: a prompt may need what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.instructions.records import Record
from data.linting.across import key
from data.linting.forms import columns_of
from data.linting.reading import Tried, try_record
from data.linting.rules import whole
from data.linting.texts import split_boilerplate, tidy, without_urls
from runtime.errors import UserError

# What is counted, in the order in which it is told.
CHANGES = {
    "white space": "white space mended (texts)",
    "boilerplate": "boilerplate taken out of answers (sentences)",
    "url": "URLs taken out of answers",
    "hollow": "left out: an answer is nothing but boilerplate (records)",
    "duplicate": "left out: the same as an earlier one, white space aside (records)",
    "not-a-record": "left out: no record (rows)",
}


@dataclass
class Cleaning:
    """Cleans rows, and counts what it did. columns: from `parse_columns`. kept, read: how many rows."""

    columns: Mapping[str, str]
    read: int = 0
    kept: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    refused: UserError | None = None  # why the first row that is no record is none
    seen: set[int] = field(default_factory=set, repr=False)

    def rows(self, rows: Tried) -> Iterator[dict[str, Any]]:
        """The rows that stay, mended. Raises UserError where none does."""
        for where, row in rows:
            self.read += 1
            record = try_record(row, where, self.columns)
            if isinstance(record, UserError):
                self.changes["not-a-record"] += 1
                self.refused = self.refused or record
            elif mended := self._mended(record):
                self.kept += 1
                yield mended
        if not self.kept:
            raise self.refused or UserError("nothing would be left")

    def _mended(self, record: Record) -> dict[str, Any] | None:
        """A record's row, mended; None where it is left out."""
        changes: Counter[str] = Counter()
        row = mended_row(record, self.columns, changes)
        mended = try_record(row, record.where, self.columns)
        if isinstance(mended, UserError):
            self.changes["hollow"] += 1
            return None
        if (same := key(whole(mended))) in self.seen:
            self.changes["duplicate"] += 1
            return None
        self.seen.add(same)
        self.changes += changes
        return row


# A prompt that is continued and its continuation meet without anything between them, so there blanks count.
ENDS = {"prompt": "none", "completion": "right", "text": "right"}
SAID = ("output", "completion", "text")


def mended_row(record: Record, columns: Mapping[str, str], changes: Counter[str]) -> dict[str, Any]:
    """A record's row with its texts mended, some of which may be empty then, and what that changed counted."""
    row, roles = dict(record.row), [message["role"] for message in record.messages]
    for ours, theirs in columns_of(row, columns).items():
        if isinstance(row[theirs], list):
            row[theirs] = [_mended_message(message, roles.pop(0), changes) for message in row[theirs]]
        elif isinstance(row[theirs], str):
            row[theirs] = _mended_text(row[theirs], ours in SAID, changes, ENDS.get(ours, "both"))
    return row


def _mended_message(message: Mapping[str, Any], role: str, changes: Counter[str]) -> dict[str, Any]:
    name = "content" if "content" in message else "value"
    return {**message, name: _mended_text(message[name], role == "assistant", changes, "both")}


def _mended_text(text: str, said: bool, changes: Counter[str], ends: str) -> str:
    found = tidy(text, ends)
    changes["white space"] += found != text
    if said:
        found, taken = split_boilerplate(found)
        changes["boilerplate"] += len(taken)
        found, gone = without_urls(found)
        changes["url"] += gone
    return found
