"""Tests whether a difference is more than noise: intervals over seeds and texts, a paired test over texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The 97.5% quantile of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = statistics.NormalDist().inv_cdf(0.975)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% confidence interval, by Student's t.

    Raises ValueError with fewer than 2 values or more than 10.
    """
    if not 2 <= len(values) <= len(_T) + 1:
        raise ValueError(f"from 2 to {len(_T) + 1} values, not {len(values)}")
    return statistics.mean(values), _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy, from the number of correct rows (Wilson 1927).

    Unlike the normal approximation it has a width at 0 and 1 too. It is (0, 1) if there are no rows.
    """
    if rows == 0:
        return 0.0, 1.0
    p, z = correct / rows, _Z * _Z / rows
    centre = (p + z / 2) / (1 + z)
    half_width = math.sqrt(p * (1 - p) * z + z * z / 4) / (1 + z)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same articles (McNemar 1947).

    first, second: whether each article was classified correctly. Returns the number of articles that only
    the first classified correctly, the number for the second, and the two-sided p-value. Under the null
    hypothesis, each article on which they differ is a fair coin toss.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differ, fewer = only_first + only_second, min(only_first, only_second)
    ways = tail = 1  # ways in which `differ` coins show k heads, and their sum up to k = `fewer`
    for k in range(fewer):
        ways = ways * (differ - k) // (k + 1)
        tail += ways
    return only_first, only_second, min(1.0, 2 * tail / 2**differ)
