"""Rows of the files that records come in, the bad ones too: linting goes on after a row at which training stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.instructions.files import Tried, try_rows
from data.instructions.records import Record, to_record
from runtime.errors import UsageError, UserError


def tried(path: Path) -> Tried:
    """The rows of a file, and in the place of one that cannot be read, the error; what nothing can be read after is the
    last that comes. Raises UsageError for a file that is not there."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        yield from try_rows(path)
    except UserError as error:
        yield str(path), error


def try_record(row: dict[str, Any] | UserError, where: str, columns: Mapping[str, str]) -> Record | UserError:
    """A row as a record, or why it is none. columns: from `parse_columns`."""
    if isinstance(row, UserError):
        return row
    try:
        return to_record(row, where, columns)
    except UserError as error:
        return error
