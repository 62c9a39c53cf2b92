"""Decodes FastestDet (dog-qiuqiu/FastestDet, 2022): one map (N, 5 + C, H / 16, W / 16), a cell a box.

    centre = (tanh(xy) + cell) * stride     size = sigmoid(wh) * image     score = objectness * best class

Objectness is behind a sigmoid and the classes behind a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, cell_grid, corners_of, pick_candidates, sigmoid
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import cells_by_stride

STRIDE = 16

NMS_IOU = 0.45

SCORES = OutputPart("scores", 1, 5, times=OutputPart("objectness", 1, 0, 1))
PARTS = (OutputPart("centres", 1, 1, 3, sure=SCORES), OutputPart("sizes", 1, 3, 5, sure=SCORES), SCORES)


def match(facts: NetworkFacts) -> Head | None:
    """The head of a FastestDet network; None for others."""
    if len(facts.outputs) != 1:
        return None
    ((name, array),) = facts.outputs.items()
    if not facts.is_float(name) or array.ndim != 4 or array.shape[1] < 6:
        return None
    if array.shape[2:] != cells_by_stride(facts.size, STRIDE) or not array.size:
        return None
    objectness, boxes, classes = array[:, 0], array[:, 1:5], array[:, 5:]
    shares = objectness.min() >= 0 and objectness.max() <= 1 and np.allclose(classes.sum(axis=1), 1, atol=1e-3)
    if not shares or (boxes.min() >= 0 and boxes.max() <= 1):
        return None
    why = (
        f"a map of {array.shape[2]}x{array.shape[3]} cells of {STRIDE} pixels, with objectness, a box and "
        f"{array.shape[1] - 5} classes that add up to 1 in each"
    )
    decode = partial(_decode, size=facts.size)
    return Head("FastestDet", why, (name,), decode, facts.size, 0.65, read_class_names(facts.metadata), {name: PARTS})


def _decode(arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int]) -> list[Detections]:
    cells, steps = cell_grid(size, [STRIDE])
    found = []
    for maps in arrays[0].astype(np.float64):
        rows = maps.reshape(len(maps), -1).T
        centres = (np.tanh(rows[:, 1:3]) + cells) * steps
        sizes = sigmoid(rows[:, 3:5]) * np.array([size[1], size[0]])
        scores = rows[:, :1] * rows[:, 5:]
        picked = pick_candidates(corners_of(centres, sizes), scores, least, one_class=True)[1]
        found.append(picked.suppressed(NMS_IOU))
    return found
