"""What a file holds, in parts: for files that are too large to be held in memory beside what they are made of."""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import BinaryIO

PART = 2**20  # bytes


class Content(ABC):
    """Bytes that come one part after the other, each time anew.

    gathered: whether several processes must go through the parts together.
    """

    gathered = False

    @abstractmethod
    def __len__(self) -> int:
        """How many bytes there are."""

    @abstractmethod
    def __iter__(self) -> Iterator[memoryview | bytes]:
        """The bytes, in parts of any size."""

    def __bytes__(self) -> bytes:
        return b"".join(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, bytes | Content) and bytes(self) == bytes(other)


class OpenFile(Content):
    """A file that is read where its bytes are needed, also after it was removed; closed when nobody needs it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.length = file, file.seek(0, 2)
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        self.file.seek(0)
        while part := self.file.read(PART):
            yield part

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill a buffer with the bytes from `start` on. Raises OSError where there are fewer."""
        self.file.seek(start)
        if self.file.readinto(buffer) != len(buffer):
            raise OSError("it is shorter than it was when it was opened")


def parts_of(data: bytes | Content) -> Iterator[memoryview | bytes]:
    """The bytes of a file's content in parts."""
    return iter((data,)) if isinstance(data, bytes) else iter(data)


def sha256(data: bytes | Content) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    for part in parts_of(data):
        digest.update(part)
    return digest.hexdigest()
