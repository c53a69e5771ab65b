"""The metrics of a run, in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from runtime.console import say
from runtime.errors import UserError
from runtime.storage import folders


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with the step it was made after."""

    def __init__(self, path: Path, resumed_at: int, writes: bool = True) -> None:
        """Go on with the log of a run that resumes after `resumed_at` steps: later lines will be written anew.

        writes: False where another process writes it."""
        self.path, self.pending, self.writes = path, [], writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= resumed_at] if path.exists() else []
        last = max((line["step"] for line in kept), default=0)
        if last < resumed_at:
            say(f"{path} ends at step {last}, before step {resumed_at} where the run goes on")
        folders.write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, step: int, **values: float) -> None:
        """One line, written with the next `flush`."""
        self.pending.append(json.dumps({"step": step} | values))

    def flush(self) -> None:
        """Append what is pending to the file."""
        if self.pending and self.writes:
            folders.append_lines(self.path, "\n".join(self.pending) + "\n")
        self.pending.clear()

    def close(self) -> None:
        """Append what is pending, however the run ended; where that fails it is said, and is no reason to stop."""
        try:
            self.flush()
        except UserError as error:
            say(f"The last lines of the log are lost: {error}")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl that are whole; others are counted on stderr.

    Raises UserError where it cannot be read.
    """
    lines, corrupted = [], 0
    with folders.plain_errors(path, "read"):
        data = path.read_bytes()
    for line in data.split(b"\n"):
        try:
            value = json.loads(line)
            if type(value["step"]) is not int:
                raise TypeError
            lines.append(value)
        except (ValueError, KeyError, TypeError, RecursionError):
            corrupted += bool(line.strip())
    if corrupted:
        say(f"{path}: {corrupted} corrupted line(s) left out")
    return lines
