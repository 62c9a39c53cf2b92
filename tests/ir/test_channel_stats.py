"""Closed forms against numerical integration, and sums against large samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconv.ir.channel_stats import ChannelDistribution

INF = math.inf
Z = np.linspace(-12, 12, 240_001)
DENSITY = np.exp(-Z * Z / 2) / math.sqrt(2 * math.pi)


def integrated(mean: float, std: float, low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of min(max(x, low), high), by the trapezoidal rule."""
    y = np.clip(mean + std * Z, low, high)
    first = float(np.trapezoid(y * DENSITY, Z))
    return first, math.sqrt(float(np.trapezoid((y - first) ** 2 * DENSITY, Z)))


def one(mean: float, std: float) -> ChannelDistribution:
    return ChannelDistribution(np.array([mean]), np.array([std]))


@pytest.mark.parametrize(("low", "high"), [(0, INF), (0, 6), (-INF, 1), (-1, 1), (-INF, INF), (2, 2)])
@pytest.mark.parametrize("mean", [-3, -0.4, 0, 1.5, 6, 20])
@pytest.mark.parametrize("std", [0.1, 1, 4])
def test_a_clipped_normal_variable(low: float, high: float, mean: float, std: float) -> None:
    found = one(mean, std).clipped(low, high)
    assert found.std is not None
    assert (found.mean[0], found.std[0]) == pytest.approx(integrated(mean, std, low, high), abs=2e-6)


def test_relu_of_the_standard_normal_variable_by_hand() -> None:
    """E = 1 / sqrt(2 pi), E[y^2] = 1/2."""
    found = one(0, 1).clipped(0, INF)
    assert found.std is not None
    assert found.mean[0] == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-14)
    assert found.std[0] == pytest.approx(math.sqrt(1 / 2 - 1 / (2 * math.pi)), rel=1e-14)


@given(
    mean=st.floats(-1e6, 1e6),
    std=st.sampled_from([0.0, 1e-300, 1e-6, 1.0, 1e3]),
    low=st.sampled_from([-INF, -1.0, 0.0]),
    high=st.sampled_from([0.0, 6.0, INF]),
)
def test_no_result_leaves_the_bounds(mean: float, std: float, low: float, high: float) -> None:
    found = one(mean, std).clipped(low, high)
    assert found.std is not None
    assert low <= found.mean[0] <= high
    assert 0 <= found.std[0] <= std
    if std == 0:
        assert found.mean[0] == min(max(mean, low), high)


def test_what_never_reaches_a_bound_stays() -> None:
    found = one(50, 1).clipped(0, INF)
    assert found.std is not None
    assert (found.mean[0], found.std[0]) == pytest.approx((50, 1), rel=1e-12)
    assert one(-50, 1).clipped(0, INF).mean[0] == pytest.approx(0, abs=1e-12)


def test_sums_and_scales_against_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    means, stds = np.array([0.5, -1.0]), np.array([1.0, 2.0])
    x, z = (rng.normal(means, stds, (1_000_000, 2)) for _ in range(2))
    gain, shift = np.array([-2.0, 0.5]), np.array([1.0, 3.0])
    y = gain * np.maximum(x, 0) + shift + z
    found = ChannelDistribution(means, stds).clipped(0, INF).scaled(gain, shift).plus(ChannelDistribution(means, stds))
    assert found.std is not None
    np.testing.assert_allclose(found.mean, y.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(found.std, y.std(axis=0), atol=0.01)


def test_what_is_no_longer_normal() -> None:
    whole = one(0, 1)
    cut = whole.clipped(0, INF)
    assert not whole.cut
    assert cut.cut
    assert cut.scaled(np.ones(1), np.ones(1)).cut
    assert cut.plus(cut).cut
    assert not cut.plus(whole).cut
    assert ChannelDistribution.joined([whole, cut]).cut
    assert whole.averaged().cut
    assert whole.averaged().plus(whole).std is None
    assert ChannelDistribution.joined([whole, whole.averaged()]).std is None
