"""How far something is, on stderr: one line that is drawn over itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from runtime.console import has_colours, is_terminal, say, terminal_width

FIRST = ("loss", "val")  # of the values, those that people look for
BARS, TREND = "▁▂▃▄▅▆▇█", 12  # of a sparkline, and how many it has
STYLES = {"loss": "1", "val": "1;32", "name": "2"}  # bold, bold green, faint


class Progress:
    """One line on a terminal; elsewhere a plain line every few seconds and at the end, so that logs stay readable.

    With `every_steps`, lines come with the steps, on a terminal too, above the one that is drawn over. unit: what is
    counted.
    """

    def __init__(
        self, label: str, total: int, start: int, every_seconds: float = 10.0, *, every_steps: int = 0,
        unit: str = "step",
    ) -> None:  # fmt: skip
        self.label, self.total, self.start, self.unit = label, total, start, unit
        self.every_seconds, self.every_steps = every_seconds, every_steps
        self.step = self.told = start
        self.values: dict[str, str] = {}
        self.losses: list[float] = []
        self.began = self.last_line = time.perf_counter()
        self.bar = None
        if is_terminal():
            self.bar = tqdm(total=total, initial=start, bar_format="{desc}", dynamic_ncols=True, mininterval=0.2)

    def update(self, step: int, **values: str) -> None:
        """`step` steps are done; `values` are shown until they are replaced."""
        self.values |= values
        self.losses += [float(values["loss"])] if "loss" in values else []
        done, self.step = step - self.step, step
        if self.bar is not None:
            line = fitting(self._parts(), terminal_width() - 1, has_colours())
            self.bar.set_description_str(line, refresh=False)
            self.bar.update(done)
        if self._is_due() and step < self.total:  # `close` prints the last one
            self.line()

    def _is_due(self) -> bool:
        if self.every_steps:
            return self.step % self.every_steps == 0 and self.told != self.step
        return self.bar is None and time.perf_counter() - self.last_line >= self.every_seconds

    def _left(self) -> float:
        """The seconds that are left."""
        passed = time.perf_counter() - self.began
        return passed / max(1, self.step - self.start) * (self.total - self.step)

    def _parts(self) -> list[tuple[str, str]]:
        """What the line on a terminal says, what matters most first, each with what it is."""
        first = [(name, f"{name} {self.values[name]}") for name in FIRST if name in self.values]
        others = [(name, f"{value} {name}") for name, value in self.values.items() if name not in FIRST]
        far = [("left", f"{duration(self._left())} left"), ("far", f"{self.unit} {self.step:,}/{self.total:,}")]
        trend = [("trend", sparkline(self.losses))] if len(self.losses) > 1 else []
        return [*first, *far, *others, *trend, ("name", self.label)]

    def line(self) -> None:
        """One plain line: where the run is, its values, and the time left."""
        left, self.told, self.last_line = self._left(), self.step, time.perf_counter()
        values = "".join(f", {name} {value}" for name, value in self.values.items())
        with tqdm.external_write_mode(sys.stderr):  # which takes the other line away meanwhile
            say(f"{self.label}: {self.unit} {self.step}/{self.total}{values}, {duration(left)} left")

    def close(self) -> None:
        """Leave the line as it stands, and print the last step if no line has where there are lines."""
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


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def fitting(parts: Sequence[tuple[str, str]], width: int, coloured: bool) -> str:
    """The parts that fit side by side, from the first on; the first one cut short if it has to be."""
    kept, room = [], width
    for kind, text in parts:
        shown = text if kept else text[:width]
        if len(shown) > room:
            break
        kept.append(f"\033[{STYLES[kind]}m{shown}\033[0m" if coloured and kind in STYLES else shown)
        room -= len(shown) + 2
    return "  ".join(kept)


def sparkline(values: Sequence[float]) -> str:
    """How values went from the first to the last, as bars between the lowest and the highest; a bar is a mean."""
    count = min(TREND, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    known = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, high = min(known), max(known)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] if math.isfinite(mean) else "?" for mean in means)
