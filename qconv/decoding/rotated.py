"""Rotated boxes: corners, overlap and suppression.

    box = (cx, cy, w, h, angle): pixels, and radians from the x axis to the side w
    ProbIoU = 1 - sqrt(1 - exp(-D))       D: Bhattacharyya distance of the boxes as normal distributions

ProbIoU: Llerena et al. 2021, arXiv 2106.06072. Suppression is that of Fast NMS (Bolya et al. 2019, arXiv 1904.02689),
as in Ultralytics' programs: a box drops those that it overlaps even where it is dropped itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import MOST_BOXES, Detections, Float64, pick_candidates

EPSILON = 1e-7

BLOCK = 256
"""Boxes that are compared with all higher ones at a time."""


def find_rotated(boxes: NDArray[Any], scores: NDArray[Any], least: float, iou: float) -> Detections:
    """Detections of rotated boxes (A, 5) with scores (A, C) above `least`, after suppression by class."""
    _, found = pick_candidates(boxes, scores, least)
    kept = found.select(suppress_rotated(found.boxes, found.classes, iou, MOST_BOXES))
    return with_corners(kept.boxes, kept.scores, kept.classes)


def with_corners(boxes: Float64, scores: Float64, classes: NDArray[np.int64]) -> Detections:
    """Detections of rotated boxes (N, 5), with the upright boxes around them. They keep their order."""
    corners = rotated_corners(boxes)
    return Detections(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1), scores, classes, corners)


def rotated_corners(boxes: Float64) -> Float64:
    """Corners of rotated boxes (N, 5), in order around each, (N, 4, 2)."""
    cos, sin = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
    along = boxes[:, 2:3] / 2 * np.concatenate([cos, sin], axis=1)
    across = boxes[:, 3:4] / 2 * np.concatenate([-sin, cos], axis=1)
    centre = boxes[:, :2]
    sides = (along + across, along - across, -along - across, -along + across)
    return np.stack([centre + side for side in sides], axis=1)


def prob_iou(a: Float64, b: Float64) -> Float64:
    """ProbIoU of each rotated box of one list with the one at its place in the other, both (N, 5); (N,)."""
    xx, yy, xy = (one + other for one, other in zip(_covariance_of(a), _covariance_of(b), strict=True))
    dx, dy = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    determinant = np.maximum(xx * yy - xy**2, 0)
    apart = (xx * dy**2 + yy * dx**2 - 2 * xy * dx * dy) / (4 * (determinant + EPSILON))
    product = (a[:, 2] * a[:, 3] * b[:, 2] * b[:, 3] / 144) ** 2  # of both determinants
    unlike = 0.5 * np.log(determinant / (4 * np.sqrt(product) + EPSILON) + EPSILON)
    distance = np.clip(apart + unlike, EPSILON, 100)
    found: Float64 = 1 - np.sqrt(1 - np.exp(-distance) + EPSILON)
    return found


def _covariance_of(boxes: Float64) -> tuple[Float64, Float64, Float64]:
    """Variances of x and y and their covariance, of uniform distributions over rotated boxes."""
    along, across = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    return along * cos**2 + across * sin**2, along * sin**2 + across * cos**2, (along - across) * cos * sin


def suppress_rotated(boxes: Float64, classes: NDArray[np.int64], iou: float, most: int) -> NDArray[np.int64]:
    """The places of the rotated boxes (N, 5) that are kept, (K,). Boxes stand by falling score.

    Centres further apart than sqrt(l^2 + m^2) / 2, by the longer sides l and m, give D > 0.75 and a ProbIoU below 0.28:
    these pairs are left out, so that `iou` must be more than that.
    """
    reach = boxes[:, 2:4].max(axis=1, initial=0.0) ** 2 / 4
    kept: list[NDArray[np.int64]] = []
    for start in range(0, len(boxes), BLOCK):
        if sum(map(len, kept)) >= most:
            break
        block, above = np.arange(start, min(start + BLOCK, len(boxes))), np.arange(min(start + BLOCK, len(boxes)))
        apart = ((boxes[block, None, :2] - boxes[None, above, :2]) ** 2).sum(axis=-1)
        near = (apart <= reach[block, None] + reach[above]) & (classes[block, None] == classes[above])
        lower, upper = np.nonzero(near & (above < block[:, None]))
        dropped = lower[prob_iou(boxes[block[lower]], boxes[upper]) > iou]
        kept.append(np.delete(block, dropped))
    return np.concatenate(kept)[:most] if kept else np.zeros(0, np.int64)
