"""Decodes YOLOX (Ge et al. 2021, arXiv 2107.08430): one output (N, A, 5 + C), a row a cell of strides 8, 16 and 32.

    centre = (xy + cell) * stride       size = exp(wh) * stride       score = objectness * class

Exported without its decoding, xy and wh are as the layers give them; with it, centre and size are in pixels. Objectness
and classes are behind a sigmoid in both. P6 models have a stride of 64 besides. All classes of a row count that reach
the score, as in evaluations of the other families, where YOLOX's own takes the best alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, cell_grid, corners_of, find_boxes, find_strides
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names

LARGEST_RAW_SIZE = 12.0
"""What log(width / stride) does not exceed; widths in pixels do."""

SCORES = OutputPart("scores", 2, 5, times=OutputPart("objectness", 2, 4, 5))
PARTS = (OutputPart("centres", 2, 0, 2, sure=SCORES), OutputPart("sizes", 2, 2, 4, sure=SCORES), SCORES)


def match(facts: NetworkFacts) -> Head | None:
    """The head of a YOLOX network; None for others."""
    if len(facts.outputs) != 1:
        return None
    ((name, array),) = facts.outputs.items()
    if not facts.is_float(name) or array.ndim != 3 or array.shape[2] < 6:
        return None
    strides = find_strides(facts.size, array.shape[1])
    if strides is None:
        return None
    beyond = array[..., 4:]
    if beyond.min(initial=0.0) < 0 or beyond.max(initial=0.0) > 1:
        return None
    raw = float(array[..., 2:4].max(initial=0.0)) <= LARGEST_RAW_SIZE
    form = "as the layers give them" if raw else "in pixels"
    rows = f"{array.shape[1]} rows are the cells of strides {', '.join(map(str, strides))}"
    why = f"{rows} at {facts.size[0]}x{facts.size[1]}, with boxes {form}, objectness and {array.shape[2] - 5} classes"
    decode = partial(_decode, size=facts.size, strides=strides, raw=raw)
    return Head("YOLOX", why, (name,), decode, facts.size, 0.3, read_class_names(facts.metadata), {name: PARTS})


def _decode(
    arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int], strides: Sequence[int], raw: bool
) -> list[Detections]:
    cells, steps = cell_grid(size, strides)
    found = []
    for rows in arrays[0].astype(np.float64):
        centres, sizes = rows[:, :2], rows[:, 2:4]
        if raw:
            with np.errstate(over="ignore"):
                centres, sizes = (centres + cells) * steps, np.exp(sizes) * steps
        scores = rows[:, 4:5] * rows[:, 5:]
        found.append(find_boxes(corners_of(centres, sizes), scores, least)[1])
    return found
