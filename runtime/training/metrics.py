"""Metrics and progress of a run: metrics.jsonl for programs, a progress bar (or plain lines) for people."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from runtime.console import is_terminal, say
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


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every few seconds and at the end, so that logs stay readable.

    With `every_steps`, lines come with the steps, on a terminal too, above the bar. unit: what is counted.
    """

    def __init__(
        self, label: str, total: int, start: int, every_seconds: float = 10.0, *, every_steps: int = 0,
        unit: str = "step",
    ) -> None:  # fmt: skip
        self.label, self.total, self.start, self.unit = label, total, start, unit
        self.every_seconds, self.every_steps = every_seconds, every_steps
        self.step = self.told = start
        self.values: dict[str, str] = {}
        self.began = self.last_line = time.perf_counter()
        self.bar = None
        if is_terminal():
            self.bar = tqdm(total=total, initial=start, desc=label, unit=unit, dynamic_ncols=True, mininterval=0.2)

    def update(self, step: int, **values: str) -> None:
        """`step` steps are done; `values` are shown until they are replaced."""
        self.values |= values
        done, self.step = step - self.step, step
        if self.bar is not None:
            self.bar.set_postfix(self.values, refresh=False)
            self.bar.update(done)
        if self._is_due() and step < self.total:  # `close` prints the last one
            self.line()

    def _is_due(self) -> bool:
        if self.every_steps:
            return self.step % self.every_steps == 0 and self.told != self.step
        return self.bar is None and time.perf_counter() - self.last_line >= self.every_seconds

    def line(self) -> None:
        """One plain line: where the run is, its values, and the time left."""
        self.told, self.last_line = self.step, time.perf_counter()
        left = (self.last_line - self.began) / max(1, self.step - self.start) * (self.total - self.step)
        values = "".join(f", {name} {value}" for name, value in self.values.items())
        with tqdm.external_write_mode(sys.stderr):  # which takes a bar away meanwhile
            say(f"{self.label}: {self.unit} {self.step}/{self.total}{values}, {left:.0f} s left")

    def close(self) -> None:
        """Leave the bar as it stands, and print the last step if no line has where there are lines."""
        if self.bar is not None:
            self.bar.close()
        if self.told != self.step and (self.bar is None or self.every_steps):
            self.line()


class Patience:
    """Progress on stderr, but only of what takes longer than two seconds. unit: what is counted."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self.unit, self.began, self.progress = label, unit, time.perf_counter(), None

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        if self.progress is None and time.perf_counter() - self.began > 2:
            self.progress = Progress(self.label, total, done, every_seconds=2, unit=self.unit)
        if self.progress:
            self.progress.update(done)
            if done == total:
                self.progress.close()
