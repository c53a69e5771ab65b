"""The files that records come in, JSON lines, JSON, CSV and Parquet: which ones DATASET names, and their rows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from data.jsonlines import once, try_json_lines
from runtime.errors import UsageError, UserError
from runtime.extras import needs_package
from runtime.hub.fetching import fetch_chosen, fetch_records, listed
from runtime.settings.config import RECORDS, is_hub_records
from runtime.storage.folders import plain_errors

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with where it stands
Tried = Iterator[tuple[str, dict[str, Any] | UserError]]  # where it stands, and the row, or why it is none
SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")  # at the end of a name without its ending
SHOWN = 12  # names of splits in a message
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def _json(path: Path) -> Tried:
    """The objects of one list, by itself or as the only list of an object."""
    try:
        with plain_errors(path, "read"):
            value = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON in UTF-8: {error}; JSON lines need a name in .jsonl") from None
    values = value.values() if isinstance(value, dict) else [value]
    lists = [each for each in values if isinstance(each, list)]
    if len(lists) != 1:
        raise UserError(f"{path}: must hold one list of records")
    for i, row in enumerate(lists[0], 1):
        where = f"{path} record {i}"
        told = "" if isinstance(row, dict) else json.dumps(row)[:40]
        yield where, UserError(f"{where}: must be an object in braces, and it is {told}") if told else row


def _csv(path: Path) -> Tried:
    """The lines after the first, which names the columns."""
    csv.field_size_limit(2**26)
    with plain_errors(path, "read"), path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        columns, last = _columns(path, rows), rows.line_num
        while True:
            where = f"{path} line {last + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, UserError(f"{where}: no CSV: {error}")
            except UnicodeDecodeError as error:  # which is found out some lines ahead of where it is
                told = f"after line {last} it is not UTF-8 ({error.reason})"
                raise UserError(f"{path}: {told}; save it again as UTF-8") from None
            else:
                if len(row) == len(columns):
                    yield where, dict(zip(columns, row, strict=True))
                elif row:
                    told = f"it has {len(row)} fields, and line 1 names {len(columns)} columns"
                    yield where, UserError(f"{where}: {told}")
            last = rows.line_num


def _columns(path: Path, rows: Iterator[list[str]]) -> list[str]:
    """The first line of a CSV file. Raises UserError for one that cannot name columns."""
    try:
        columns = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{path} line 1: no CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); save it again as UTF-8") from None
    if len(columns) < 2 and any(sign in "".join(columns) for sign in ";\t"):
        raise UserError(f"{path} line 1: its columns must be separated by commas")
    if len(set(columns)) < len(columns):
        raise UserError(f"{path} line 1: a column's name is there twice")
    return columns


def _parquet(path: Path) -> Tried:
    with needs_package("pyarrow", "instructions"):
        import pyarrow
        import pyarrow.parquet
    try:
        with plain_errors(path, "read"), pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file: {str(error).partition(chr(10))[0]}") from None


READERS = dict(zip(RECORDS, (try_json_lines, try_json_lines, _json, _csv, _parquet), strict=True))


def try_rows(path: Path) -> Tried:
    """The rows of a file; where one cannot be read, the error in its place, and then the rows after it.

    Raises UsageError for a file that is not there, and UserError, which names the file, for what nothing can be read of
    or after, as an encoding that is not UTF-8.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: it must end in {', '.join(READERS)}")
    yield from reader(path)


def read_rows(path: Path) -> Rows:
    """The rows of a file. Raises UserError that names the file, and the line or record, at the first that is none."""
    for where, row in try_rows(path):
        if isinstance(row, UserError):
            raise row
        yield where, row


def files_of(name: str) -> dict[str, list[Path]]:
    """The files that DATASET names, by the split that the first word of their names says: train, validation or test;
    those that say nothing are in `train`, and so are all of a split of the hub's that was asked for by name.

    Raises UserError for a folder without any, and where the hub has none.
    """
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if not is_hub_records(name):
        parts = [Path(part.strip()).expanduser() for part in name.split(",")]
    elif ":" in name:
        return found | {"train": _of_split(*name.split(":"))}
    else:
        parts = [fetch_records(name)]
    for part in parts:
        inside = (_inside(part) or _inside(part / "data")) if part.is_dir() else [part]
        if not inside:
            raise UserError(f"{part} is a folder without a file that ends in {', '.join(READERS)}")
        for path in inside:
            found[split_of(path)].append(path)
    return found


def _of_split(repository: str, split: str) -> list[Path]:
    """The files of a split of a data set on the hub, which alone are downloaded.

    Raises UserError, which names the splits that there are, where this is none, or a folder of several.
    """
    names = {path: _split_names(path) for path in listed(repository) if _has_records(PurePosixPath(path))}
    wanted = [path for path, its in names.items() if split in its]
    if len({split_of(Path(path)) for path in wanted}) > 1:
        there = {name for path in wanted for name in names[path]} - {split}
        raise UserError(f"{repository}:{split} has several splits; name one of {_shortened(there)}")
    if not wanted:
        there = {name for its in names.values() for name in its}
        raise UserError(f"{repository} has no split {split!r}; it has {_shortened(there) or 'no files of records'}")
    return fetch_chosen(repository, sorted(wanted))


def _split_names(path: str) -> list[str]:
    """The names that a file on the hub can be asked for by: those of its folders but `data`, and its own, without what
    numbers the parts of a split."""
    *folders, name = path.removeprefix("data/").split("/")
    parts = [*folders, SHARD.sub("", PurePosixPath(name).stem)]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _shortened(names: set[str]) -> str:
    """Some of the names, in order."""
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _inside(folder: Path) -> list[Path]:
    """The files of records in a folder; one that the hub keeps about them is none."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in there if _has_records(path)]


def _has_records(path: PurePath) -> bool:
    return path.suffix.lower() in READERS and path.name != "dataset_infos.json"


def split_of(path: Path) -> str:
    """The split that a file's name says, as train-00000-of-00002.parquet does."""
    word = path.name.lower().replace("_", "-").replace(".", "-").split("-")[0]
    return next((split for split, words in SPLITS.items() if word in words), "train")
