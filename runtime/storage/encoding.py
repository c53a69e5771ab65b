"""JSON objects as the bytes of files, and back; whatever is no such file is refused by name."""

from __future__ import annotations

import json

from runtime.storage.content import sha256
from runtime.storage.folders import CorruptedError

SEAL = "sha256"


def read_json(data: bytes, name: str) -> dict:
    """A JSON object. Raises CorruptedError, naming the file, where it is none or says something twice."""
    try:
        value = json.loads(data, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CorruptedError(f"{name} is corrupted: {error}") from None
    if not isinstance(value, dict):
        raise CorruptedError(f"{name} is corrupted: not a JSON object")
    return value


def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """An object of these pairs, as an `object_pairs_hook`. Raises ValueError where a name is there more than once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there more than once")
    return value


def to_json(value: dict) -> bytes:
    """A JSON object as readable bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _digest(value: dict) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def to_sealed_json(value: dict) -> bytes:
    """A JSON object as readable bytes, with a checksum of its own as the last entry."""
    return to_json(value | {SEAL: _digest(value)})


def read_sealed_json(data: bytes, name: str) -> dict:
    """What `to_sealed_json` wrote. An object without a checksum, as earlier versions wrote it, is taken as it is.

    Raises CorruptedError, naming the file, where it is no JSON object or not the one that was written.
    """
    value = read_json(data, name)
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _digest(value):
        raise CorruptedError(f"{name} is corrupted: its checksum is not the one that was saved")
    return value
