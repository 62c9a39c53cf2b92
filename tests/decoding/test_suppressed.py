"""Boxes that the network has suppressed itself, in the forms that programs write, by examples worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qconv.decoding.head import NetworkFacts
from qconv.decoding.suppressed import match

SIZE = (100, 200)
"""Height and width."""

SHARES = np.array([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
"""A box, another one, and room for a third."""

SCORES = np.array([[0.9, 0.4, 0.0]])

CLASSES = np.array([[2.0, 17.0, 0.0]])

TOP_FIRST = [[40, 10, 120, 50], [0, 0, 200, 100]]

LEFT_FIRST = [[20, 20, 100, 60], [0, 0, 200, 100]]

PIXELS = np.array([[[20.0, 20, 100, 60], [0, 0, 200, 100], [0, 0, 0, 0]]])


def tflite() -> dict[str, Any]:
    """In the order of TFLite_Detection_PostProcess: boxes, classes, scores, how many."""
    name = "TFLite_Detection_PostProcess"
    return {name: SHARES, f"{name}:1": CLASSES, f"{name}:2": SCORES, f"{name}:3": np.array([2.0])}


def tensorflow() -> dict[str, Any]:
    """As saved models of the Object Detection API, with what else they give."""
    found = {"detection_boxes:0": SHARES, "detection_classes:0": CLASSES, "detection_scores:0": SCORES}
    beyond = {"num_detections:0": np.array([2.0]), "raw_detection_boxes:0": np.zeros((1, 1917, 4))}
    return {"detection_anchor_indices:0": np.zeros((1, 3)), **found, **beyond}


def efficient_nms() -> dict[str, Any]:
    counted = {"num_dets": np.array([[2]], np.int32), "det_boxes": PIXELS, "det_scores": SCORES}
    return {**counted, "det_classes": CLASSES.astype(np.int32)}


def torchvision() -> dict[str, Any]:
    boxes = {"boxes": PIXELS[0, :2], "labels": CLASSES[0, :2].astype(np.int64), "scores": SCORES[0, :2]}
    return {**boxes, "masks": np.zeros((2, 1, 28, 28))}


def mlperf() -> dict[str, Any]:
    """Without a number of boxes, as shares, left first (ssd-10.onnx and later)."""
    return {"bboxes": SHARES, "labels": CLASSES.astype(np.int64), "scores": SCORES}


def mmdeploy() -> dict[str, Any]:
    return {"dets": np.concatenate([PIXELS, SCORES[..., None]], axis=2), "labels": CLASSES.astype(np.int64)}


@pytest.mark.parametrize(
    ("outputs", "boxes"),
    [
        (tflite(), TOP_FIRST),
        (tensorflow(), TOP_FIRST),
        (efficient_nms(), LEFT_FIRST),
        (torchvision(), LEFT_FIRST),
        (mlperf(), LEFT_FIRST),
        (mmdeploy(), LEFT_FIRST),
    ],
    ids=["tflite", "tensorflow", "efficient_nms", "torchvision", "mlperf", "mmdeploy"],
)
def test_boxes_scores_and_classes_are_read(outputs: dict[str, Any], boxes: list[list[float]]) -> None:
    head = match(NetworkFacts(outputs, SIZE))
    assert head is not None
    (found,) = head.read(outputs, 0.1)
    assert found.boxes == pytest.approx(np.array(boxes))
    assert found.scores == pytest.approx([0.9, 0.4])
    assert found.classes.tolist() == [2, 17]


def test_the_number_of_boxes_counts() -> None:
    outputs = {**tflite(), "TFLite_Detection_PostProcess:3": np.array([1.0])}
    head = match(NetworkFacts(outputs, SIZE))
    assert head is not None
    assert len(head.read(outputs, 0.1)[0]) == 1


def test_any_number_of_boxes_of_one_image_is_read_later() -> None:
    head = match(NetworkFacts(torchvision(), SIZE))
    assert head is not None
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}
    assert len(head.read(nothing, 0.1)[0]) == 0


def test_a_batch_is_read_image_by_image() -> None:
    outputs = {name: np.concatenate([array, 0 * array]) for name, array in efficient_nms().items()}
    head = match(NetworkFacts(outputs, SIZE))
    assert head is not None
    assert [len(found) for found in head.read(outputs, 0.1)] == [2, 0]


def test_nothing_is_made_of_numbers_that_are_none() -> None:
    outputs = tflite()
    head = match(NetworkFacts(outputs, SIZE))
    assert head is not None
    broken = {name: np.full_like(array, np.nan) for name, array in outputs.items()}
    assert len(head.read(broken, 0.1)[0]) == 0


@pytest.mark.parametrize(
    "outputs",
    [
        {**mlperf(), "scores": SCORES * 3},
        {**mlperf(), "labels": SCORES},
        {**mlperf(), "bboxes": -SHARES},
        {**torchvision(), "boxes": -PIXELS[0, :2]},
        {**torchvision(), "boxes": 2 * PIXELS[0, :2]},
    ],
    ids=["scores", "classes", "edges in another order", "edges in another order, of one image", "boxes outside"],
)
def test_other_outputs_are_none(outputs: dict[str, Any]) -> None:
    assert match(NetworkFacts(outputs, SIZE)) is None
