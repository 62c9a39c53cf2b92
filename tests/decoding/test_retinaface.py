"""Priors of RetinaFace and UltraFace, other forms of their outputs, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.head import NetworkFacts
from qconv.decoding.retinaface import RETINAFACE, ULTRAFACE, match
from tests.support.decoder_references import DecoderReference


@pytest.mark.parametrize(
    ("family", "size", "count"),
    [
        (RETINAFACE, (640, 640), 16800),  # of the networks of biubug6, insightface and others at this size
        (RETINAFACE, (840, 840), 29126),
        (ULTRAFACE, (240, 320), 4420),  # of the shared network
        (ULTRAFACE, (480, 640), 17640),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_priors_are_as_many_as_published(family: object, size: tuple[int, int], count: int) -> None:
    assert len(family.make_priors(size)) == count  # type: ignore[attr-defined]


def test_logits_give_the_same_scores() -> None:
    """Softmax of their logarithms are the scores themselves."""
    made = DecoderReference.load("ultraface_raw")
    (scores,) = [name for name, array in made.outputs.items() if array.shape[2] == 2]
    logits = {**made.outputs, scores: np.log(made.outputs[scores].astype(np.float64)) + 1}
    head = match(NetworkFacts(logits, made.size))
    assert head is not None
    assert "in front of its softmax" in head.why
    (found,) = head.read(logits, made.least)
    assert found.scores == pytest.approx(np.sort(made.published[0]["scores"])[::-1], abs=1e-5)


def test_another_size_is_none() -> None:
    made = DecoderReference.load("retinaface")
    assert match(NetworkFacts(made.outputs, (640, 640))) is None
