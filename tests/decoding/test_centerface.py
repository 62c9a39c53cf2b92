"""CenterFace, by hand, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.centerface import match
from qconv.decoding.head import NetworkFacts
from tests.support.decoder_references import DecoderReference


def test_a_face_by_hand() -> None:
    """Cell (row 1, column 2) of 4 pixels: centre 4 * (2.5, 1.5) = (10, 6), 4 * e^0 wide and 4 * e^ln2 high.

    The first point is half the height and a quarter of the width from the left top: (8 + 1, 2 + 4).
    """
    maps = {name: np.zeros((1, count, 4, 4)) for name, count in (("hm", 1), ("s", 2), ("o", 2), ("l", 10))}
    maps["hm"][0, 0, 1, 2], maps["s"][0, 0, 1, 2] = 0.8, np.log(2)
    maps["l"][0, :2, 1, 2] = [0.5, 0.25]
    head = match(NetworkFacts(maps, (16, 16)))
    assert head is not None
    (found,) = head.read(maps, 0.5)
    assert found.boxes == pytest.approx(np.array([[8, 2, 12, 10]]))
    assert found.keypoints is not None
    assert found.keypoints[0, 0] == pytest.approx([9, 6, 1])


def test_a_map_less_is_none() -> None:
    made = DecoderReference.load("centerface")
    assert match(NetworkFacts(dict(list(made.outputs.items())[:3]), made.size)) is None
