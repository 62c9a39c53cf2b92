"""How far a number measured on some pictures can be trusted: 95 % intervals, and a test for paired results.

    share       Wilson 1927: (p + z^2/2n +- z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)
    difference  of two shares on the same pictures, Agresti and Min 2005: half a picture is added to each of the four
                cells, then d +- z sqrt(var d)
    test        McNemar's, exact (1947): of n pictures that only one of two models gets right, is the split a coin's?
    the rest    the bootstrap over pictures (Efron 1979): percentiles of the measure on resampled pictures

Pictures are taken as drawn independently. None of it says anything about pictures of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # the normal distribution's 97.5th percentile
RESAMPLES = 1000
SIGNIFICANT = 0.05

Interval = tuple[float, float]


def of_share(hits: int, count: int) -> Interval | None:
    """Of `hits` pictures of `count`; None without pictures."""
    if not count:
        return None
    share, z2 = hits / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return middle - half if hits else 0.0, middle + half if hits < count else 1.0


def of_difference(won: int, lost: int, count: int) -> Interval | None:
    """Of one share less another. won, lost: pictures of `count` that only the first, only the second counts."""
    if not count:
        return None
    whole, moved = count + 2.0, won - lost
    half = Z * math.sqrt(max(won + lost + 1 - moved * moved / whole, 0.0)) / whole
    return max(-1.0, moved / whole - half), min(1.0, moved / whole + half)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value: how often a fair coin splits `won + lost` throws at least as unevenly."""
    throws = won + lost
    # Python's whole numbers are exact, floats of 2^-2000 are not
    tail = sum(math.comb(throws, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**throws))


def by_bootstrap(rows: NDArray[np.float64], measure: Callable[[NDArray[np.float64]], NDArray[Any]]) -> Interval | None:
    """Of what `measure` makes of the sums of `rows` over pictures.

    rows: (pictures, k). measure: sums (resamples, k) -> (resamples,). None where it is not finite, or of fewer than two
    pictures. Seeded: the same rows give the same interval.
    """
    count = len(rows)
    if count < 2:
        return None
    rng = np.random.default_rng(0)
    sums = np.stack([rng.multinomial(count, np.full(count, 1 / count)) @ rows for _ in range(RESAMPLES)])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = measure(sums)
    low, high = np.percentile(found, (2.5, 97.5)) if np.isfinite(found).all() else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else None
