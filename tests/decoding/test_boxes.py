from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.boxes import (
    MOST_CANDIDATES,
    Detections,
    find_boxes,
    find_strides,
    pairwise_iou,
    pick_candidates,
    suppress_overlaps,
)


def plain_suppression(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, iou: float) -> list[int]:
    """The definition: from the highest score on, a box is kept if no kept one of its class overlaps it by more."""
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        alike = [other for other in kept if classes[other] == classes[place]]
        if not (pairwise_iou(boxes[place : place + 1], boxes[alike]) > iou).any():
            kept.append(int(place))
    return kept


def some_boxes(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (count, 2))], axis=1)
    return boxes, rng.random(count), rng.integers(0, classes, count)


@pytest.mark.parametrize("iou", [0.1, 0.45, 0.65])
@pytest.mark.parametrize("classes", [1, 5])
def test_suppression_is_its_definition(classes: int, iou: float) -> None:
    boxes, scores, numbers = some_boxes(300, classes)
    wanted = plain_suppression(boxes, scores, numbers, iou)
    assert suppress_overlaps(boxes, scores, numbers, iou).tolist() == wanted
    assert 10 < len(wanted) < 300


def test_the_first_few_are_those_of_all() -> None:
    boxes, scores, classes = some_boxes(300, 5)
    every = suppress_overlaps(boxes, scores, classes, 0.5)
    assert suppress_overlaps(boxes, scores, classes, 0.5, 7).tolist() == every[:7].tolist()


def test_an_overlap_of_just_the_limit_is_kept() -> None:
    """Half of either: 50 / 100."""
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores, classes = np.array([0.9, 0.8]), np.zeros(2, np.int64)
    assert suppress_overlaps(boxes, scores, classes, 0.5).tolist() == [0, 1]
    assert suppress_overlaps(boxes, scores, classes, 0.49).tolist() == [0]


def test_nothing_and_boxes_without_an_area_suppress_nothing() -> None:
    nothing = np.zeros((0, 4))
    assert suppress_overlaps(nothing, np.zeros(0), np.zeros(0, np.int64), 0.5).size == 0
    flat = np.zeros((3, 4))
    assert len(suppress_overlaps(flat, np.ones(3), np.zeros(3, np.int64), 0.5)) == 3


def test_equal_scores_keep_their_order() -> None:
    boxes = np.array([[0.0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]])
    assert suppress_overlaps(boxes, np.ones(3), np.array([2, 0, 1]), 0.5).tolist() == [0, 1, 2]


def test_a_row_counts_for_each_class_that_it_reaches() -> None:
    boxes = np.array([[0.0, 0, 1, 1], [2, 2, 3, 3]])
    scores = np.array([[0.3, 0.6], [0.1, 0.2]])
    rows, found = pick_candidates(boxes, scores, 0.15)
    assert rows.tolist() == [0, 0, 1]
    assert found.classes.tolist() == [1, 0, 1]
    assert found.scores.tolist() == [0.6, 0.3, 0.2]
    rows, found = pick_candidates(boxes, scores, 0.15, one_class=True)
    assert (rows.tolist(), found.classes.tolist()) == ([0, 1], [1, 1])


def test_no_more_than_the_highest_candidates_are_picked() -> None:
    scores = np.random.default_rng(0).random((5000, 10)).astype(np.float32)
    rows, found = pick_candidates(np.zeros((5000, 4)), scores, 0.01)
    assert len(rows) == len(found) == MOST_CANDIDATES
    assert found.scores.tolist() == np.sort(scores.reshape(-1).astype(np.float64))[::-1][:MOST_CANDIDATES].tolist()


def test_boxes_that_are_not_finite_are_left_out() -> None:
    boxes = np.array([[0, 0, np.inf, 1], [0, 0, 1, 1.0]])
    rows, found = find_boxes(boxes, np.array([[0.9], [0.8]]), 0.1)
    assert rows.tolist() == [1]
    assert found.boxes.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("size", "rows", "anchors", "strides"),
    [
        ((640, 640), 8400, 1, (8, 16, 32)),
        ((640, 640), 25200, 3, (8, 16, 32)),
        ((416, 416), 3549, 1, (8, 16, 32)),
        ((1280, 1280), 34000, 1, (8, 16, 32, 64)),
        ((640, 640), 34000, 1, (4, 8, 16, 32)),
        ((640, 640), 8401, 1, None),
    ],
)
def test_rows_tell_the_strides(size: tuple[int, int], rows: int, anchors: int, strides: tuple[int, ...] | None) -> None:
    """80^2 + 40^2 + 20^2 = 8400, of YOLOv8 at 640; 52^2 + 26^2 + 13^2 = 3549."""
    assert find_strides(size, rows, anchors) == strides


def test_selection_takes_every_part_along() -> None:
    found = Detections.of(np.zeros((2, 4)), [0.1, 0.9], [3, 4], keypoints=np.arange(12.0).reshape(2, 2, 3))
    assert found.select(slice(0, 1)).keypoints.tolist() == [[[6, 7, 8], [9, 10, 11]]]
