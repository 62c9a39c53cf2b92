"""FastestDet, by hand, and what is none of it."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.fastestdet import match
from qconv.decoding.head import NetworkFacts


def one_box() -> np.ndarray:
    """A map of 2x3 cells for 3 classes; cell (1, 2) is sure of class 1, in its own place and half as large as 48x32."""
    found = np.zeros((1, 8, 2, 3))
    found[0, 5:] = 1 / 3
    found[0, :, 1, 2] = [0.9, 0, 0, 0, 0, 0.1, 0.8, 0.1]
    found[0, 1:5, 0, 0] = -3  # no shares
    return found


def test_a_box_by_hand() -> None:
    """Centre (2, 1) * 16 = (32, 16); sigmoid(0) = 1/2 of 48x32; 0.9 * 0.8."""
    head = match(NetworkFacts({"y": one_box()}, (32, 48)))
    assert head is not None
    (found,) = head.read({"y": one_box()}, 0.5)
    assert found.boxes == pytest.approx(np.array([[20, 8, 44, 24]]))
    assert found.scores == pytest.approx([0.72])
    assert found.classes.tolist() == [1]


@pytest.mark.parametrize(
    ("axis", "value"),
    [(0, 1.5), (6, 0.9)],  # no objectness; classes that do not add up
)
def test_other_maps_are_none(axis: int, value: float) -> None:
    other = one_box()
    other[0, axis] = value
    assert match(NetworkFacts({"y": other}, (32, 48))) is None
    assert match(NetworkFacts({"y": one_box()}, (64, 48))) is None


def test_a_softmax_of_a_segmenter_is_none() -> None:
    scores = np.random.default_rng(0).random((1, 21, 22, 22))
    assert match(NetworkFacts({"y": scores / scores.sum(axis=1, keepdims=True)}, (352, 352))) is None
