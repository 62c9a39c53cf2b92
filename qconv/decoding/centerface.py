"""Decodes CenterFace (Xu et al. 2019, arXiv 1911.03599): four maps of cells of 4 pixels, with 1, 2, 2 and 10 channels.

    centre = (cell + offset + 0.5) * stride     size = exp(size map) * stride     point = left top + point map * size

Rows stand before columns in each pair: height and width, y and x. The first map of two channels is that of sizes. A box
that sticks out to the left or the top is moved in, as the authors' program does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, find_boxes
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.priors import cells_by_stride, with_full_scores

STRIDE = 4

NMS_IOU = 0.3

CHANNELS = [1, 2, 2, 10]


def match(facts: NetworkFacts) -> Head | None:
    """The head of a CenterFace network; None for others."""
    cells = cells_by_stride(facts.size, STRIDE)
    names = list(facts.outputs)
    if any(len(facts.shape_of(n)) != 4 or facts.shape_of(n)[2:] != cells or not facts.is_float(n) for n in names):
        return None
    names.sort(key=lambda name: facts.shape_of(name)[1])  # equal ones keep their order
    if [facts.shape_of(name)[1] for name in names] != CHANNELS:
        return None
    heat, sizes, offsets, points = names
    if facts.outputs[heat].min(initial=0.0) < 0 or facts.outputs[heat].max(initial=0.0) > 1:
        return None
    why = (
        f"maps of {cells[0]}x{cells[1]} cells of {STRIDE} pixels with centres, sizes in {sizes}, offsets in {offsets} "
        "and five keypoints"
    )
    decode = partial(_decode, size=facts.size)
    sure = OutputPart("scores", 1, tensor=heat)
    named = {sizes: "sizes", offsets: "offsets", points: "keypoints"}
    parts = {output: (OutputPart(name, 1, sure=sure),) for output, name in named.items()}
    return Head("CenterFace", why, (heat, sizes, offsets, points), decode, facts.size, 0.5, parts=parts)


def _decode(arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int]) -> list[Detections]:
    return [
        _decode_image(heat, sizes, offsets, points, least, size)
        for heat, sizes, offsets, points in zip(*(array.astype(np.float64) for array in arrays), strict=True)
    ]


def _decode_image(
    heat: Float64, sizes: Float64, offsets: Float64, points: Float64, least: float, size: tuple[int, int]
) -> Detections:
    rows, columns = np.nonzero(heat[0] > least)
    cells = np.stack([rows, columns])
    extents = np.exp(sizes[:, rows, columns]) * STRIDE
    corners = (cells + offsets[:, rows, columns] + 0.5) * STRIDE - extents / 2
    limits = np.array(size, np.float64)[:, None]
    corners = np.clip(corners, 0, limits)
    ends = np.minimum(corners + extents, limits)
    places = points[:, rows, columns].reshape(len(points) // 2, 2, len(rows)) * extents + corners
    boxes = np.concatenate([corners[::-1], ends[::-1]]).T
    keypoints = with_full_scores(places[:, ::-1].transpose(2, 0, 1))
    picked, found = find_boxes(boxes, heat[0, rows, columns][:, None], least, NMS_IOU)
    return replace(found, keypoints=keypoints[picked])
