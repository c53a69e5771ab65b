"""Rows of the files that records come in, the bad ones too: linting goes on after a row at which training stops."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data.instructions.files import read_rows
from data.instructions.records import Record, to_record
from data.jsonlines import once, try_json_lines
from runtime.errors import UserError
from runtime.storage.folders import plain_errors

Tried = Iterator[tuple[str, dict[str, Any] | UserError]]  # where it stands, and the row, or why it is none


def try_rows(path: Path) -> Tried:
    """The rows of a file; where one cannot be read, the error in its place, and then the rows after it.

    What nothing can be read after, as an encoding that is not UTF-8, is the last that comes.
    """
    readers = {".jsonl": try_json_lines, ".ndjson": try_json_lines, ".json": _json, ".csv": _csv}
    try:
        yield from (readers.get(path.suffix.lower(), read_rows) if path.is_file() else read_rows)(path)
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


def _json(path: Path) -> Tried:
    try:
        with plain_errors(path, "read"):
            value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
        (rows,) = (each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, list))
    except (ValueError, RecursionError):
        yield from read_rows(path)  # which says what is wrong
        return
    for i, row in enumerate(rows, 1):
        where = f"{path} record {i}"
        told = json.dumps(row)[:40]
        yield where, row if isinstance(row, dict) else UserError(f"{where}: must be an object in braces, not {told}")


def _csv(path: Path) -> Tried:
    _check_header(path)
    with plain_errors(path, "read"), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        columns = next(rows, [])
        while True:
            where = f"{path} line {rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, UserError(f"{where}: no CSV: {error}")
                continue
            except UnicodeDecodeError as error:
                told = f"after line {rows.line_num} it is not UTF-8 ({error.reason})"  # which is found out ahead of it
                raise UserError(f"{path}: {told}; save it again as UTF-8") from None
            if len(row) == len(columns):
                yield where, dict(zip(columns, row, strict=True))
            elif row:
                told = f"it has {len(row)} fields, and line 1 names {len(columns)} columns"
                yield where, UserError(f"{where}: {told}")


def _check_header(path: Path) -> None:
    """Raises UserError for a first line that names no columns; what is wrong with later ones can wait."""
    try:
        next(read_rows(path), None)
    except UserError as error:
        if f"{path} line 1:" in str(error) or "UTF-8" in str(error):
            raise
