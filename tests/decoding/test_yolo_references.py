"""Which decoder knows which outputs, and that it finds what the program of its family finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.decoding.head import NetworkFacts
from qconv.decoding.registry import find_head
from tests.support.references import FOLDER, Reference, largest_difference

REFERENCES = sorted(FOLDER.glob("*.npz"))

TOLD_BY_FILE_ALONE = {"yolo11n-pose2"}
"""Four keypoints of two numbers: nothing but the file says so."""

TOLD_BY_NUMBERS = [path for path in REFERENCES if path.stem not in TOLD_BY_FILE_ALONE]


def test_there_are_references() -> None:
    assert len(REFERENCES) >= 20


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_what_is_found_is_what_the_program_of_the_family_finds(path: Path) -> None:
    reference = Reference.load(path)
    head = find_head(reference.facts)
    assert head is not None
    assert head.family == reference.family
    assert sum(len(found["scores"]) for found in reference.published) >= 10
    for found, published in zip(head.read(reference.outputs, reference.least), reference.published, strict=True):
        apart = largest_difference(found, published)
        assert apart.pop("scores") < 1e-5
        assert apart.pop("masks", 0.0) == 0
        assert all(pixels < 1e-3 for pixels in apart.values()), apart


@pytest.mark.parametrize(
    "path", [p for p in REFERENCES if p.stem not in TOLD_BY_FILE_ALONE], ids=lambda path: path.stem
)
def test_shapes_and_numbers_tell_where_the_file_does_not(path: Path) -> None:
    reference = Reference.load(path)
    head = find_head(reference.facts)
    without = find_head(reference.without_metadata().facts)
    assert head is not None
    assert without is not None
    assert (without.family, without.outputs, without.parts) == (head.family, head.outputs, head.parts)
    assert without.names == {}


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_parts_cover_all_rows_of_an_output_once(path: Path) -> None:
    reference = Reference.load(path)
    head = find_head(reference.facts)
    assert head is not None
    for name, parts in head.parts.items():
        array = reference.outputs[name]
        seen = np.zeros(array.shape, int)
        for part in parts:
            part.of(seen)[...] += 1
        assert (seen == 1).all(), [part.name for part in parts]


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_nothing_is_found_in_outputs_without_finite_numbers(path: Path) -> None:
    reference = Reference.load(path)
    head = find_head(reference.facts)
    assert head is not None
    broken = {name: np.full_like(array, np.nan) for name, array in reference.outputs.items()}
    assert [len(found) for found in head.read(broken, reference.least)] == [0] * len(reference.published)


RNG = np.random.default_rng(0)


def of_features(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def of_activations(*shape: int) -> Any:
    return np.maximum(of_features(*shape), 0)


def of_shares(*shape: int) -> Any:
    return RNG.random(shape).astype(np.float32)


def of_pixels(*shape: int) -> Any:
    return (320 * RNG.random(shape)).astype(np.float32)


def of_probabilities(*shape: int) -> Any:
    shares = np.exp(3 * of_features(*shape))
    return shares / shares.sum(axis=-1, keepdims=True)


CELLS = 2100
"""Of strides 8, 16 and 32 at 320x320."""

NO_DETECTIONS = {
    "classes": [of_probabilities(2, 1000)],
    "classes as a map": [of_features(2, 1000, 1, 1)],
    "embedding": [of_features(2, 512)],
    "one number": [of_features(2, 1)],
    "points of a face": [of_pixels(2, 136)],
    "segments": [of_features(2, 21, 320, 320)],
    "segments, small": [of_features(2, 21, 40, 40)],
    "class ids": [RNG.integers(0, 21, (2, 320, 320))],
    "picture": [of_shares(2, 3, 320, 320)],
    "depth": [of_shares(2, 1, 320, 320)],
    "heat maps": [of_shares(2, 17, 80, 80)],
    "features of three strides": [of_activations(2, 96, 320 // s, 320 // s) for s in (8, 16, 32)],
    "features of three strides, before activations": [of_features(2, 24, 320 // s, 320 // s) for s in (8, 16, 32)],
    "tokens": [of_features(2, 197, 768)],
    "as many tokens as cells": [of_features(2, CELLS, 85)],
    "as many places as cells": [of_features(2, 84, CELLS)],
    "activations at as many places as cells": [of_activations(2, 84, CELLS)],
    "characters": [of_probabilities(2, 40, 97)],
    "characters, 300 of them": [of_probabilities(2, 300, 97)],
    "six features of 300 tokens": [of_features(2, 300, 6)],
    "six shares of 300 tokens": [of_shares(2, 300, 6)],
    "six pixels of 300 points": [of_pixels(2, 300, 6)],
    "4 numbers": [of_shares(2, 4)],
    "boxes without scores": [of_pixels(2, 300, 4)],
    "shares of two kinds": [of_shares(2, 100, 10), of_shares(2, 100, 4)],
    "two classifiers": [of_features(2, 10), of_features(2, 4)],
    "words": [np.array([["a"], ["b"]])],
    "none": [],
}


@pytest.mark.parametrize("arrays", NO_DETECTIONS.values(), ids=NO_DETECTIONS)
def test_other_outputs_are_no_detections(arrays: list[Any]) -> None:
    outputs = {f"output{index}": array for index, array in enumerate(arrays)}
    assert find_head(NetworkFacts(outputs, (320, 320))) is None


def test_a_classifier_of_ultralytics_is_none() -> None:
    metadata = {"task": "classify", "names": "{0: 'a', 1: 'b'}", "stride": "1", "end2end": "False"}
    assert find_head(NetworkFacts({"output0": of_probabilities(2, 2)}, (320, 320), metadata)) is None


@pytest.mark.parametrize("anchors", [1, 3])
def test_one_row_a_cell_is_yolox_and_three_are_yolov5(anchors: int) -> None:
    """(N, A, 5 + C): 2100 cells at 320x320."""
    rows = of_shares(1, anchors * CELLS, 85)
    rows[..., :4] *= 320
    head = find_head(NetworkFacts({"output": rows}, (320, 320)))
    assert head is not None
    assert head.family == ("YOLOX" if anchors == 1 else "YOLOv5/v7")


@pytest.mark.parametrize(("width", "family"), [(84, "YOLOv8"), (85, "YOLOX"), (7, "YOLOX")])
def test_rows_of_four_and_eighty_numbers_have_no_objectness(width: int, family: str) -> None:
    rows = of_shares(1, CELLS, width)
    rows[..., :4] *= 320
    head = find_head(NetworkFacts({"output": rows}, (320, 320)))
    assert head is not None
    assert head.family == family
