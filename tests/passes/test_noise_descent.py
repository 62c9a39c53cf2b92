"""The oracles are closed forms, brute force on a grid, random search, and differences for slopes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.passes import noise_descent
from qconv.passes.noise_descent import ORDERS, minimize_noise
from qconv.passes.noise_model import ActivationNoise, NoiseTerm, WeightNoise, total_noise
from tests.support.noise_terms import codes, weights


def free(count: int, held: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.full(count, 4.0)
    bounds[list(held)] = 0.0
    return -bounds, bounds


TERMS: dict[str, NoiseTerm] = {
    "codes": codes([4.0, 1.0, 2.0], [1.0, 3.0, 0.5]),
    "signed codes": ActivationNoise(
        np.arange(3), np.float64([-1, -3, 0]), np.float64([2, 0, 1]), np.float64([1, 2, 3]), 15.0
    ),
    "a class twice": ActivationNoise(
        np.array([0, 1, 0]), np.zeros(3), np.float64([4, 1, 3]), np.float64([1, 2, 3]), 15.0
    ),
    "weights": weights([[2.0, 1.0, 0.3], [1.0, 0.1, 3.0]], [1.0, 4.0, 0.5]),
    "one scale": weights([[2.0, 1.0, 0.3], [1.0, 0.1, 3.0]], [1.0, 4.0, 0.5], whole=True, gains=[1.0, 5.0]),
    "groups": WeightNoise(
        np.arange(4), np.arange(4, 8), np.random.default_rng(0).uniform(0.1, 1, (2, 2, 2)), np.ones(4),
        np.arange(1.0, 5.0), 7.0, True,
    ),
}  # fmt: skip


def smoothed(terms: Sequence[NoiseTerm], order: int, u: np.ndarray, near: np.ndarray) -> noise_descent._Point:
    """What is descended, by powers of weights that are kept relative to the scales `near`."""
    return noise_descent._SmoothNoise.of(terms, 0.0, order, near).at(u)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TERMS)
def test_slopes_are_differences(name: str, order: int) -> None:
    """Of the smoothed noise, at float32's accuracy."""
    rng = np.random.default_rng(1)
    near, u = rng.uniform(-0.5, 0.5, 8), rng.uniform(-0.5, 0.5, 8)
    steps = 1e-3 * np.eye(8)
    slope = smoothed([TERMS[name]], order, u, near).slope
    ends = [[smoothed([TERMS[name]], order, u + sign * step, near).log_noise for sign in (1, -1)] for step in steps]
    np.testing.assert_allclose(slope, [(high - low) / 2e-3 for high, low in ends], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", TERMS)
def test_smoothed_noise_lies_above_by_little(name: str, order: int) -> None:
    """A norm of order p of n numbers is at most n^(1/p) times the largest; noise has squares of one or two."""
    u, near = np.random.default_rng(2).uniform(-0.5, 0.5, (2, 8))
    ratio = np.exp(smoothed([TERMS[name]], order, u, near).log_noise) / TERMS[name].noise(u)
    assert 1 - 1e-5 <= ratio <= 4 ** (4 / order)


def test_terms_together_are_their_sum() -> None:
    """However they are laid side by side: networks have layers of many shapes."""
    u, near = np.random.default_rng(3).uniform(-0.5, 0.5, (2, 8))
    alone = [smoothed([term], 16, u, near) for term in TERMS.values()]
    both, noises = smoothed(list(TERMS.values()), 16, u, near), np.exp([point.log_noise for point in alone])
    assert np.exp(both.log_noise) == pytest.approx(noises.sum())
    slope = sum(noise * point.slope for noise, point in zip(noises, alone, strict=True)) / noises.sum()
    np.testing.assert_allclose(both.slope, slope, rtol=1e-5, atol=1e-7)


def test_two_channels_in_closed_form() -> None:
    """Codes alone, ranges 1 and r, gains g and h: with all ranges full, s = ranges, the noise is least.

    max(1/s, r)^2 (g s^2 + h) with r < 1 falls in s up to where both fill the range, 1/s = r, and rises from there. At
    that kink the smoothed maximum is 2^(1/32) too large.
    """
    term = codes([1.0, 0.1], [1.0, 50.0])
    u = minimize_noise([term], *free(2, held=(1,)))
    # s_1 = 10 fills both: noise 0.1^2 (100 + 50); s_1 smaller: (1/s)^2 (s^2 + 50) = 1 + 50 / s^2, larger
    grid = min(term.noise(np.array([one, 0.0])) for one in np.linspace(-4, 4, 8001))
    assert grid == pytest.approx((0.1 / 255) ** 2 / 12 * 150, rel=1e-2)
    assert term.noise(u) == pytest.approx(grid, rel=2e-2)


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.02])
def test_two_channels_by_brute_force(ratio: float) -> None:
    """Codes against the weights that read them: the optimum is between no scaling and ranges that are full."""
    terms = [codes([1.0, ratio], [1.0, 1.0]), weights([[1.0, 0.7], [0.2, 1.0]], [0.1, 0.1 * ratio**2])]
    u = minimize_noise(terms, *free(4, held=(0, 2, 3)))
    grid = [total_noise(terms, np.array([0.0, one, 0.0, 0.0])) for one in np.linspace(-4, 4, 4001)]
    assert total_noise(terms, u) <= min(grid) * 1.02
    assert total_noise(terms, u) <= total_noise(terms, np.zeros(4))


