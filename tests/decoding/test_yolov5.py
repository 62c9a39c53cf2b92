from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qconv.decoding import yolov5
from qconv.decoding.head import NetworkFacts
from tests.support.decoder_references import DecoderReference, largest_difference


def maps() -> DecoderReference:
    return DecoderReference.load("yolov5n-maps")


def flat(array: np.ndarray) -> np.ndarray:
    """(N, 3, H, W, C) as (N, 3 C, H, W), as the last layer gives it."""
    count, anchors, height, width, numbers = array.shape
    return array.transpose(0, 1, 4, 2, 3).reshape(count, anchors * numbers, height, width)


def test_maps_are_read_before_their_channels_are_split_too() -> None:
    reference = maps()
    outputs = {name: flat(array) for name, array in reference.outputs.items()}
    head = yolov5.match(NetworkFacts(outputs, reference.size))
    assert head is not None
    for found, published in zip(head.read(outputs, reference.least), reference.published, strict=True):
        assert largest_difference(found, published)["boxes"] < 1e-3
    parts = head.parts["map0"]
    assert [(part.name, part.start, part.stop) for part in parts[3:6]] == [
        ("boxes", 8, 12),
        ("objectness", 12, 13),
        ("scores", 13, 16),
    ]


def test_maps_are_known_in_any_order() -> None:
    reference = maps()
    outputs = dict(reversed(reference.outputs.items()))
    head = yolov5.match(NetworkFacts(outputs, reference.size))
    assert head is not None
    assert head.outputs == ("map0", "map1", "map2")


def test_decoded_rows_are_read_where_a_file_gives_maps_besides() -> None:
    rows = DecoderReference.load("yolov5n")
    both = replace(rows, outputs=maps().outputs | rows.outputs)
    head = yolov5.match(both.facts)
    assert head is not None
    assert head.outputs == ("output0",)


def test_maps_of_features_are_no_boxes() -> None:
    """As many channels as three boxes have, but most of them say that there is something."""
    reference = maps()
    outputs = {name: np.abs(array) for name, array in reference.outputs.items()}
    assert yolov5.match(NetworkFacts(outputs, reference.size)) is None


@pytest.mark.parametrize("change", ["one fewer", "one more", "other classes"])
def test_maps_that_do_not_belong_together_are_none(change: str) -> None:
    reference = maps()
    outputs = dict(reference.outputs)
    if change == "one fewer":
        del outputs["map1"]
    elif change == "one more":
        outputs["more"] = outputs["map0"]
    else:
        outputs["map1"] = outputs["map1"][..., :-1]
    assert yolov5.match(NetworkFacts(outputs, reference.size)) is None


def test_one_box_by_hand() -> None:
    """sigmoid(0) = 0.5: centre (1 - 0.5 + cell) * 8, size of the anchor 10x13; objectness and class 0.5 each."""
    outputs = {f"map{s}": np.full((1, 3, 64 // s, 64 // s, 6), -20.0, np.float32) for s in (8, 16, 32)}
    outputs["map8"][0, 0, 2, 5] = 0
    head = yolov5.match(NetworkFacts(outputs, (64, 64)))
    assert head is not None
    (found,) = head.read(outputs, 0.1)
    assert found.boxes == pytest.approx(np.array([[44 - 5, 20 - 6.5, 44 + 5, 20 + 6.5]]))
    assert found.scores == pytest.approx([0.25])


def test_anchors_of_four_strides_are_those_of_p6() -> None:
    """The largest anchor of stride 64 is 925x792."""
    outputs = {f"map{s}": np.full((1, 3, 128 // s, 128 // s, 6), -20.0, np.float32) for s in (8, 16, 32, 64)}
    outputs["map64"][0, 2, 0, 0] = 0
    head = yolov5.match(NetworkFacts(outputs, (128, 128)))
    assert head is not None
    (found,) = head.read(outputs, 0.1)
    assert found.boxes == pytest.approx(np.array([[32 - 462.5, 32 - 396, 32 + 462.5, 32 + 396]]))
