"""The oracle is a computation by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.passes.noise_model import WeightNoise, total_noise
from tests.support.noise_terms import codes, weights


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


def test_noise_adds_up() -> None:
    terms = [codes([4.0, 1.0], [1.0, 3.0]), weights([[2.0, 1.0], [1.0, 1.0]], [1.0, 4.0])]
    u = np.array([0.1, -0.2, 0.0, 0.0])
    assert total_noise(terms, u) == pytest.approx(sum(term.noise(u) for term in terms))


def test_some_outputs_stand_for_all_by_hand() -> None:
    """Of two groups of four outputs the first and the third each, counted twice."""
    largest = np.arange(1.0, 17.0).reshape(2, 4, 2)
    term = WeightNoise(np.arange(4), np.arange(4, 12), largest, np.ones(4), np.arange(1.0, 9.0), 127.0, False)
    few = term.thinned(2)
    assert few.outputs.tolist() == [4, 6, 8, 10]
    assert few.gains.tolist() == [2, 6, 10, 14]
    rows, powers = np.array([2.0, 6.0, 10.0, 14.0]), 2.0
    assert few.noise(np.zeros(12)) == pytest.approx((few.gains * rows**2 * powers).sum() / (12 * 127**2))
