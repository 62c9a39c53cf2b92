"""The oracles: Pareto's distribution itself, and what the words say of channels that sleep."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.calibration.observer import UNSEEN_FACTOR, extrapolate_tail


def test_a_tail_by_hand() -> None:
    """Of 24 pictures the eight largest count, 4 and seven times 2: xi = (log 2 + 6 log 1) / 7."""
    channel = np.array([4.0] + [2.0] * 7 + [1.0] * 16)
    far = np.array([30.0] + [20.0] * 23)
    assert extrapolate_tail(np.stack([channel, far], axis=1))[0] == pytest.approx(4 * UNSEEN_FACTOR ** (np.log(2) / 7))


def test_a_pareto_tail_is_found() -> None:
    """The largest of ten times as many numbers is 10^xi times as large, on average over channels."""
    rng = np.random.default_rng(0)
    xi = 0.4
    seen = rng.uniform(size=(400, 300)) ** -xi
    seen[0, 0] = 1e4  # no bound in reach
    ratio = extrapolate_tail(seen)[1:] / seen.max(axis=0)[1:]
    assert np.log(ratio.mean()) == pytest.approx(xi * np.log(UNSEEN_FACTOR), rel=0.1)


def test_channels_that_seldom_wake_may_go_as_far_as_any() -> None:
    awake = np.linspace(5.0, 6.0, 40)
    once = np.zeros(40)
    once[7] = 0.1
    never = np.zeros(40)
    assert extrapolate_tail(np.stack([awake, once, never], axis=1)).tolist() == [6.0, 6.0, 6.0]


def test_few_pictures_tell_nothing_of_tails() -> None:
    assert extrapolate_tail(np.float64([[1.0, 3.0], [2.0, 4.0]])).tolist() == [4.0, 4.0]


def test_what_is_never_positive_reaches_nowhere() -> None:
    assert extrapolate_tail(-np.ones((40, 2))).tolist() == [0.0, 0.0]


def test_of_too_few_pictures_the_tail_is_taken_for_the_heaviest() -> None:
    """Ten times what was seen, but no further than the largest channel, and as far where nothing was seen."""
    extremes = np.array([[1.0, 50.0, 1000.0, 0.0], [2.0, 200.0, 900.0, 0.0]])
    assert extrapolate_tail(extremes).tolist() == [20.0, 1000.0, 1000.0, 1000.0]
