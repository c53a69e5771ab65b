"""How long an answer is: in a band, or beside the one that is wanted."""

from __future__ import annotations

BANDS = ("short", "medium", "long")


def band(count: int, edges: tuple[int, int]) -> str:
    """The band of an answer of so many words. edges: the most that a short and a medium one have."""
    return BANDS[sum(count > edge for edge in edges)]


def within(count: int, wanted: int, percent: float) -> bool:
    """Whether a number of words is at most so many per cent off the wanted one."""
    return abs(count - wanted) <= wanted * percent / 100
