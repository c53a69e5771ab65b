"""Texts in a file, written as they come: a command that was killed goes on with the next one.

While it works, each text is appended to FILE.partial as soon as it is finished, with its number; by further processes,
to FILE.partial.1 and so on. FILE itself is there when it is whole, in the order of the prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from data.jsonlines import try_json_lines
from runtime.console import say
from runtime.errors import UsageError, UserError
from runtime.processes.world import world
from runtime.storage import folders

Line = Callable[[int, str], dict[str, Any]]  # of a text and its number


class Results:
    """Texts that are kept nowhere."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}  # those that were made before, by their numbers

    def add(self, number: int, text: str) -> None:
        """One more text is there."""

    def finish(self, texts: Sequence[str]) -> None:
        """All texts are there."""


class ResultsFile(Results):
    """Texts that go to a file. about: of what makes them, by which a command knows its own; line(number, text) is how
    one is written down."""

    def __init__(self, out: Path, about: str, line: Line) -> None:
        super().__init__()
        self.out, self.about, self.line = out, about, line
        self.own = out.with_name(f"{out.name}.partial" + (f".{world().rank}" if world().rank else ""))
        mine = self._read(self.own) if self.own.exists() else {}
        for path in self._parts():
            self.texts |= mine if path == self.own else self._read(path)
        everywhere = world().gather(list(self.texts.items()))
        self.texts = {number: text for some in everywhere for number, text in some}
        if self.texts:
            say(f"Going on: {len(self.texts):,} texts are there already, in {out}.partial")
        whole = [_written({"made_by": about}), *(self._numbered(number, text) for number, text in mine.items())]
        folders.write_file(self.own, "".join(whole).encode())  # without a line that was cut short

    def add(self, number: int, text: str) -> None:
        """Append a text."""
        folders.append_lines(self.own, self._numbered(number, text))

    def finish(self, texts: Sequence[str]) -> None:
        """Write the whole file, and remove what was there until now."""
        whole = "".join(_written(self.line(number, text)) for number, text in enumerate(texts))
        world().first(lambda: folders.write_file(self.out, whole.encode()))
        for path in self._parts():
            folders.remove_file(path)

    def _numbered(self, number: int, text: str) -> str:
        return _written({"number": number + 1} | self.line(number, text))

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(f"{self.out.name}.partial") + r"(\.[0-9]+)?")
        return sorted(path for path in self.out.parent.iterdir() if name.fullmatch(path.name))

    def _read(self, path: Path) -> dict[int, str]:
        """The texts of a part. Raises UserError for one that another command made."""
        lines = [value for _, value in try_json_lines(path) if not isinstance(value, UserError)]
        if not lines or lines[0].get("made_by") != self.about:
            raise UserError(
                f"{path} was made by a command with other prompts or settings: go on with that one, or remove it"
            )
        return {line["number"] - 1: line["text"] for line in lines[1:] if {"number", "text"} <= line.keys()}


def _written(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


@contextmanager
def results_in(out: str, about: str, line: Line) -> Iterator[Results]:
    """Where texts go: to a file, if one is named, which no other command writes meanwhile.

    Raises UsageError for a file that is there already, UserError where another command is writing it.
    """
    if not out:
        yield Results()
        return
    path, lock = Path(out), filelock.FileLock(Path(out).with_name(f".{Path(out).name}.lock"), timeout=0)

    def begin() -> None:
        if path.exists():
            raise UsageError(f"{path} is there already, and nothing is overwritten: name another file, or remove it")
        with folders.plain_errors(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise UserError(f"{path} is being written by another process") from None

    world().first(begin)
    try:
        yield ResultsFile(path, about, line)
    finally:
        if lock.is_locked:
            lock.release()
            folders.remove_file(Path(lock.lock_file))
