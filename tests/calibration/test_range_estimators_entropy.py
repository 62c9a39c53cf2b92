"""Kullback and Leibler's divergence. Oracles: examples worked by hand, and a naive loop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qconv.calibration.range_estimators import (
    EVEN_BINS,
    clip_bins,
    kl_divergence,
    rebin_evenly,
    search_least_divergence,
)
from qconv.calibration.sketch import make_histogram
from qconv.quantizer import QuantSpec

UNSIGNED = QuantSpec(8, signed=False, symmetric=False)


def test_eight_bins_into_two_codes() -> None:
    """P = 1 0 2 3 | 5 3 1 7: the halves hold 6 and 16, spread over 3 and 4 bins that P fills: 2 0 2 2 | 4 4 4 4.

    Both add up to 22, so KL = (1 log(1/2) + 2 log(2/2) + 3 log(3/2) + 5 log(5/4) + 3 log(3/4) + 1 log(1/4)
    + 7 log(7/4)) / 22.
    """
    p = np.float64([1, 0, 2, 3, 5, 3, 1, 7])
    q = [2, 0, 2, 2, 4, 4, 4, 4]
    by_hand = sum(a / 22 * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    assert by_hand == pytest.approx(
        (-math.log(2) + 3 * math.log(1.5) + 5 * math.log(1.25) + 3 * math.log(0.75) - math.log(4) + 7 * math.log(1.75))
        / 22
    )
    assert kl_divergence(p, p, 2) == pytest.approx(by_hand)


def test_outliers_go_into_the_outermost_bin_of_p_alone() -> None:
    """Of 1 2 3 4 10 the first four bins: P = 1 2 3 14, and the codes are made of 1 2 3 4."""
    p, inside = clip_bins(np.float64([1, 2, 3, 4, 10]), 0, 4)
    assert p.tolist() == [1, 2, 3, 14]
    assert inside.tolist() == [1, 2, 3, 4]
    # two codes: 3 and 7, spread: 1.5 1.5 3.5 3.5, of 10; P of 20
    q = [0.15, 0.15, 0.35, 0.35]
    by_hand = sum(a / 20 * math.log(a / 20 / b) for a, b in zip([1, 2, 3, 14], q, strict=True))
    assert kl_divergence(p, inside, 2) == pytest.approx(by_hand)


def test_as_many_codes_as_bins_lose_nothing() -> None:
    p = np.float64([1, 5, 2, 0, 7])
    assert kl_divergence(p, p, 5) == pytest.approx(0)


def test_a_code_that_only_outliers_fill_is_infinitely_bad() -> None:
    p, inside = clip_bins(np.float64([1, 1, 0, 9]), 0, 3)
    assert kl_divergence(p, inside, 3) == math.inf


def test_even_bins_are_those_of_numpy() -> None:
    """Within what a bin of 1/128 of its place can move."""
    x = np.random.default_rng(0).gamma(3.0, size=20000).astype(np.float32)
    found = rebin_evenly(make_histogram(x), 0.0, float(x.max()))
    exact, _ = np.histogram(x, EVEN_BINS, (0.0, float(x.max())))
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.cumsum(found), np.cumsum(exact) / len(x), atol=0.004)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_threshold_is_the_best_of_all(bits: int) -> None:
    """Against every threshold of a naive search over the same bins."""
    x = np.abs(np.random.default_rng(1).laplace(size=50000)).astype(np.float32)
    spec = QuantSpec(bits, signed=False, symmetric=False)
    low, high = search_least_divergence(make_histogram(x), spec, 0.0, float(x.max()))
    counts = rebin_evenly(make_histogram(x), 0.0, float(x.max()))
    scores = {last: kl_divergence(*clip_bins(counts, 0, last), 2**bits) for last in range(2**bits, EVEN_BINS + 1)}
    at = round(high / float(x.max()) * EVEN_BINS)
    assert low == 0
    assert high < float(x.max())
    # the divergence is rough: among all thresholds, that of every 64th part must be one of the better ones
    assert scores[min(max(at, 2**bits), EVEN_BINS)] <= np.quantile(list(scores.values()), 0.1)


def test_numbers_spread_evenly_are_not_clipped() -> None:
    x = np.linspace(0, 5, 100001, dtype=np.float32)
    assert search_least_divergence(make_histogram(x), UNSIGNED, 0.0, 5.0)[1] == pytest.approx(5, rel=0.02)


def test_zeros_do_not_count() -> None:
    """A ReLU that makes nine of ten numbers zero leaves the threshold where it was."""
    x = np.abs(np.random.default_rng(1).laplace(size=20000)).astype(np.float32)
    many = np.concatenate([x, np.zeros(9 * len(x), np.float32)])
    ends = [search_least_divergence(make_histogram(numbers), UNSIGNED, 0.0, float(x.max())) for numbers in (x, many)]
    assert ends[0] == ends[1]


def test_both_signs_are_cut_at_one_threshold() -> None:
    x = np.random.default_rng(1).standard_t(3, size=50000).astype(np.float32)
    low, high = search_least_divergence(make_histogram(x), UNSIGNED, float(x.min()), float(x.max()))
    assert -low == high < float(np.abs(x).max())


@pytest.mark.parametrize("x", [[0.0] * 4, [3.0] * 4, [1e-42] * 4])
def test_constants_have_a_range(x: list[float]) -> None:
    numbers = np.float32(x)
    low, high = search_least_divergence(make_histogram(numbers), UNSIGNED, float(numbers.min()), float(numbers.max()))
    assert (low, high) == (0.0, float(numbers.max()))


def test_with_16_bits_nothing_is_clipped() -> None:
    x = np.abs(np.random.default_rng(1).laplace(size=1000)).astype(np.float32)
    spec = QuantSpec(16, signed=False, symmetric=False)
    assert search_least_divergence(make_histogram(x), spec, 0.0, float(x.max())) == (0.0, float(x.max()))
