"""BlazeFace and its relatives, by their anchors."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.blazeface import match
from qconv.decoding.head import NetworkFacts


@pytest.mark.parametrize(
    ("size", "boxes", "width", "points"),
    [(128, 896, 16, 6), (256, 896, 16, 6), (192, 2304, 16, 6), (192, 2016, 18, 7), (224, 2254, 12, 4)],
    ids=["short range", "back camera", "full range", "palms", "poses"],
)
def test_mediapipes_detectors_are_known(size: int, boxes: int, width: int, points: int) -> None:
    """Sizes of outputs as the networks in mediapipe 0.10.9 have them."""
    outputs = {"scores": np.full((1, boxes, 1), -9.0), "boxes": np.zeros((1, boxes, width))}
    outputs["scores"][0, -1], outputs["boxes"][0, -1, 2:4] = 2, 10
    head = match(NetworkFacts(outputs, (size, size)))
    assert head is not None
    assert head.outputs == ("boxes", "scores")
    (found,) = head.read(outputs, 0.5)
    assert len(found) == 1
    assert found.keypoints is not None
    assert found.keypoints.shape == (1, points, 3)


def test_boxes_that_overlap_become_their_weighted_mean() -> None:
    """Two boxes of the first cell, whose middle is (4, 4): 10 and 12 wide, scores 0.75 and 0.25."""
    outputs = {"boxes": np.zeros((1, 896, 16)), "scores": np.full((1, 896, 1), -20.0)}
    outputs["boxes"][0, :2, 2:4] = [[10, 10], [12, 10]]
    outputs["scores"][0, :2, 0] = [np.log(3), -np.log(3)]
    head = match(NetworkFacts(outputs, (128, 128)))
    assert head is not None
    (found,) = head.read(outputs, 0.2)
    assert found.boxes == pytest.approx(np.array([[4 - 5.25, -1, 4 + 5.25, 9]]))
    assert found.scores == pytest.approx([0.75])


def test_other_numbers_of_boxes_are_none() -> None:
    outputs = {"boxes": np.zeros((1, 895, 16)), "scores": np.zeros((1, 895, 1))}
    assert match(NetworkFacts(outputs, (128, 128))) is None