def test_ranges_of_many_sizes_are_evened_out() -> None:
    """Channels as small as they matter: with all ranges full each adds the same."""
    ranges = np.exp(-np.linspace(0, 3.5, 7))
    chain = [
        ActivationNoise(
            np.arange(7) + 7 * step,
            np.zeros(7),
            ranges[:: 1 - 2 * (step % 2)],
            ranges[:: 1 - 2 * (step % 2)] ** -2.0,
            255.0,
        )
        for step in range(3)
    ]
    u = minimize_noise(chain, *free(21, held=(0, 13, 14)))
    assert total_noise(chain, np.zeros(21)) > 1e2 * total_noise(chain, u)
    assert total_noise(chain, u) <= 1.2 * 3 * 7 / (12 * 255**2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), whole=st.booleans())
def test_never_worse_than_no_scaling_and_inside_the_bounds(seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    inputs, outputs = rng.integers(1, 6, 2)
    classes = inputs + outputs
    first = ActivationNoise(
        np.arange(inputs), -rng.uniform(0, 1, inputs), 10 ** rng.normal(size=inputs), rng.uniform(0, 1, inputs), 255.0
    )
    second = WeightNoise(
        np.arange(inputs), np.arange(inputs, classes), 10 ** rng.normal(size=(1, outputs, inputs)),
        10 ** rng.normal(size=inputs), rng.uniform(0, 1, outputs), 127.0, whole,
    )  # fmt: skip
    lowest, highest = -rng.uniform(0, 2, classes), rng.uniform(0, 2, classes)
    held = rng.uniform(size=classes) < 0.3
    lowest[held] = highest[held] = 0.0
    u = minimize_noise([first, second], lowest, highest)
    assert np.all((lowest <= u) & (u <= highest))
    assert total_noise([first, second], u) <= total_noise([first, second], np.zeros(classes))


def test_nothing_to_gain_moves_nothing() -> None:
    """Depthwise weights with a scale a channel lose the same, whatever the scales."""
    term = WeightNoise(np.arange(3), np.arange(3, 6), np.ones((3, 1, 1)), np.ones(3), np.ones(3), 127.0, False)
    assert not minimize_noise([term], *free(6)).any()


def layered(rng: np.random.Generator, widths: Sequence[int], *, whole: bool) -> list[NoiseTerm]:
    """A chain of layers whose channels are of very unequal size, with the tensors between them."""
    starts = np.cumsum([0, *widths])
    classes = [np.arange(first, last) for first, last in pairwise(starts)]
    terms: list[NoiseTerm] = []
    for inputs, outputs in pairwise(classes):
        sizes = np.exp(rng.normal(size=inputs.size))
        lows = -sizes * rng.uniform(0, 1, inputs.size)
        terms.append(ActivationNoise(inputs, lows, sizes, rng.uniform(0.1, 1, inputs.size), 255.0))
        largest = np.exp(rng.normal(size=(1, outputs.size, inputs.size))) / sizes
        gains = rng.uniform(0.1, 1, outputs.size)
        terms.append(WeightNoise(inputs, outputs, largest, sizes**2, gains, 127.0, whole))
    return terms


def search_at_random(
    terms: Sequence[NoiseTerm], u: np.ndarray, bounds: tuple[np.ndarray, np.ndarray], rng: np.random.Generator
) -> float:
    """The least exact noise that an evolution strategy of one parent finds from u: the 1/5 rule sets its steps."""
    least, size = total_noise(terms, u), 0.1
    for _ in range(1500):
        tried = np.clip(u + size * rng.normal(size=u.size) * (rng.uniform(size=u.size) < 0.3), *bounds)
        found = total_noise(terms, tried)
        u, least, size = (tried, found, size * 1.5) if found < least else (u, least, max(size * 0.91, 1e-4))
    return least


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_the_minimum_is_that_of_a_long_search(seed: int, whole: bool) -> None:
    """From no scaling, and from where descent ended. Some classes are fixed, and bounds are near."""
    rng = np.random.default_rng(seed)
    terms = layered(rng, (6, 8, 5, 3), whole=whole)
    lowest, highest = -rng.uniform(0.5, 4, 22), rng.uniform(0.5, 4, 22)
    lowest[[3, 19, 20, 21]] = highest[[3, 19, 20, 21]] = 0.0
    u = minimize_noise(terms, lowest, highest)
    found = total_noise(terms, u)
    assert np.all((lowest <= u) & (u <= highest))
    for start in (np.zeros(22), u):
        assert found <= 1.02 * search_at_random(terms, start, (lowest, highest), rng)


def test_weights_far_apart_keep_their_share() -> None:
    """Powers of float32 end at 1e-38: what they lose where descent starts must not be lost where it ends."""
    term = weights([[1.0, 1e-3], [1.0, 1e-3]], [1e-8, 1.0])
    u = minimize_noise([term], np.float64([-9.0, 0.0, 0.0, 0.0]), np.float64([9.0, 0.0, 0.0, 0.0]))
    grid = [total_noise([term], np.array([one, 0.0, 0.0, 0.0])) for one in np.linspace(-9, 9, 9001)]
    assert total_noise([term], u) <= 1.05 * min(grid)
