"""Networks in the form of UltraFace, and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.head import NetworkFacts
from qconv.decoding.ultraface import match


def two_boxes() -> dict[str, np.ndarray]:
    """Of an SSD with two classes in an image of 100x200."""
    return {
        "scores": np.array([[[0.1, 0.7, 0.2], [0.9, 0.05, 0.05]]]),
        "boxes": np.array([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]]]),
    }


def test_other_networks_of_this_form_are_read_too() -> None:
    outputs = two_boxes()
    head = match(NetworkFacts(outputs, (100, 200)))
    assert head is not None
    assert head.family == "SSD"
    (found,) = head.read(outputs, 0.5)
    assert found.boxes == pytest.approx(np.array([[20, 20, 100, 60]]))
    assert found.classes.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("scores", (0, 0, 0), 0.6), ("boxes", (0, 0, 0), 0.7), ("boxes", (0, 1, 3), 60.0)],
    ids=["scores that do not add up", "a left edge beyond the right", "pixels"],
)
def test_other_numbers_are_none(name: str, place: tuple[int, ...], value: float) -> None:
    outputs = two_boxes()
    outputs[name][place] = value
    assert match(NetworkFacts(outputs, (100, 200))) is None
