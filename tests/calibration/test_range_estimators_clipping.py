"""Ranges that clip. Oracles: brute force on the numbers, numerical integrals, the papers' printed constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.range_estimators import (
    aciq_closed_form,
    expected_squared_error,
    fit_density,
    gauss_clipping_factor,
    laplace_clipping_factor,
    search_least_squares,
)
from qconv.calibration.sketch import Histogram, make_histogram
from qconv.quantizer import QuantSpec

ASYMMETRIC = {bits: QuantSpec(bits, signed=False, symmetric=False) for bits in (2, 3, 4, 8, 16)}
SYMMETRIC = {bits: QuantSpec(bits, signed=True, symmetric=True) for bits in (2, 3, 4, 8, 16)}


def numbers(kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    drawn = {
        "relu": lambda: np.maximum(rng.laplace(size=20000), 0),
        "relu6": lambda: np.clip(rng.normal(size=20000) * 3, 0, 6),
        "gauss": lambda: rng.normal(size=20000) + 0.5,
        "skewed": lambda: rng.gamma(2.0, size=20000) - 1,
        "outlier": lambda: np.append(np.maximum(rng.normal(size=20000), 0), [30.0]),
        "negative": lambda: -np.abs(rng.normal(size=20000)),
    }[kind]()
    return drawn.astype(np.float32)


def mean_square(x: NDArray[np.float32], spec: QuantSpec, low: float, high: float) -> float:
    return float(np.mean((spec.from_range(low, high).fake_quantize(x).astype(np.float64) - x) ** 2))


KINDS = ("relu", "relu6", "gauss", "skewed", "outlier", "negative")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [*ASYMMETRIC.values(), *SYMMETRIC.values()], ids=str)
def test_the_expected_error_is_the_mean_of_the_numbers_own(kind: str, spec: QuantSpec) -> None:
    x = numbers(kind)
    for share in (1.0, 0.7, 0.3):
        low, high = float(x.min()) * share, float(x.max()) * share
        expected = expected_squared_error(make_histogram(x), spec.from_range(np.float64([low]), np.float64([high])))[0]
        assert expected == pytest.approx(mean_square(x, spec, low, high), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_as_good_as_brute_force(kind: str, bits: int) -> None:
    """On 60 shares of the upper end, and 30 of the lower one where both are free."""
    x, spec = numbers(kind), ASYMMETRIC[bits]
    low, high = float(x.min()), float(x.max())
    found = mean_square(x, spec, *search_least_squares(make_histogram(x), spec, low, high))
    lows = np.linspace(low, 0, 30, endpoint=False) if low < 0 else [0.0]
    highs = np.linspace(high, 0, 60, endpoint=False) if high > 0 else [0.0]
    best = min(mean_square(x, spec, a, b) for a in lows for b in highs)
    assert found <= best * 1.03


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_of_a_symmetric_quantizer(bits: int) -> None:
    x, spec = numbers("gauss"), SYMMETRIC[bits]
    low, high = float(x.min()), float(x.max())
    found = mean_square(x, spec, *search_least_squares(make_histogram(x), spec, low, high))
    reach = max(-low, high)
    best = min(mean_square(x, spec, -reach * share, reach * share) for share in np.linspace(0.05, 1, 200))
    assert found <= best * 1.01


def test_a_far_outlier_is_found_to_be_worth_clipping() -> None:
    """A million numbers spread evenly up to 100, and one of 1000, at 8 bits."""
    counts = np.array([10**6 // 100] * 100 + [1])
    grid = np.linspace(0, 100, 101)
    edges = np.append(grid[:-1], 1000.0), np.append(grid[1:], 1000.0)
    low, high = search_least_squares(Histogram(np.stack(edges), counts), ASYMMETRIC[8], 0.0, 1000.0)
    assert low == 0
    # clip at a: (1000 - a)^2 / n + a^2 / (12 * 255^2), least where a = 1000 / (1 + n / (12 * 255^2))
    assert high == pytest.approx(1000 / (1 + (10**6 + 1) / (12 * 255**2)), rel=0.02)


def test_constants_and_zeros_have_a_range() -> None:
    for x in (np.zeros(5, np.float32), np.full(5, 3, np.float32), np.full(5, -3, np.float32), np.float32([1e-42] * 5)):
        low, high = search_least_squares(make_histogram(x), ASYMMETRIC[8], float(x.min()), float(x.max()))
        assert (low, high) == (min(0.0, float(x.min())), max(0.0, float(x.max())))
        low, high = aciq_closed_form(make_histogram(x), ASYMMETRIC[8], float(x.min()), float(x.max()))
        assert low <= high


# -- ACIQ --------------------------------------------------------------------------------------------------------------


def test_laplace_constants_of_the_paper() -> None:
    """Banner et al. 2019, section 4.1: 2.83, 3.89 and 5.03 b for 2, 3 and 4 bits."""
    assert [laplace_clipping_factor(bits, one_sided=False) for bits in (2, 3, 4)] == pytest.approx(
        [2.83, 3.89, 5.03], abs=0.01
    )


def test_gauss_constants_of_the_paper() -> None:
    """Banner et al. 2019, section 4.2: 1.71, 2.15 and 2.55 sigma for 2, 3 and 4 bits."""
    assert [gauss_clipping_factor(bits, one_sided=False) for bits in (2, 3, 4)] == pytest.approx(
        [1.71, 2.15, 2.55], abs=0.01
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("laplace", [True, False])
@pytest.mark.parametrize("one_sided", [True, False])
def test_factors_minimise_the_integral(bits: int, laplace: bool, one_sided: bool) -> None:
    """Clipping error by numerical integration of the density, rounding error step^2 / 12, both by brute force."""
    x = np.linspace(0, 40, 400001)
    density = np.exp(-x) if laplace else 2 * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # of |x|, scale 1
    alphas = np.linspace(0.5, 16, 621)
    lost = [np.trapezoid(np.where(x > a, (x - a) ** 2, 0) * density, x) for a in alphas]
    width = alphas if one_sided else 2 * alphas
    best = alphas[int(np.argmin(lost + (width / 2**bits) ** 2 / 12))]
    factor = (laplace_clipping_factor if laplace else gauss_clipping_factor)(bits, one_sided=one_sided)
    assert factor == pytest.approx(best, abs=0.03)


def test_the_density_that_was_drawn_is_found() -> None:
    rng = np.random.default_rng(0)
    bell = fit_density(make_histogram((rng.normal(2, 3, 50000)).astype(np.float32)), one_sided=False)
    assert not bell.laplace
    assert (bell.centre, bell.scale) == pytest.approx((2, 3), rel=0.05)
    peak = fit_density(make_histogram((rng.laplace(0, 3, 50000)).astype(np.float32)), one_sided=False)
    assert peak.laplace
    assert peak.scale == pytest.approx(3, rel=0.05)


def test_behind_a_relu_the_right_half_counts() -> None:
    """Zeros say nothing of the scale; one bit more, as the codes cover half the width."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.laplace(0, 2, 100000), 0).astype(np.float32)
    low, high = aciq_closed_form(make_histogram(x), ASYMMETRIC[4], 0.0, float(x.max()))
    assert low == 0
    assert high == pytest.approx(2 * laplace_clipping_factor(5, one_sided=False), rel=0.03)


def test_aciq_goes_no_further_than_the_numbers() -> None:
    x = np.float32([-1, 0, 1, 1, -1])
    assert aciq_closed_form(make_histogram(x), ASYMMETRIC[8], -1.0, 1.0) == (-1.0, 1.0)
