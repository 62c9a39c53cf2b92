"""What heads read, and what they remember of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head


def counting(calls: list[float]) -> Head:
    """As many boxes as the first number says."""

    def decode(arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        calls.append(least)
        count = int(arrays[0].ravel()[0])
        return [Detections(np.zeros((count, 4)), np.ones(count), np.zeros(count, np.int64))]

    return Head("test", "", ("y",), decode, (8, 8))


def test_what_was_read_is_not_read_again() -> None:
    calls: list[float] = []
    head = counting(calls).remember(2)
    one, two, three = ({"y": np.full((1, 3), count)} for count in (1, 2, 3))
    assert [len(head.read(arrays, 0.1)[0]) for arrays in (one, two, one, two, one)] == [1, 2, 1, 2, 1]
    assert calls == [0.1, 0.1]
    head.read(one, 0.5)  # another score, which takes the place of the first batch
    assert calls == [0.1, 0.1, 0.5]
    head.read(three, 0.1)
    head.read(two, 0.1)
    assert calls == [0.1, 0.1, 0.5, 0.1, 0.1]
    head.read({"y": two["y"].copy()}, 0.1)  # equal numbers may be those of another batch
    assert len(calls) == 6
