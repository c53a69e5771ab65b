"""Which name was meant by one that is misspelt."""

from __future__ import annotations

import re
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The first of the names that are the fewest typing errors away, if there are any."""
    return min(names, key=lambda other: typing_errors(name, other), default=None)


def is_near_miss(name: str, meant: str) -> bool:
    """Whether `name` looks like a misspelt `meant`: other case or separators, one typing error, or two in a long name.

    With two errors each word must still be mostly right, or USE_LOCAL, BIN_NAME and META_DIR, which belong to others,
    would be taken for USE_LORA, RUN_NAME and DATA_DIR.
    """
    limit = 2 if len(meant) >= 8 else 1
    name = re.sub(r"[-. ]", "_", name.upper())
    if name.replace("_", "") == meant.replace("_", ""):
        return True
    # One error changes the length by at most one and the set of letters by at most two: cheap to rule out first.
    if abs(len(name) - len(meant)) > limit or len(set(name) ^ set(meant)) > 2 * limit:
        return False
    errors = typing_errors(name, meant)
    words = list(zip(name.split("_"), meant.split("_"), strict=False))
    whole = name.count("_") == meant.count("_") and all(2 * typing_errors(a, b) < len(b) for a, b in words)
    return errors <= 1 or (errors <= limit and whole)


def typing_errors(a: str, b: str) -> int:
    """Letters missing, added, wrong or swapped with their neighbour (Damerau 1964, optimal string alignment)."""
    before, above = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1]
