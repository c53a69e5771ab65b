"""Rows of a batch out of records: one record a row, or as many as fit, which do not see each other."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from data.instructions.encoding import Encoded
from runtime.training.batch import IGNORED, Batch

Row = Sequence[int]  # the indices of the records in a row


def pack(lengths: Sequence[int], room: int) -> list[Row]:
    """Records of so many positions into as few rows of `room` positions as best fit, the longest first, finds.

    Raises ValueError for a record that is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # how much is left of each row that is not full, and which it is; sorted
    for record in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[record] > room:
            raise ValueError(f"a record of {lengths[record]} positions does not fit into {room}")
        place = bisect.bisect_left(free, (lengths[record], -1))
        left, row = free.pop(place) if place < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(record)
        if left > lengths[record]:
            bisect.insort(free, (left - lengths[record], row))
    return rows


def batch_of(rows: Sequence[Row], encoded: Sequence[Encoded], all_count: bool, packed: bool) -> Batch:
    """Rows of records as a batch, padded to the longest: at each position of a record the token that follows it is to
    be predicted, where it is said, or with `all_count` anywhere.

    packed: with positions that begin anew with each record, and the segments that records and padding are.
    """
    length = max(sum(len(encoded[i]) - 1 for i in row) for row in rows)
    tokens, positions, segments = (np.zeros((len(rows), length), np.int64) for _ in range(3))
    targets = np.full((len(rows), length), IGNORED, np.int64)
    for y, row in enumerate(rows):
        x = 0
        for number, each in enumerate((encoded[i] for i in row), 1):
            here = slice(x, x + len(each) - 1)
            tokens[y, here], positions[y, here], segments[y, here] = each.ids[:-1], np.arange(len(each) - 1), number
            following = each.ids[1:].astype(np.int64)  # IGNORED is no unsigned number
            targets[y, here] = following if all_count else np.where(each.said[1:], following, IGNORED)
            x = here.stop
    parts = [tokens, targets, *([positions, segments] if packed else [])]
    return Batch(*map(torch.from_numpy, parts))
