"""Files of JSON lines: one object a line, and in every error the line where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.storage.folders import plain_errors

LONGEST = 2**26  # bytes of a line: no record that anybody trains on is as long, and one without an end fills the memory


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict. Raises ValueError for a key that is there twice."""
    if len(pairs) != len(dict(pairs)):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode(), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON in UTF-8: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object in braces, and it is {json.dumps(value)[:40]}")
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a file with where it stands, as `pairs.jsonl line 3`. Empty lines are passed over.

    Raises UserError that names the line for anything else.
    """
    for where, value in try_json_lines(path):
        if isinstance(value, UserError):
            raise value
        yield where, value


def try_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """The same, but a line that is no object comes as the error that it is, and what follows it comes too.

    Only a newline ends a line: within JSON's strings other signs may stand that `str.splitlines` splits at, as U+2028.
    """
    with plain_errors(path, "read"), path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path} line {number}"
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
                yield where, UserError(f"{where}: it has more than {LONGEST // 2**20} MB; is it one record a line?")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield where, _tried(line, where)


def _tried(line: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        return _object(line, where)
    except UserError as error:
        return error
