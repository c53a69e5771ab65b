"""Rows written as a file that was not there before: whole or not at all, and in little memory where its kind allows."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import UsageError, UserError
from runtime.extras import needs_package
from runtime.storage import folders
from runtime.storage.content import OpenFile

Row = Mapping[str, Any]


class JsonLines:
    """An object a line."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def add(self, row: Row) -> None:
        """One row more. Raises UserError where it does not fit into this kind of file."""
        self.file.write(as_json(row) + b"\n")

    def close(self) -> None:
        """Write what has not been written yet."""


class Json(JsonLines):
    """A list of objects."""

    started = False

    def add(self, row: Row) -> None:
        self.file.write((b",\n" if self.started else b"[\n") + as_json(row))
        self.started = True

    def close(self) -> None:
        self.file.write(b"\n]\n" if self.started else b"[]\n")


class Csv(JsonLines):
    """A line of fields a row, below the columns of the first."""

    columns: tuple[str, ...] = ()

    def add(self, row: Row) -> None:
        if not self.columns:
            self.columns = tuple(row)
            self._write(self.columns)
        if extra := [name for name in row if name not in self.columns]:
            raise UserError(f"{self.path}: only some rows have a column {extra[0]!r}; write .jsonl instead")
        if nested := [name for name, value in row.items() if isinstance(value, list | dict)]:
            raise UserError(f"{self.path}: {nested[0]} is a list, which CSV cannot hold; write .jsonl instead")
        self._write(["" if row.get(name) is None else row[name] for name in self.columns])

    def _write(self, fields: Any) -> None:
        line = io.StringIO()
        csv.writer(line).writerow(fields)
        try:
            self.file.write(line.getvalue().encode())
        except UnicodeEncodeError:
            told = "a field has half of a character (a lone surrogate), which CSV cannot hold"
            raise UserError(f"{self.path}: {told}; write .jsonl instead") from None


class Parquet(JsonLines):
    """A table; its rows are held in memory, as their types are known only at the end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        with needs_package("pyarrow", "instructions"):
            import pyarrow.parquet
        super().__init__(file, path)
        self.pyarrow, self.rows = pyarrow, []

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)
        try:
            table = self.pyarrow.table({name: [row.get(name) for row in self.rows] for name in columns})
            self.pyarrow.parquet.write_table(table, self.file)
        except (self.pyarrow.ArrowException, TypeError, UnicodeError) as error:
            told = str(error).partition("\n")[0]
            raise UserError(f"{self.path}: the rows make no table ({told}); write .jsonl instead") from None


KINDS = {".jsonl": JsonLines, ".ndjson": JsonLines, ".json": Json, ".csv": Csv, ".parquet": Parquet}


def as_json(row: Row) -> bytes:
    """A row on one line; half of a character, which UTF-8 cannot hold, is written as an escape."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str).encode()


def kind_of(path: Path) -> type[JsonLines]:
    """What writes a file of that name. Raises UsageError where no kind of file ends so."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"--out {path}: it must end in {', '.join(KINDS)}")
    return KINDS[path.suffix.lower()]


@contextmanager
def new_file(path: Path) -> Iterator[JsonLines]:
    """A file to add rows to, which has its name once all of them are there.

    Raises UsageError where something has the name already, or no kind of file ends so; UserError where it cannot be
    written.
    """
    folders.check_free(path)
    kind = kind_of(path)
    with folders.plain_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            rows = kind(file, path)
            yield rows
            rows.close()
            file.flush()
            folders.check_free(path)
            folders.write_file(path, OpenFile(file))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files into, which has its name once all of them are there. Raises UsageError where something
    has the name already."""
    folders.check_free(path)
    draft = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with folders.plain_errors(path, "write"):
            draft.mkdir(parents=True)
        yield draft
        folders.check_free(path)
        folders.publish_folder(draft, path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
