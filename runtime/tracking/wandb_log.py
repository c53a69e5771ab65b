"""The logs that W&B's own process keeps of a run beside sending it, read back as far as they are whole.

They are LevelDB's log format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of W&B's.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC, HEADER = b":W&B", 7
BLOCK, PIECE = 32768, struct.Struct("<IHB")  # bytes; checksum, length and kind of a piece of a record
WHOLE, LAST = 1, 4
NAME = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(\w+)")


@dataclass(frozen=True)
class Log:
    """The log of one start of a run. id: W&B's of the run."""

    path: Path
    id: str

    def records(self) -> Iterator[Any]:
        """W&B's records, in order; what a kill has cut off is left out."""
        from wandb.proto.wandb_internal_pb2 import Record

        data = self.path.read_bytes() if self.path.is_file() else b""
        at, record = HEADER, b""
        while data.startswith(MAGIC) and at + PIECE.size <= len(data):
            if (left := BLOCK - at % BLOCK) < PIECE.size:
                at += left
                continue
            _, length, kind = PIECE.unpack_from(data, at)
            at += PIECE.size
            if not kind or at + length > len(data):
                return
            record += data[at : at + length]
            at += length
            if kind in (WHOLE, LAST):
                yield Record.FromString(record)
                record = b""

    def steps(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Each step with its figures, as JSON."""
        for record in self.records():
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield (
                    record.history.step.num,
                    {item.key or ".".join(item.nested_key): item.value_json for item in items},
                )

    def newest(self) -> int:
        """The highest step, 0 where there is none."""
        return max((step for step, _ in self.steps()), default=0)


def logs_in(folder: Path) -> list[Log]:
    """The logs in W&B's folder of one run, oldest first."""
    paths = sorted(folder.iterdir(), key=lambda path: path.name.removeprefix("offline-")) if folder.is_dir() else []
    found = [(NAME.fullmatch(path.name), path) for path in paths]
    return [Log(path / f"run-{match[1]}.wandb", match[1]) for match, path in found if match]
