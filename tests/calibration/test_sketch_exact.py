"""Sums in any order. Oracle: Python's fractions, which are exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.calibration.sketch import MOST_ADDED_AT_ONCE, ExactSum

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def added(*rows: list[float]) -> ExactSum:
    total = ExactSum.zeros(len(rows[0]))
    total.add(np.array(rows, np.float32))
    return total


@given(st.lists(finite, min_size=1, max_size=40))
def test_sums_are_exact(numbers: list[float]) -> None:
    """To the last bit but the one that float64 itself rounds."""
    exact = sum(map(Fraction, numbers), Fraction(0))
    found = float(added(*([n] for n in numbers)).values[0])
    assert found == pytest.approx(float(exact), rel=1e-15, abs=0)


@given(st.lists(finite, min_size=2, max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_and_parts_do_not_matter(numbers: list[float], random: object) -> None:
    whole = added(*([n] for n in numbers))
    mixed = list(numbers)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    parts = added(*([n] for n in mixed[:1])).merge(added(*([n] for n in mixed[1:])))
    assert parts.limbs.tolist() == whole.limbs.tolist()


def test_what_floating_point_loses() -> None:
    """1e30 + 1 - 1e30 is 1, not 0; and denormals count."""
    tiny = float(np.float32(1e-45))
    assert added([1e30], [1.0], [-float(np.float32(1e30))]).values[0] == 1.0
    assert added([tiny], [tiny]).values[0] == 2 * tiny
    assert added([-tiny]).values[0] == -tiny


def test_series_are_kept_apart_and_can_be_joined() -> None:
    total = added([1.0, -2.5], [3.0, 4.0])
    assert total.values.tolist() == [4.0, 1.5]
    assert total.overall().values.tolist() == [5.5]


def test_many_large_numbers_do_not_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    count = 3 * MOST_ADDED_AT_ONCE + 1
    assert added(*[[largest]] * count).values[0] == count * largest


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        added([bad])
