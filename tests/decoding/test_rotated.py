from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.rotated import find_rotated, prob_iou, rotated_corners, suppress_rotated

QUARTER = np.pi / 2


def test_boxes_apart_by_their_side_overlap_by_the_closed_form() -> None:
    """Squares of side s, d apart: D = d^2 / (8 s^2 / 12), which is 1.5 for d = s."""
    a, b = np.array([[0.0, 0, 4, 4, 0]]), np.array([[4.0, 0, 4, 4, 0.3]])
    assert prob_iou(a, b)[0] == pytest.approx(1 - np.sqrt(1 - np.exp(-1.5)), abs=1e-6)


def test_crossed_boxes_overlap_by_the_closed_form() -> None:
    """2:1 boxes across each other: variances 4 and 1, their mean 2.5, D = ln(2.5^2 / 4) / 2, so exp(-D) = 0.8."""
    a, b = np.array([[5.0, 5, 8, 4, 0]]), np.array([[5.0, 5, 8, 4, QUARTER]])
    assert prob_iou(a, b)[0] == pytest.approx(1 - np.sqrt(0.2), abs=1e-6)


def test_equal_boxes_overlap_wholly_and_flat_ones_are_no_trouble() -> None:
    box = np.array([[5.0, 5, 8, 4, 1], [5, 5, 0, 0, 0], [5, 5, -3, 2, 0]])
    assert prob_iou(box, box)[0] > 0.999
    assert np.isfinite(prob_iou(box, box)).all()


def test_corners_turn_with_the_angle() -> None:
    """A 4x2 box upright, and turned by a quarter: 2 wide, 4 high."""
    upright, turned = rotated_corners(np.array([[10.0, 20, 4, 2, 0], [10, 20, 4, 2, QUARTER]]))
    assert sorted(map(tuple, upright.round(9))) == [(8, 19), (8, 21), (12, 19), (12, 21)]
    assert sorted(map(tuple, turned.round(9))) == [(9, 18), (9, 22), (11, 18), (11, 22)]


def some_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(0, 100, (count, 2)), rng.uniform(5, 60, (count, 2))
    return np.concatenate([centres, sizes, rng.uniform(-1, 3, (count, 1))], axis=1)


def test_suppression_is_its_definition() -> None:
    """A box is dropped where any higher one of its class overlaps it, dropped or not; more boxes than one block."""
    boxes, classes = some_boxes(700), np.random.default_rng(1).integers(0, 2, 700)
    wanted = []
    for place in range(700):
        higher = np.flatnonzero(classes[:place] == classes[place])
        if not (prob_iou(np.repeat(boxes[place : place + 1], len(higher), axis=0), boxes[higher]) > 0.5).any():
            wanted.append(place)
    assert suppress_rotated(boxes, classes, 0.5, 700).tolist() == wanted
    assert suppress_rotated(boxes, classes, 0.5, 20).tolist() == wanted[:20]
    assert 20 < len(wanted) < 600


def test_pairs_that_are_left_out_overlap_by_less_than_said() -> None:
    a, b = some_boxes(20000), some_boxes(20000, seed=1)
    longer = a[:, 2:4].max(axis=1) ** 2 + b[:, 2:4].max(axis=1) ** 2
    far = ((a[:, :2] - b[:, :2]) ** 2).sum(axis=1) > longer / 4
    assert far.sum() > 5000
    assert prob_iou(a, b)[far].max() < 0.28


def test_detections_have_upright_boxes_around_their_corners() -> None:
    boxes = np.array([[10.0, 20, 4, 2, QUARTER], [50, 50, 4, 2, 0]])
    found = find_rotated(boxes, np.array([[0.4, 0.0], [0.0, 0.8]]), 0.1, 0.7)
    assert found.scores.tolist() == [0.8, 0.4]
    assert found.classes.tolist() == [1, 0]
    assert found.boxes == pytest.approx(np.array([[48, 49, 52, 51], [9, 18, 11, 22]]))
    assert found.corners is not None
    assert found.corners.shape == (2, 4, 2)


def test_nothing_is_found_below_the_score() -> None:
    assert len(find_rotated(some_boxes(5), np.zeros((5, 2)), 0.1, 0.7)) == 0
