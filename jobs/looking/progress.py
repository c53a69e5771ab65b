"""Progress on stderr while rows are read, of which nobody knows how many there are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from runtime.console import is_terminal, say

PATIENCE, EVERY = 2, 5  # seconds without a word, and between two lines

T = TypeVar("T")


def told(rows: Iterable[T]) -> Iterator[T]:
    """The rows; after two seconds stderr begins to say how many there were, by a bar on a terminal, else by lines."""
    began, next_line, bar = time.perf_counter(), PATIENCE, None
    for i, row in enumerate(rows):
        passed = time.perf_counter() - began
        if passed > next_line and bar is None:
            if is_terminal():
                bar = tqdm(initial=i, unit=" rows", dynamic_ncols=True, mininterval=0.2)
            else:
                say(f"{i:,} rows read in {passed:.0f} s ...")
                next_line = passed + EVERY
        if bar is not None:
            bar.update()
        yield row
    if bar is not None:
        bar.close()
