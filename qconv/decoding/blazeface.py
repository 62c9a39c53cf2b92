"""Decodes BlazeFace (Bazarevsky et al. 2019, arXiv 1907.05047) and the detectors of MediaPipe that are made like it.

Two outputs: (N, A, 4 + 2 * K) is centre, size and K keypoints in pixels, from the middle of a cell, and (N, A, 1) is
the logit of its score. Cells have two boxes for each layer of a stride; those of the full range have one.

Boxes that overlap the best one are not dropped: their mean, weighted by scores, is the box (weighted suppression). What
is found depends a little on the least score, therefore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, cell_grid, pairwise_iou, pick_candidates, sigmoid
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.priors import with_full_scores

NMS_IOU = 0.3

GRIDS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((8, 2), (16, 6)),
    ((16, 2), (32, 6)),
    ((8, 2), (16, 2), (32, 6)),
    ((4, 1),),
)
"""Strides, each with the boxes of a cell: short range and palms, back camera, poses, full range."""

BOX_PARTS = (OutputPart("centres", 2, 0, 2), OutputPart("sizes", 2, 2, 4), OutputPart("keypoints", 2, 4))


def match(facts: NetworkFacts) -> Head | None:
    """The head of a network of this family; None for others."""
    if len(facts.outputs) != 2:
        return None
    scores, boxes = sorted(facts.outputs, key=lambda name: facts.shape_of(name)[-1:])
    shape, least_shape = facts.shape_of(boxes), facts.shape_of(scores)
    if len(shape) != 3 or shape[2] < 8 or shape[2] % 2 or least_shape != (*shape[:2], 1):
        return None
    if not (facts.is_float(scores) and facts.is_float(boxes)):
        return None
    grids = next((grids for grids in GRIDS if len(_cell_centres(facts.size, grids)) == shape[1]), None)
    if grids is None:
        return None
    strides = ", ".join(f"{count} a cell of {stride} pixels" for stride, count in grids)
    why = f"{shape[1]} boxes, {strides}, with {(shape[2] - 4) // 2} keypoints each, and a logit for each"
    decode = partial(_decode, size=facts.size, grids=grids)
    sure = OutputPart("scores", 2, tensor=scores)
    parts = {boxes: tuple(replace(part, sure=sure) for part in BOX_PARTS)}
    return Head("BlazeFace", why, (boxes, scores), decode, facts.size, 0.5, parts=parts)


def _cell_centres(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> Float64:
    """The middle of the cell of each box, in pixels, (A, 2)."""
    found = []
    for stride, count in grids:
        cells, steps = cell_grid(size, [stride])
        found.append(np.repeat((cells + 0.5) * steps, count, axis=0))
    return np.concatenate(found)


def _decode(
    arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int], grids: Sequence[tuple[int, int]]
) -> list[Detections]:
    middles = _cell_centres(size, grids)
    found = []
    for rows, logits in zip(arrays[0].astype(np.float64), arrays[1], strict=True):
        points = rows.reshape(len(rows), -1, 2)
        centres, sizes = points[:, 0] + middles, points[:, 1]
        boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)
        scores = np.where((sizes > 0).all(axis=1, keepdims=True), sigmoid(logits), 0)
        picked, detections = pick_candidates(boxes, scores, least)
        found.append(_merge(detections, points[picked, 2:] + middles[picked, None]))
    return found


def _merge(detections: Detections, points: Float64) -> Detections:
    """Means of boxes that overlap, with their points (N, K, 2), weighted by scores; the best score is that of all."""
    everything = np.concatenate([detections.boxes, points.reshape(len(points), 2 * points.shape[1])], axis=1)
    left, rows, kept = np.arange(len(detections)), [], []
    while left.size:
        near = pairwise_iou(detections.boxes[left[:1]], detections.boxes[left])[0] > NMS_IOU
        near[0] = True
        rows.append(np.average(everything[left[near]], axis=0, weights=detections.scores[left[near]]))
        kept.append(left[0])
        left = left[~near]
    merged = np.array(rows).reshape(len(rows), everything.shape[1])
    places = merged[:, 4:].reshape(len(rows), points.shape[1], 2)
    classes = np.zeros(len(rows), np.int64)
    return Detections.of(merged[:, :4], detections.scores[kept], classes, keypoints=with_full_scores(places))
