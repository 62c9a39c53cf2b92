"""The oracles are closed forms, brute force on a grid, and differences for slopes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.passes.noise_model import ActivationNoise, NoiseTerm, WeightNoise, minimize_noise, total_noise


def codes(ranges: list[float], gains: list[float]) -> ActivationNoise:
    classes = np.arange(len(ranges))
    return ActivationNoise(classes, np.zeros(len(ranges)), np.float64(ranges), np.float64(gains), 255.0)


def weights(
    largest: list[list[float]], powers: list[float], *, whole: bool = False, gains: list[float] | None = None
) -> WeightNoise:
    """A layer from classes 0 .. I-1 to classes I .. I+O-1."""
    matrix = np.float64([largest])
    outputs, inputs = matrix.shape[1:]
    return WeightNoise.of(
        np.arange(inputs), np.arange(inputs, inputs + outputs), matrix, np.float64(powers),
        np.float64(gains or [1.0] * outputs), levels=127.0, whole=whole,
    )  # fmt: skip


def free(count: int, held: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    bounds = np.full(count, 4.0)
    bounds[list(held)] = 0.0
    return -bounds, bounds


def test_codes_cost_by_hand() -> None:
    """Ranges 4 and 1, divided by 2 and 1: a step of 2 / 255 in codes, errors 2 and 1 times as large."""
    term = codes([4.0, 1.0], [1.0, 3.0])
    step = 2 / 255
    assert term.noise(np.log([2.0, 1.0])) == pytest.approx(step**2 / 12 * (1 * 4 + 3 * 1))


def test_weights_cost_by_hand() -> None:
    """Rows |2 1| and |1 1| times inputs of power 1 and 4, with s = (1/2, 2) : largest 2 and 2, powers 4 and 1."""
    term = weights([[2.0, 1.0], [1.0, 1.0]], [1.0, 4.0])
    u = np.array([*np.log([0.5, 2.0]), 0.0, 0.0])
    assert term.noise(u) == pytest.approx(((2 / 127) ** 2 + (2 / 127) ** 2) / 12 * (4 + 1))


def test_one_scale_for_all_weights_by_hand() -> None:
    """The same, one scale; outputs divided by 1 and 4: largest 2, errors of the second output 4 times as large."""
    term = weights([[2.0, 1.0], [1.0, 1.0]], [1.0, 4.0], whole=True)
    u = np.array([*np.log([0.5, 2.0]), *np.log([1.0, 4.0])])
    assert term.noise(u) == pytest.approx((2 / 127) ** 2 / 12 * (1 + 16) * (4 + 1))


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
    "groups": WeightNoise.of(
        np.arange(4), np.arange(4, 8), np.random.default_rng(0).uniform(0.1, 1, (2, 2, 2)), np.ones(4),
        np.arange(1.0, 5.0), levels=7.0, whole=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_slopes_are_differences(name: str) -> None:
    """Far from ties the smoothed maxima are the maxima, and so are their slopes."""
    term, u = TERMS[name], np.random.default_rng(1).uniform(-0.05, 0.05, 8)
    slope = np.zeros(8)
    term.slope(u, slope)
    steps = 1e-6 * np.eye(8)
    expected = [(term.noise(u + step) - term.noise(u - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(slope, expected, rtol=2e-2, atol=2e-3 * np.abs(expected).max())


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
    second = WeightNoise.of(
        np.arange(inputs), np.arange(inputs, classes), 10 ** rng.normal(size=(1, outputs, inputs)),
        10 ** rng.normal(size=inputs), rng.uniform(0, 1, outputs), levels=127.0, whole=whole,
    )  # fmt: skip
    lowest, highest = -rng.uniform(0, 2, classes), rng.uniform(0, 2, classes)
    held = rng.uniform(size=classes) < 0.3
    lowest[held] = highest[held] = 0.0
    u = minimize_noise([first, second], lowest, highest, steps=60)
    assert np.all((lowest <= u) & (u <= highest))
    assert total_noise([first, second], u) <= total_noise([first, second], np.zeros(classes))


def test_nothing_to_gain_moves_nothing() -> None:
    """Depthwise weights with a scale a channel lose the same, whatever the scales."""
    term = WeightNoise.of(
        np.arange(3), np.arange(3, 6), np.ones((3, 1, 1)), np.ones(3), np.ones(3), levels=127.0, whole=False
    )
    assert not minimize_noise([term], *free(6)).any()
