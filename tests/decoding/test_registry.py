"""Networks that are no detectors are not taken for some, whatever the size of their input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qconv.decoding.boxes import sigmoid, softmax
from qconv.decoding.head import NetworkFacts
from qconv.decoding.registry import find_head

SIZES = ((640, 640), (512, 512), (352, 352), (320, 320), (300, 300), (240, 320), (192, 192), (128, 128), (800, 608))

CELLS = 2100
"""Of strides 8, 16 and 32 at 320x320."""


def logits(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(0, 3, shape).astype(np.float32)


def activations(*shape: int) -> Any:
    return np.maximum(logits(*shape), 0)


def shares(*shape: int) -> Any:
    return sigmoid(logits(*shape)).astype(np.float32)


def pixels(*shape: int) -> Any:
    return (320 * np.random.default_rng(sum(shape)).random(shape)).astype(np.float32)


def softly(*shape: int, axis: int = 1) -> Any:
    return softmax(logits(*shape), axis)


def whole(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(0, 20, shape)


OTHERS: dict[str, tuple[Any, ...]] = {
    "classifier": (logits(1, 1000),),
    "classifier of a batch": (softly(4, 1000),),
    "classes as a map": (logits(2, 1000, 1, 1),),
    "one logit": (logits(1, 1),),
    "one number of a batch": (logits(2, 1),),
    "four shares": (shares(2, 4),),
    "binary": (shares(1, 1),),
    "several classifiers": (logits(1, 10), softly(1, 2), logits(1, 100)),
    "two classifiers, one with four classes": (logits(2, 10), logits(2, 4)),
    "class and its score": (whole(1), shares(1)),
    "class, score and four numbers": (whole(1), shares(1), logits(1, 4)),
    "classifier with features": (logits(1, 1000), logits(1, 2048)),
    "embedding": (logits(1, 512),),
    "depth": (shares(2, 1, 320, 320),),
    "depth and pose": (shares(1, 1, 64, 64), logits(1, 6)),
    "keypoints": (logits(1, 17, 3),),
    "points of a face": (pixels(2, 136),),
    "hand": (logits(1, 63), shares(1, 1), shares(1, 1), logits(1, 63)),
    "mesh of a face": (logits(1, 1, 1, 1404), logits(1, 1, 1, 1)),
    "heat maps of keypoints": (shares(1, 17, 64, 48),),
    "poses by fields": (logits(1, 38, 46, 46), logits(1, 19, 46, 46)),
    "segmenter": (logits(1, 21, 65, 65),),
    "segmenter of full size": (logits(2, 21, 320, 320),),
    "segmenter behind a softmax": (softly(1, 85, 20, 20),),
    "segmenter, channels last": (logits(1, 64, 64, 19),),
    "class map": (whole(1, 64, 64),),
    "class map of full size": (whole(2, 320, 320),),
    "mask": (shares(1, 1, 160, 160),),
    "picture": (shares(1, 3, 128, 128),),
    "picture of full size": (shares(2, 3, 320, 320),),
    "panoptic": (logits(1, 19, 160, 160), shares(1, 1, 160, 160), logits(1, 2, 160, 160)),
    "flow at three sizes": (logits(1, 2, 160, 160), logits(1, 2, 80, 80), logits(1, 2, 40, 40)),
    "features at three sizes": (logits(1, 256, 80, 80), logits(1, 256, 40, 40), logits(1, 256, 20, 20)),
    "features of three strides": tuple(activations(2, 96, 320 // s, 320 // s) for s in (8, 16, 32)),
    "features before activations": tuple(logits(2, 24, 320 // s, 320 // s) for s in (8, 16, 32)),
    "points and descriptors": (logits(1, 65, 80, 80), logits(1, 256, 80, 80)),
    "tokens": (logits(1, 197, 768),),
    "tokens and their mean": (logits(1, 8400, 85), logits(1, 85)),
    "as many tokens as cells": (logits(2, CELLS, 85),),
    "as many places as cells": (logits(2, 84, CELLS),),
    "activations at as many places as cells": (activations(2, 84, CELLS),),
    "six features of 300 tokens": (logits(2, 300, 6),),
    "six shares of 300 tokens": (shares(2, 300, 6),),
    "six pixels of 300 points": (pixels(2, 300, 6),),
    "boxes without scores": (pixels(2, 300, 4),),
    "shares of two kinds": (shares(2, 100, 10), shares(2, 100, 4)),
    "text": (softly(1, 40, 6625, axis=2),),
    "text of 300 characters": (softly(2, 300, 97, axis=2),),
    "text of several lines": (logits(1, 26, 37), logits(1, 26, 37), logits(1, 26, 37)),
    "words": (np.array([["a"], ["b"]]),),
    "series": (shares(1, 96, 7),),
    "scores of places": (shares(1, 8400, 1),),
    "codes": (logits(1, 64), logits(1, 64), shares(1, 3, 64, 64)),
    "whole numbers": (whole(1, 300, 4), whole(1, 300)),
    "nothing at all": (),
    "empty": (np.zeros((1, 0, 85), np.float32),),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_no_detectors(name: str) -> None:
    outputs = {f"output{index}": array for index, array in enumerate(OTHERS[name])}
    found = [find_head(NetworkFacts(outputs, size)) for size in SIZES]
    assert [head.why for head in found if head is not None] == []


def test_a_classifier_of_ultralytics_is_none() -> None:
    metadata = {"task": "classify", "names": "{0: 'a', 1: 'b'}", "stride": "1", "end2end": "False"}
    assert find_head(NetworkFacts({"output0": softly(2, 2)}, (320, 320), metadata)) is None


def rows_of_boxes(count: int, width: int) -> Any:
    """Boxes in pixels of 320x320 and shares, (1, count, width)."""
    rows = np.random.default_rng(0).random((1, count, width)).astype(np.float32)
    rows[..., :4] *= 320
    return rows


@pytest.mark.parametrize(
    ("anchors", "width", "family"),
    [
        (1, 85, "YOLOX"),
        (1, 7, "YOLOX"),
        (3, 85, "YOLOv5/v7"),
        (1, 84, "YOLOv8"),  # no objectness
    ],
)
def test_rows_of_a_cell_and_their_numbers_tell_families(anchors: int, width: int, family: str) -> None:
    """(N, A, 4 + C) or (N, A, 5 + C): 2100 cells at 320x320."""
    head = find_head(NetworkFacts({"output": rows_of_boxes(anchors * CELLS, width)}, (320, 320)))
    assert head is not None
    assert head.family == family
