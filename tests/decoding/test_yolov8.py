from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qconv.decoding import yolov8
from qconv.decoding.head import Head
from tests.support.decoder_references import DecoderReference, largest_difference

NAMES = ["yolo11n", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb"]


def match(reference: DecoderReference) -> Head:
    head = yolov8.match(reference.facts)
    assert head is not None
    return head


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_no_channels_are_read_too(name: str) -> None:
    reference = DecoderReference.load(name)
    turned = reference.outputs | {"output0": reference.outputs["output0"].transpose(0, 2, 1)}
    head = match(replace(reference, outputs=turned))
    for found, published in zip(head.read(turned, reference.least), reference.published, strict=True):
        apart = largest_difference(found, published)
        assert max(apart.values()) < 1e-3
    assert {part.axis for part in head.parts["output0"]} == {2}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("yolo11n", {"boxes": 4, "scores": 3}),
        ("yolo11n-seg", {"boxes": 4, "scores": 3, "mask coefficients": 8}),
        ("yolo11n-obb", {"boxes": 4, "scores": 3, "angle": 1}),
        ("yolo11n-pose", {"boxes": 4, "scores": 1, "keypoints x": 5, "keypoints y": 5, "keypoint scores": 5}),
        ("yolo11n-pose2", {"boxes": 4, "scores": 1, "keypoints x": 4, "keypoints y": 4}),
    ],
)
def test_parts_are_what_columns_mean(name: str, parts: dict[str, int]) -> None:
    reference = DecoderReference.load(name)
    array = reference.outputs["output0"]
    found = {part.name: part.of(array).shape[1] for part in match(reference).parts["output0"]}
    assert found == parts


def test_each_third_number_of_keypoints_is_their_score() -> None:
    reference = DecoderReference.load("yolo11n-pose")
    parts = {part.name: part.of(reference.outputs["output0"]) for part in match(reference).parts["output0"]}
    assert parts["keypoint scores"].max() <= 1
    assert parts["keypoints x"].max() > 1


def test_classes_have_the_names_of_the_file() -> None:
    assert match(DecoderReference.load("yolo11n")).names == {0: "class 0", 1: "class 1", 2: "class 2"}


def test_columns_that_the_file_does_not_explain_are_not_read() -> None:
    reference = DecoderReference.load("yolo11n")
    metadata = reference.metadata | {"names": "{0: 'a', 1: 'b'}"}
    assert yolov8.match(replace(reference, metadata=metadata).facts) is None


def test_rows_of_an_input_of_another_size_are_not_known() -> None:
    reference = DecoderReference.load("yolo11n")
    assert yolov8.match(replace(reference, size=(96, 96)).facts) is None


def test_scores_are_shares() -> None:
    reference = DecoderReference.load("yolo11n")
    array = np.array(reference.outputs["output0"])
    array[:, 4:] -= 0.5
    assert yolov8.match(replace(reference, outputs={"output0": array}).facts) is None
