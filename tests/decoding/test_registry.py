"""Networks that are no detectors are not taken for some, whatever the size of their input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qconv.decoding.boxes import sigmoid, softmax
from qconv.decoding.head import NetworkFacts
from qconv.decoding.registry import find_head
from tests.support.decoder_references import REFERENCES, read

SIZES = ((640, 640), (512, 512), (352, 352), (320, 320), (300, 300), (240, 320), (192, 192), (128, 128), (800, 608))


def logits(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(0, 3, shape).astype(np.float32)


def shares(*shape: int) -> Any:
    return sigmoid(logits(*shape))


def softly(*shape: int, axis: int = 1) -> Any:
    return softmax(logits(*shape), axis)


def whole(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(0, 20, shape)


OTHERS: dict[str, tuple[Any, ...]] = {
    "classifier": (logits(1, 1000),),
    "classifier of a batch": (softly(4, 1000),),
    "one logit": (logits(1, 1),),
    "binary": (shares(1, 1),),
    "several classifiers": (logits(1, 10), softly(1, 2), logits(1, 100)),
    "class and its score": (whole(1), shares(1)),
    "class, score and four numbers": (whole(1), shares(1), logits(1, 4)),
    "classifier with features": (logits(1, 1000), logits(1, 2048)),
    "embedding": (logits(1, 512),),
    "depth and pose": (shares(1, 1, 64, 64), logits(1, 6)),
    "keypoints": (logits(1, 17, 3),),
    "hand": (logits(1, 63), shares(1, 1), shares(1, 1), logits(1, 63)),
    "mesh of a face": (logits(1, 1, 1, 1404), logits(1, 1, 1, 1)),
    "heat maps of keypoints": (shares(1, 17, 64, 48),),
    "poses by fields": (logits(1, 38, 46, 46), logits(1, 19, 46, 46)),
    "segmenter": (logits(1, 21, 65, 65),),
    "segmenter behind a softmax": (softly(1, 85, 20, 20),),
    "segmenter, channels last": (logits(1, 64, 64, 19),),
    "class map": (whole(1, 64, 64),),
    "mask": (shares(1, 1, 160, 160),),
    "picture": (shares(1, 3, 128, 128),),
    "panoptic": (logits(1, 19, 160, 160), shares(1, 1, 160, 160), logits(1, 2, 160, 160)),
    "flow at three sizes": (logits(1, 2, 160, 160), logits(1, 2, 80, 80), logits(1, 2, 40, 40)),
    "features at three sizes": (logits(1, 256, 80, 80), logits(1, 256, 40, 40), logits(1, 256, 20, 20)),
    "points and descriptors": (logits(1, 65, 80, 80), logits(1, 256, 80, 80)),
    "tokens": (logits(1, 197, 768),),
    "tokens and their mean": (logits(1, 8400, 85), logits(1, 85)),
    "text": (softly(1, 40, 6625, axis=2),),
    "text of several lines": (logits(1, 26, 37), logits(1, 26, 37), logits(1, 26, 37)),
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


@pytest.mark.parametrize("name", sorted(path.stem for path in REFERENCES.glob("*.npz")))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_a_head_reads_any_numbers(name: str, value: float) -> None:
    """A quantized file that is broken gives what it gives; boxes that are none are left out."""
    made = read(name)
    head = find_head(NetworkFacts(made.outputs, made.size))
    assert head is not None
    (found,) = head.read({key: np.full_like(array, value) for key, array in made.outputs.items()}, 0.001)
    assert np.isfinite(found.boxes).all()
    assert not np.isnan(found.scores).any()
