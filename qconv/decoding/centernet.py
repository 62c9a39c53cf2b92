"""Decodes CenterNet (Zhou et al. 2019, arXiv 1904.07850): maps (N, C, H / 4, W / 4) of centres, sizes and offsets.

    centre = (cell + offset) * stride       size = size map * stride       score = peak of the class's map

A cell is a peak where none of the eight around it has more. There is no other suppression. The map of classes is
behind a sigmoid or still in front of it, as its numbers tell. The map of sizes is in front of that of offsets, as
CenterNet and MMDetection have them, unless names say otherwise; both have two channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, corners_of, sigmoid
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import cells_by_stride

STRIDE = 4

MOST_PEAKS = 100

OFFSET_NAMES = ("off", "reg")


def match(facts: NetworkFacts) -> Head | None:
    """The head of a CenterNet; None for others."""
    if len(facts.outputs) != 3:
        return None
    maps = [name for name in facts.outputs if facts.is_float(name) and len(facts.shape_of(name)) == 4]
    cells = cells_by_stride(facts.size, STRIDE)
    if len(maps) != 3 or any(facts.shape_of(name)[2:] != cells for name in maps):
        return None
    pairs = [name for name in maps if facts.shape_of(name)[1] == 2]
    if len(pairs) == 3:  # two classes: their map is the first one
        pairs = maps[1:]
    if len(pairs) != 2:
        return None
    (heat,) = set(maps) - set(pairs)
    sizes, offsets = pairs
    if sizes.lower().startswith(OFFSET_NAMES) and not offsets.lower().startswith(OFFSET_NAMES):
        sizes, offsets = offsets, sizes
    centres = facts.outputs[heat]
    raw = bool(centres.min(initial=0.0) < 0 or centres.max(initial=0.0) > 1)
    form = "in front of their sigmoid" if raw else "behind a sigmoid"
    why = (
        f"a map of {cells[0]}x{cells[1]} cells of {STRIDE} pixels with centres of {centres.shape[1]} classes {form}, "
        f"sizes in {sizes} and offsets in {offsets}"
    )
    decode = partial(_decode, raw=raw)
    names = read_class_names(facts.metadata)
    sure = OutputPart("scores", 1, tensor=heat)
    parts = {output: (OutputPart(name, 1, sure=sure),) for output, name in ((sizes, "sizes"), (offsets, "offsets"))}
    return Head("CenterNet", why, (heat, sizes, offsets), decode, facts.size, 0.3, names, parts)


def _decode(arrays: Sequence[NDArray[Any]], least: float, *, raw: bool) -> list[Detections]:
    found = []
    for heat, sizes, offsets in zip(*(array.astype(np.float64) for array in arrays), strict=True):
        scores = sigmoid(heat) if raw else heat
        classes, rows, columns = np.nonzero(find_peaks(scores) & (scores > least))
        cells = np.stack([columns, rows], axis=1)
        centres = (cells + offsets[:, rows, columns].T) * STRIDE
        boxes = corners_of(centres, sizes[:, rows, columns].T * STRIDE)
        every = Detections.of(boxes, scores[classes, rows, columns], classes)
        found.append(every.select(slice(MOST_PEAKS)))
    return found


def find_peaks(maps: Float64) -> NDArray[np.bool_]:
    """Which cells of maps (C, H, W) have as much as any of the eight around them."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    found: NDArray[np.bool_] = windows.max(axis=(3, 4)) == maps
    return found
