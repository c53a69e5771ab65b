"""Which word of one text stands for which of another: two long lists of words, aligned."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Hashable, Iterator, Sequence

RUN = 4  # words in a row that make an anchor
LONGEST_GAP = 2500  # words between anchors that are compared with one another, which takes the square of their number

Words = Sequence[Hashable]


def align(one: Words, other: Words) -> dict[int, int]:
    """Positions of `one` that have a partner of the same word in `other` -> the partner's position; both rise together.

    Anchors are runs of words that occur once in each text. Between two anchors, where there are few words, difflib
    finds the rest; for whole plays it alone would take minutes. Of a gap with more than LONGEST_GAP words on a side,
    nothing is aligned.
    """
    partner: dict[int, int] = {}
    done_one = done_other = 0
    for start_one, start_other in (*_anchors(one, other), (len(one), len(other))):
        if start_one < done_one or start_other < done_other:  # an anchor that overlaps the one before
            continue
        partner.update(_between(one, range(done_one, start_one), other, range(done_other, start_other)))
        done_one, done_other = start_one + RUN, start_other + RUN
        if start_one < len(one):
            partner.update(zip(range(start_one, done_one), range(start_other, done_other), strict=True))
    return partner


def _between(one: Words, in_one: range, other: Words, in_other: range) -> Iterator[tuple[int, int]]:
    """Partners within two stretches, by difflib."""
    if not in_one or not in_other or max(len(in_one), len(in_other)) >= LONGEST_GAP:
        return
    pieces = (words[part.start : part.stop] for words, part in ((one, in_one), (other, in_other)))
    for block in difflib.SequenceMatcher(None, *pieces, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            yield in_one[block.a + i], in_other[block.b + i]


def _anchors(one: Words, other: Words) -> list[tuple[int, int]]:
    """Where each anchor starts in both texts: as many as can be had so that both positions rise."""
    starts_one, starts_other = _single_runs(one), _single_runs(other)
    return _rising([(start, starts_other[run]) for run, start in starts_one.items() if run in starts_other])


def _single_runs(words: Words) -> dict[tuple[Hashable, ...], int]:
    """The runs of RUN words that occur once -> where, in the order of the text."""
    starts: dict[tuple[Hashable, ...], int | None] = {}
    for start, run in enumerate(zip(*(words[i:] for i in range(RUN)), strict=False)):
        starts[run] = None if run in starts else start
    return {run: start for run, start in starts.items() if start is not None}


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest part of pairs, whose first numbers rise, in which the second rise too (patience sorting)."""
    lowest_ends: list[int] = []  # the lowest second number that a rising part of length 1, 2, ... can end with
    ends_at: list[int] = []  # and at which pair it does
    before: list[int | None] = []  # for each pair, the one before it in the longest part that it ends
    for at, (_, second) in enumerate(pairs):
        length = bisect.bisect_left(lowest_ends, second)
        lowest_ends[length : length + 1], ends_at[length : length + 1] = [second], [at]  # in its place, or at the end
        before.append(ends_at[length - 1] if length else None)
    found, at = [], ends_at[-1] if ends_at else None
    while at is not None:
        found.append(pairs[at])
        at = before[at]
    return found[::-1]
