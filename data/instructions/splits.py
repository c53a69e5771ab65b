"""Records for training, validation and test: the files' own splits, or held out by what they ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from data.instructions.files import files_of, read_rows
from data.instructions.records import Record, to_record
from runtime.errors import UserError


@dataclass(frozen=True)
class Records:
    """A data set of records in its splits. name: short and made of [a-z0-9-]."""

    name: str
    train: list[Record] = field(repr=False)
    validation: list[Record] = field(repr=False)
    test: list[Record] = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Hex digest over what is learned and what is held out, in order; where it came from does not count."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for r in split:
                digest.update(json.dumps([[dict(m) for m in r.messages], r.prompt, r.completion]).encode())
            digest.update(b"\n")
        return digest.hexdigest()

    def head(self, train: int, validation: int) -> Records:
        """The same with each split cut to its first records, as TEST_MODE wants it."""
        return Records(self.name, self.train[:train], self.validation[:validation], self.test[:validation])


def read_records(paths: Iterable[Path], columns: Mapping[str, str]) -> list[Record]:
    """The records of some files, in order. Raises UserError that names file, line and column for what is none."""
    return [to_record(row, where, columns) for path in paths for where, row in read_rows(path)]


def hold_out(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """What stays, and about that share of what is asked; records that ask the same are never on both sides, and each
    keeps its side when others are added."""
    sides: tuple[list[Record], list[Record]] = [], []
    for record in records:
        sides[record.fraction() < share].append(record)
    return sides


def load_records(dataset: str, columns: Mapping[str, str], val_size: float) -> Records:
    """The data set that DATASET names. A validation split that no file has is held out of the training records.

    Raises UserError for anything that is no record, and where a split is empty.
    """
    files = files_of(dataset)
    train, validation, test = (read_records(files[split], columns) for split in ("train", "validation", "test"))
    if not train:
        raise UserError(f"{dataset} has no records to train on")
    if not validation:
        train, validation = hold_out(train, val_size)
    for split, records in (("training", train), ("validation", validation)):
        if not records:
            raise UserError(
                f"{dataset} leaves the {split} split without a record: it has {len(train) + len(validation)}, of which "
                f"VAL_SIZE={val_size:g} are held out; give more records, another VAL_SIZE, or a file of their own"
            )
    return Records(_short_name(dataset), train, validation, test)


def _short_name(dataset: str) -> str:
    path = Path(dataset.split(",")[0].strip())
    stem = path.name if path.is_dir() else path.stem
    name = "-".join(filter(None, "".join(c if c.isascii() and c.isalnum() else "-" for c in stem.lower()).split("-")))
    return name[:40].strip("-") or "records"
