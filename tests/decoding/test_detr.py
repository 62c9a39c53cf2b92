from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qconv.decoding import detr
from qconv.decoding.head import NetworkFacts
from tests.support.decoder_references import DecoderReference

BOX = [0.5, 0.5, 0.25, 0.5]
"""Of an input of 200x400, height by width: from 150 to 250 and from 50 to 150."""

ON_THE_LEFT = [0.1, 0.5, 0.2, 0.2]


def pair(logits: list[list[float]]) -> dict[str, np.ndarray]:
    boxes = [BOX, *[ON_THE_LEFT] * (len(logits) - 1)]
    return {"logits": np.float32([logits]), "pred_boxes": np.float32([boxes])}


def test_a_softmax_with_no_object_by_hand() -> None:
    """exp: 3, 1 and 4 of 8, so 0.375 for class 0; most queries have their highest logit in the last column."""
    outputs = pair([[np.log(3), 0, np.log(4)], [-1, -2, 5], [-1, -2, 5]])
    head = detr.match(NetworkFacts(outputs, (200, 400)))
    assert head is not None
    assert (head.family, head.outputs) == ("DETR", ("logits", "pred_boxes"))
    (found,) = head.read(outputs, 0.1)
    assert found.scores == pytest.approx([0.375], abs=1e-6)
    assert found.classes.tolist() == [0]
    assert found.boxes == pytest.approx(np.array([[150, 50, 250, 150]]))


def test_a_sigmoid_each_by_hand() -> None:
    """sigmoid(0) = 0.5 and sigmoid(ln 3) = 0.75: the query is found with both classes."""
    outputs = pair([[0, np.log(3), -9], [-9, -9, -9], [-9, -8, -9]])
    head = detr.match(NetworkFacts(outputs, (200, 400)))
    assert head is not None
    assert head.family == "RT-DETR"
    (found,) = head.read(outputs, 0.1)
    assert found.scores == pytest.approx([0.75, 0.5])
    assert found.classes.tolist() == [1, 0]
    assert found.boxes == pytest.approx(np.array([[150, 50, 250, 150]] * 2))


def test_no_more_are_found_than_there_are_queries() -> None:
    """As many as the highest Q of Q x C scores."""
    outputs = pair([[1, 2, 3], [2, 1, 3], [-1, 3, 1]])
    head = detr.match(NetworkFacts(outputs, (200, 400)))
    assert head is not None
    assert head.family == "DETR"
    outputs = pair([[3, 2, 1], [2, 1, 3], [-1, 3, 1]])
    head = detr.match(NetworkFacts(outputs, (200, 400)))
    assert head is not None
    (found,) = head.read(outputs, 0.1)
    assert len(found) == 3


def test_other_outputs_of_a_transformer_are_left_alone() -> None:
    """As exporters of transformers write it: the hidden states of the queries follow."""
    reference = DecoderReference.load("detr")
    hidden = np.random.default_rng(0).normal(size=(2, 20, 32)).astype(np.float32)
    head = detr.match(replace(reference, outputs=reference.outputs | {"last_hidden_state": hidden}).facts)
    assert head is not None
    assert head.outputs == ("logits", "pred_boxes")


def test_boxes_by_their_edges_are_none_of_this_family() -> None:
    reference = DecoderReference.load("rtdetr_pair")
    edges = np.sort(reference.outputs["pred_boxes"], axis=2)
    assert detr.match(replace(reference, outputs=reference.outputs | {"pred_boxes": edges}).facts) is None


def test_probabilities_in_place_of_logits_are_none_of_this_family() -> None:
    reference = DecoderReference.load("rtdetr_pair")
    shares = 1 / (1 + np.exp(-reference.outputs["logits"]))
    assert detr.match(replace(reference, outputs=reference.outputs | {"logits": shares}).facts) is None
