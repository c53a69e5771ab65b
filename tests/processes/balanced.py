"""What sums and their cost are by definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def tree_sum(rows: Sequence[Tensor]) -> Tensor:
    """((0 + 1) + (2 + 3)) + ..., where the first half of a sum has the highest power of two of rows that leaves some
    for the second."""
    if len(rows) == 1:
        return rows[0]
    half = 1 << ((len(rows) - 1).bit_length() - 1)
    return tree_sum(rows[:half]) + tree_sum(rows[half:])


def bytes_sent(length: int, processes: int, size: int = 4) -> float:
    """What each process sends of a vector of so many numbers when all get the sum."""
    return 2 * (processes - 1) / processes * length * size
