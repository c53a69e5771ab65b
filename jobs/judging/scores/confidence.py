"""How sure a figure is that comes from a few prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # of 95 %
SIGNIFICANT = 0.05


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of values that count so much each."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n prompts. Wilson 1927; unlike share ± error it stays within 0 and 1, and has a
    width where none or all of the prompts count."""
    middle, spread = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def normal(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a weighted mean by the normal distribution; None for a single value."""
    n, centre = len(values), mean(values, weights)
    if n < 2:
        return None
    off = [weight * (value - centre) for value, weight in zip(values, weights, strict=True)]
    error = math.sqrt(n / (n - 1) * sum(x * x for x in off)) / sum(weights)
    return centre - Z * error, centre + Z * error


def sign_test(more: int, fewer: int) -> float:
    """How likely it is, where nothing differs, that the prompts that changed are spread over both sides as unevenly as
    this: the two-sided sign test, which for shares is McNemar's exact one."""
    n = more + fewer
    tail = sum(math.comb(n, k) for k in range(min(more, fewer) + 1))
    return min(1.0, 2 * tail / 2**n)
