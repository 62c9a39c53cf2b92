"""The range whose codes tell as much as the numbers did: Kullback and Leibler's divergence, as TensorRT's calibrator.

The elements' histogram P (evenly wide bins, what lies outside the range put into its outermost bins) is squeezed into
as many bins as there are codes and spread out again over the bins that P fills: that is Q.

    KL(P || Q) = sum p log(p / q)

The range with the least divergence wins. The search goes over CANDIDATES thresholds on |x|. Zeros, which a ReLU makes
in masses and which always have a code of their own, are left out, as TensorRT does. Above MOST_BITS bits the codes are
finer than the bins and nothing is clipped.

Source: Migacz 2017, 8-bit Inference with TensorRT (GTC 2017).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Histogram
from qconv.quantizer import QuantSpec

Float64 = NDArray[np.float64]
BINS = 2048
CANDIDATES = 64
MOST_BITS = 8


def least_divergence(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> tuple[float, float]:
    """The range inside [low, high] that keeps the most information."""
    low, high = min(low, 0.0), max(high, 0.0)
    largest = max(-low, high)
    if spec.bits > MOST_BITS or largest < np.finfo(np.float32).tiny:
        return low, high
    levels = spec.qmax - spec.qmin + 1
    counts = even_bins(_without_zeros(histogram), low, high)
    width = (high - low) / BINS
    zero = -low / width  # where zero lies, in bins
    best, least = (low, high), math.inf
    for threshold in np.linspace(largest, largest * levels / BINS, CANDIDATES):
        first, last = max(0, math.floor(zero - threshold / width)), min(BINS, math.ceil(zero + threshold / width))
        if last - first < levels:
            break
        found = divergence(*clipped(counts, first, last), levels)
        if found < least:
            best, least = (max(low, -threshold), min(high, threshold)), found
    return best


def _without_zeros(histogram: Histogram) -> Histogram:
    kept = np.abs(histogram.edges).max(axis=0) > np.finfo(np.float32).tiny
    return Histogram(histogram.edges[:, kept], histogram.counts[kept])


def even_bins(histogram: Histogram, low: float, high: float) -> Float64:
    """Shares in BINS bins of the same width over [low, high]; inside each of the histogram's, elements lie evenly."""
    left, right = histogram.edges
    cumulated = np.concatenate([[0.0], np.cumsum(histogram.shares)])
    grid = np.linspace(low, high, BINS + 1)
    # the share of elements below x: what lies in whole bins, and a part of the bin that x is in
    at = np.searchsorted(left, grid, side="right") - 1
    inside = np.maximum(at, 0)
    width = np.maximum(right - left, np.finfo(np.float64).tiny)
    part = np.clip((grid - left[inside]) / width[inside], 0.0, 1.0)
    below = np.where(at < 0, 0.0, cumulated[inside] + part * histogram.shares[inside])
    below[-1] = cumulated[-1]
    return np.asarray(np.diff(below))


def clipped(counts: Float64, first: int, last: int) -> tuple[Float64, Float64]:
    """The bins first to last: P, with all that lies outside in the outermost ones, and the same without."""
    inside = counts[first:last]
    reference = inside.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    return reference, inside


def divergence(reference: Float64, inside: Float64, levels: int) -> float:
    """KL(P || Q) of P = reference, Q = `inside` squeezed into so many levels and spread out again; infinite where Q is
    zero and P is not."""
    starts = np.arange(levels) * len(reference) // levels
    filled = reference > 0
    sums, used = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    spread = np.repeat(sums / np.maximum(used, 1), np.diff([*starts, len(reference)])) * filled
    p, q = reference[filled] / reference.sum(), spread[filled] / max(float(spread.sum()), math.ulp(0.0))
    if (q == 0).any():
        return math.inf
    return float(np.sum(p * np.log(p / q)))
