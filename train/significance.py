"""Tests whether a difference is more than noise: intervals, paired tests, and several tests at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_Z = statistics.NormalDist().inv_cdf(0.975)


def normal_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of many values and half the width of its 95% interval, by the normal approximation.

    Raises statistics.StatisticsError with fewer than 2 values.
    """
    return statistics.fmean(values), _Z * statistics.stdev(values) / math.sqrt(len(values))


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of paired differences from -1 to 1 (Agresti and Min 2005).

    It is the normal interval after half an observation of 1, half of -1 and one of 0 are added. So it has a
    width where no article differs, and is not too narrow where few do.
    """
    rows = len(differences) + 2
    mean = sum(differences) / rows
    variance = (sum(difference * difference for difference in differences) + 1) / rows - mean * mean
    half_width = _Z * math.sqrt(variance / rows)
    return mean - half_width, mean + half_width


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


def sign_flip(differences: Sequence[int]) -> float:
    """The exact two-sided p-value of paired differences by the sign-flip test (Fisher 1935, section 21).

    differences: for each article, in how many more runs the first of two methods was right than the second.
    Under the null hypothesis each difference is as likely to have the other sign. p is the share of all
    choices of signs whose sum is at least as far from zero. With one run each it is McNemar's exact test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    ways = [1]  # ways[k]: choices of signs in which the positive differences have the sum k
    for size in sizes:
        zeros = [0] * size
        ways = [a + b for a, b in zip(ways + zeros, zeros + ways, strict=True)]
    total, found = sum(sizes), abs(sum(differences))
    as_far: int = sum(n for k, n in enumerate(ways) if abs(2 * k - total) >= found)
    return as_far / int(2 ** len(sizes))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected for their number by Holm's method (Holm 1979).

    Where tests are called significant if their corrected value is below 5%, the probability that any of them
    is wrongly called so is at most 5%.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
