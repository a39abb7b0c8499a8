"""Tests whether a difference is more than noise: an interval over seeds, a paired test over articles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The 97.5% quantile of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% confidence interval, by Student's t.

    Raises ValueError with fewer than 2 values or more than 10.
    """
    if not 2 <= len(values) <= len(_T) + 1:
        raise ValueError(f"from 2 to {len(_T) + 1} values, not {len(values)}")
    return statistics.mean(values), _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same articles (McNemar 1947).

    first, second: whether each article was classified correctly. Returns the number of articles that only
    the first classified correctly, the number for the second, and the two-sided p-value. Under the null
    hypothesis, each article on which they differ is a fair coin toss.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    differ, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(differ, k) for k in range(fewer + 1)) / 2**differ
    return only_first, only_second, min(1.0, 2 * tail)
