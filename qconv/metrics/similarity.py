"""Measures how near the numbers of one output are to those of a reference, and how sure a measure is.

    SQNR    = 10 log10(sum ref^2 / sum (ref - got)^2), in dB
    cosine  = sum ref got / sqrt(sum ref^2 sum got^2)

    share       Wilson 1927: (p + z^2/2n +- z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)
    difference  of two shares on the same images, Agresti and Min 2005: 1/2 is added to each of the four cells
    test        McNemar's, exact (1947): of n images that only one of two models gets right, is the split a coin's?
    the rest    the bootstrap over images (Efron 1979): percentiles of the measure on resampled images

Images are taken as drawn independently. None of it says anything about images of another kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.results.scores import COSINE, SQNR, Interval, Score
from qconv.runtime.outputs import ModelOutput

Z_975 = 1.959963984540054  # the normal distribution's 97.5th percentile

RESAMPLES = 1000

SIGNIFICANT = 0.05


def share_interval(hits: int, count: int) -> Interval | None:
    """Of `hits` pictures of `count`; None without pictures."""
    if not count:
        return None
    share, z2 = hits / count, Z_975 * Z_975 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return middle - half if hits else 0.0, middle + half if hits < count else 1.0


def difference_interval(won: int, lost: int, count: int) -> Interval | None:
    """Of one share less another. won, lost: pictures of `count` that only the first, only the second counts."""
    if not count:
        return None
    whole, moved = count + 2.0, won - lost
    half = Z_975 * math.sqrt(max(won + lost + 1 - moved * moved / whole, 0.0)) / whole
    return max(-1.0, moved / whole - half), min(1.0, moved / whole + half)


def mcnemar_p_value(won: int, lost: int) -> float:
    """Two-sided p-value: how often a fair coin splits `won + lost` throws at least as unevenly."""
    throws = won + lost
    # Python's whole numbers are exact, floats of 2^-2000 are not
    tail = sum(math.comb(throws, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**throws))


def bootstrap_interval(
    rows: NDArray[np.float64], measure: Callable[[NDArray[np.float64]], NDArray[Any]]
) -> Interval | None:
    """Of what `measure` makes of the sums of `rows` over pictures.

    rows: (pictures, k). measure: sums (resamples, k) -> (resamples,). None where it is not finite, or of fewer than two
    pictures. Seeded: the same rows give the same interval.
    """
    count = len(rows)
    if count < 2:
        return None
    sums = np.stack([draws @ rows for draws in iter_resamples(count)])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = measure(sums)
    return percentile_interval(found)


def iter_resamples(count: int, resamples: int = RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """Yield how often each of `count` pictures is drawn, (count,), the same in every run."""
    rng = np.random.default_rng(0)
    yield from (rng.multinomial(count, np.full(count, 1 / count)) for _ in range(resamples))


def percentile_interval(found: NDArray[Any]) -> Interval | None:
    """The middle 95 % of what was measured on resampled pictures; None where it is not finite."""
    low, high = np.percentile(found, (2.5, 97.5)) if np.isfinite(found).all() else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else None


LARGEST_POWER = 1e200
"""Power of what holds NaN or infinity: what can still be added up."""

LARGEST_NOISE = float(np.finfo(np.float64).max) / 1e6
"""Noise of what holds NaN or infinity where the reference does not."""


def compute_sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where the noise is zero.

    A signal of zero and a noise without bound count as the least and the largest float.
    """
    if noise == 0:
        return None
    limits = np.finfo(np.float64)
    return 10 * (math.log10(max(signal, limits.tiny)) - math.log10(min(noise, limits.max)))


def measure_error(reference: NDArray[Any], got: NDArray[Any]) -> tuple[float, float]:
    """Signal and noise of one batch, as float64: sum ref^2 and sum (ref - got)^2.

    Where the reference itself is NaN or infinite there is nothing to be near to, and nothing counts. The noise is
    infinite where only `got` is.
    """
    finite = np.isfinite(reference)
    if finite.all():  # nearly always, and to pick numbers one by one takes longest
        ref, other = reference.reshape(-1).astype(np.float64), got.reshape(-1).astype(np.float64)
    else:
        ref, other = reference[finite].astype(np.float64), got[finite].astype(np.float64)
    missed = (ref - other) ** 2
    finite = np.isfinite(other)
    noise = np.sum(missed if finite.all() else np.where(finite, missed, np.inf))
    return float(np.sum(ref * ref)), float(noise)


def finite_power(x: NDArray[Any]) -> float:
    """Sum of squares in float64 of all numbers that are finite."""
    finite = np.isfinite(x)
    numbers = (x.reshape(-1) if finite.all() else x[finite]).astype(np.float64)
    return float(np.sum(numbers * numbers))


def signal_power(x: NDArray[Any]) -> float:
    """Sum of squares in float32, for tensors of layers, which are large; LARGEST_POWER where that is no number."""
    flat = x.reshape(-1).astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(flat, flat))
        if not math.isfinite(found):
            found = float(np.sum(flat.astype(np.float64) ** 2))
    return found if math.isfinite(found) else LARGEST_POWER


def sqnr_interval(rows: NDArray[np.float64]) -> Interval | None:
    """Of SQNR in dB, by the bootstrap. rows: signal and noise of each draw, (draws, 2)."""
    return bootstrap_interval(rows, lambda sums: 10 * np.log10(sums[:, 0] / sums[:, 1]))


@dataclass(slots=True)
class Sqnr:
    """SQNR of an output. rows: signal and noise of each batch, which count as draws."""

    output: ModelOutput
    signal: float = 0.0
    noise: float = 0.0
    broken: bool = False
    rows: list[tuple[float, float]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        signal, noise = measure_error(reference, got)
        self.broken = self.broken or math.isinf(noise)
        noise = min(noise, LARGEST_NOISE)
        self.signal += signal
        self.noise += noise
        self.rows.append((signal, noise))

    def score(self, *, spans: bool) -> Score:
        """None for a value where nothing differs."""
        decibel = compute_sqnr_db(self.signal, self.noise)
        known = spans and decibel is not None
        return Score(SQNR, decibel, sqnr_interval(np.array(self.rows)) if known else None)


@dataclass(slots=True)
class Cosine:
    """Cosine of the angle between an output and its reference, both as one long vector over all batches."""

    output: ModelOutput
    product: float = 0.0
    powers: tuple[float, float] = (0.0, 0.0)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch. Where either is no number it counts as 0."""
        finite = np.isfinite(reference)
        ref = np.where(finite, reference, 0).astype(np.float64)
        other = np.where(finite & np.isfinite(got), got, 0).astype(np.float64)
        self.product += float(np.sum(ref * other))
        self.powers = self.powers[0] + float(np.sum(ref * ref)), self.powers[1] + float(np.sum(other * other))

    def score(self, *, spans: bool) -> Score:
        """None for a value where either is zero."""
        power = self.powers[0] * self.powers[1]
        return Score(COSINE, self.product / math.sqrt(power) if power > 0 else None)
