from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.boxes import Detections
from qconv.decoding.extras import Extras, Statement, masks_of, tell_extras
from qconv.decoding.head import NetworkFacts


def test_a_mask_is_where_the_product_is_positive_inside_the_box() -> None:
    """One prototype of 4x4 over an input of 8x8, positive in its left half; a box over rows 2 to 6."""
    prototypes = np.where(np.arange(4) < 2, 1.0, -1.0) * np.ones((1, 4, 4))
    boxes = np.array([[0.0, 2, 8, 6], [0, 2, 8, 6], [2, 0, 4, 8]])
    masks = masks_of(np.array([[2.0], [-1.0], [1.0]]), prototypes, boxes, (8, 8))
    left, right = [True, True, False, False], [False, False, True, True]
    none = [False] * 4
    assert masks[0].tolist() == [none, left, left, none]
    assert masks[1].tolist() == [none, right, right, none]
    assert masks[2].tolist() == [[False, True, False, False]] * 4


def test_masks_of_a_wide_input_lie_on_its_own_grid() -> None:
    """2x8 prototypes over 16 x 32 pixels, height by width: a cell is 8 by 4."""
    masks = masks_of(np.ones((1, 1)), np.ones((1, 2, 8)), np.array([[4.0, 8, 12, 16]]), (16, 32))
    assert np.argwhere(masks[0]).tolist() == [[1, 1], [1, 2]]


def test_keypoints_without_a_score_are_sure() -> None:
    found = Detections(np.zeros((1, 4)), np.ones(1), np.zeros(1, np.int64))
    points = Extras(keypoints=(2, 2)).attach(found, np.array([[1.0, 2, 3, 4]]), None, (8, 8)).keypoints
    assert points is not None
    assert points.tolist() == [[[1, 2, 1], [3, 4, 1]]]


def test_what_a_file_says_is_read() -> None:
    metadata = {"task": "pose", "names": "{0: 'person'}", "kpt_shape": "[17, 3]", "end2end": "True"}
    assert Statement.of(metadata) == Statement("pose", {0: "person"}, (17, 3), True)


@pytest.mark.parametrize("text", ["", "17", "[17]", "[a, b]", "[None, 3]", "(" * 500, "[17, 3, 1]"])
def test_odd_keypoints_are_none(text: str) -> None:
    assert Statement.of({"kpt_shape": text}).keypoints == (0, 0)


MAP = np.zeros((1, 32, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("task", "width", "found"),
    [
        ("", 0, Extras()),
        ("", 32, Extras("map", 32)),
        ("segment", 32, Extras("map", 32)),
        ("segment", 8, None),
        ("", 1, Extras(angle=True)),
        ("obb", 1, Extras(angle=True)),
        ("detect", 1, None),
        ("", 51, Extras(keypoints=(17, 3))),
        ("pose", 51, Extras(keypoints=(17, 3))),
        ("pose", 50, None),
        ("", 50, None),
        ("", -1, None),
    ],
)
def test_columns_are_told_by_the_file_and_by_their_number(task: str, width: int, found: Extras | None) -> None:
    stated = Statement(task, keypoints=(17, 3) if task else (0, 0))
    assert tell_extras(NetworkFacts({"map": MAP}, (32, 32)), stated, width) == found
