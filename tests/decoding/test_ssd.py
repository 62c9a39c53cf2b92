"""SSD with anchors in other forms, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.boxes import sigmoid, softmax
from qconv.decoding.head import NetworkFacts
from qconv.decoding.registry import find_head
from qconv.decoding.ssd import match
from tests.support.decoder_references import DecoderReference


@pytest.mark.parametrize("name", ["ssd_object_detection", "ssdlite_torchvision"])
def test_scores_that_are_none_of_logits_give_the_same(name: str) -> None:
    made = DecoderReference.load(name)
    squash = sigmoid if name == "ssd_object_detection" else lambda logits: softmax(logits, axis=2)
    shares = {"deltas": made.outputs["deltas"], "scores": squash(made.outputs["logits"])}
    heads = [find_head(NetworkFacts(outputs, made.size)) for outputs in (made.outputs, shares)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert heads[1].family == heads[0].family
    (raw,), (squashed,) = heads[0].read(made.outputs, 0.3), heads[1].read(shares, 0.3)
    assert squashed.boxes == pytest.approx(raw.boxes)
    assert squashed.scores == pytest.approx(raw.scores)


def test_unknown_priors_are_none() -> None:
    outputs = {"deltas": np.zeros((1, 1918, 4)), "scores": np.zeros((1, 1918, 91))}
    assert match(NetworkFacts(outputs, (300, 300))) is None
    made = DecoderReference.load("ssd300_torchvision")
    assert match(NetworkFacts(made.outputs, (512, 512))) is None
