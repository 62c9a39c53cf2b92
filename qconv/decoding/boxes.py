"""Defines `Detections`, the boxes that a detector finds in one image, with their overlap and non-maximum suppression.

    IoU(a, b) = area of both / area of either

Boxes are (x1, y1, x2, y2) in pixels, of the network's input until they are moved; a pixel's left edge is its number.
Suppression keeps the box with the highest score, drops those of its class that overlap it by more than a limit, and
goes on with what is left (Dalal and Triggs 2005).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]

LEAST_SCORE = 0.001
"""Score from which on a box counts in average precision, as in published evaluations on COCO."""

MOST_BOXES = 300
"""Boxes of one image that are kept."""

MOST_CANDIDATES = 30000
"""Boxes of one image that are compared, those with the highest scores, as in YOLOv5 and all of its family since."""

NMS_IOU = 0.65
"""Overlap above which the weaker of two boxes of a class is dropped, as in published evaluations on COCO."""


@dataclass(frozen=True, slots=True)
class Detections:
    """What is found in one image, by falling score.

    Attributes:
        boxes: Left, top, right and bottom edge in pixels, (N, 4).
        scores: From 0 to 1, (N,).
        classes: Their numbers, (N,).
        corners: Of rotated boxes, in order around them, (N, 4, 2); None for upright ones.
        keypoints: x, y and score of each, (N, K, 3); None where there are none.
        masks: What belongs to the object, on a grid over the network's whole input, (N, H, W); None for none.
    """

    boxes: Float64
    scores: Float64
    classes: NDArray[np.int64]
    corners: Float64 | None = None
    keypoints: Float64 | None = None
    masks: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike, **more: Any) -> Detections:
        """Detections of arrays of any numeric type, sorted by falling score; those that are not finite are left out."""
        box, score = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64).reshape(-1)
        found = cls(box, score, np.asarray(classes).astype(np.int64).reshape(-1), **more)
        sound = np.flatnonzero(np.isfinite(box).all(axis=1) & np.isfinite(score))
        return found.select(sound[np.argsort(-score[sound], kind="stable")])

    def __len__(self) -> int:
        """How many there are."""
        return len(self.scores)

    def select(self, index: NDArray[Any] | slice) -> Detections:
        """Some of them. index: places, a mask or a slice, as numpy takes it."""
        parts: dict[str, Any] = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: part[index] for name, part in parts.items() if part is not None})

    def above(self, score: float) -> Detections:
        """Those with a higher score than this."""
        return self.select(self.scores > score)

    def suppressed(self, iou: float = NMS_IOU, most: int = MOST_BOXES, *, by_class: bool = True) -> Detections:
        """Those that are left of overlapping ones, at most so many. by_class: boxes of other classes stay."""
        classes = self.classes if by_class else np.zeros_like(self.classes)
        return self.select(suppress_overlaps(self.boxes, self.scores, classes, iou, most))

    def moved(self, scale: tuple[float, float], offset: tuple[float, float]) -> Detections:
        """The same in another image's pixels: x * scale + offset, for x and for y. Masks are dropped."""
        factor, shift = np.array(scale), np.array(offset)
        keypoints = self.keypoints
        if keypoints is not None:
            keypoints = np.concatenate([keypoints[..., :2] * factor + shift, keypoints[..., 2:]], axis=-1)
        return replace(
            self,
            boxes=self.boxes * np.tile(factor, 2) + np.tile(shift, 2),
            corners=None if self.corners is None else self.corners * factor + shift,
            keypoints=keypoints,
            masks=None,
        )

    def clipped(self, width: float, height: float) -> Detections:
        """The same with boxes cut off at the edges of an image of this size."""
        most = np.array([width, height, width, height], np.float64)
        return replace(self, boxes=np.clip(self.boxes, 0, most))


NOTHING = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))


def corners_of(centres: Float64, sizes: Float64) -> Float64:
    """Boxes (N, 4) by their edges, of centres (N, 2) and sizes (N, 2)."""
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=-1)


def pairwise_iou(a: Float64, b: Float64) -> Float64:
    """IoU of boxes (A, 4) and boxes (B, 4), (A, B); 0 for boxes without an area."""
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    both = np.maximum(width, 0) * np.maximum(height, 0)
    either = _areas_of(a)[:, None] + _areas_of(b)[None, :] - both
    found: Float64 = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return found


def _areas_of(boxes: Float64) -> Float64:
    sizes = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    found: Float64 = sizes[:, 0] * sizes[:, 1]
    return found


def suppress_overlaps(
    boxes: Float64, scores: Float64, classes: NDArray[np.int64], iou: float, most: int | None = None
) -> NDArray[np.int64]:
    """The places of the boxes that are kept, by falling score, (K,). Boxes are compared within their class alone.

    most: how many are kept at most; None for all. Of each class those are looked at that can still be among them.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, areas = boxes[order], _areas_of(boxes[order])
    groups = _group(classes[order])
    firsts = [(int(group[0]), number) for number, group in enumerate(groups)]
    heapq.heapify(firsts)
    kept: list[int] = []
    while firsts and (most is None or len(kept) < most):
        best, number = heapq.heappop(firsts)
        kept.append(best)
        left = groups[number][1:]
        left = left[~_overlap_more(boxes, areas, best, left, iou)]
        groups[number] = left
        if left.size:
            heapq.heappush(firsts, (int(left[0]), number))
    return order[np.array(kept, np.int64)]


def _group(classes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places of each class, in order."""
    places = np.argsort(classes, kind="stable")
    starts = np.flatnonzero(np.diff(classes[places])) + 1
    return np.split(places, starts) if places.size else []


def _overlap_more(
    boxes: Float64, areas: Float64, best: int, others: NDArray[np.int64], iou: float
) -> NDArray[np.bool_]:
    """Which of the others overlap one box by more than this, (N,)."""
    left, top, right, bottom = boxes[others].T
    width = np.minimum(right, boxes[best, 2]) - np.maximum(left, boxes[best, 0])
    height = np.minimum(bottom, boxes[best, 3]) - np.maximum(top, boxes[best, 1])
    both = np.maximum(width, 0) * np.maximum(height, 0)
    found: NDArray[np.bool_] = both > iou * (areas[best] + areas[others] - both)
    return found


def pick_candidates(
    boxes: NDArray[Any], scores: NDArray[Any], least: float, *, one_class: bool = False
) -> tuple[NDArray[np.int64], Detections]:
    """The rows that reach a score, and what they say, before any suppression.

    Args:
        boxes: By edges, (A, 4), or whatever numbers a family has for them.
        scores: Of each class, (A, C).
        least: Score that must be exceeded.
        one_class: Whether a row says its best class alone, and not all that reach the score.

    Returns:
        For each detection its row, (N,), and the detections, both by falling score; MOST_CANDIDATES at most.
    """
    with np.errstate(invalid="ignore"):
        reaching = scores > least
    if one_class:
        best = np.argmax(scores, axis=1)
        reaching &= np.arange(scores.shape[1]) == best[:, None]
    highest = scores[reaching]
    if highest.size > MOST_CANDIDATES:
        reaching &= scores >= np.partition(highest, -MOST_CANDIDATES)[-MOST_CANDIDATES]
    rows, classes = np.nonzero(reaching)
    value = scores[rows, classes].astype(np.float64)
    order = np.argsort(-value, kind="stable")[:MOST_CANDIDATES]
    rows, classes, value = rows[order], classes[order], value[order]
    found = boxes[rows].astype(np.float64)
    sound = np.isfinite(found).all(axis=1)
    return rows[sound], Detections(found[sound], value[sound], classes[sound].astype(np.int64))


def find_boxes(
    boxes: NDArray[Any], scores: NDArray[Any], least: float, iou: float = NMS_IOU
) -> tuple[NDArray[np.int64], Detections]:
    """What is left of `pick_candidates` after suppression by class: rows and detections, MOST_BOXES at most."""
    rows, found = pick_candidates(boxes, scores, least)
    kept = suppress_overlaps(found.boxes, found.scores, found.classes, iou, MOST_BOXES)
    return rows[kept], found.select(kept)


def sigmoid(x: NDArray[Any]) -> Float64:
    """1 / (1 + exp(-x)), without overflow."""
    found: Float64 = 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))
    return found


def softmax(x: NDArray[Any], axis: int) -> Float64:
    """exp(x) / sum exp(x) along an axis."""
    shifted = np.asarray(x, np.float64)
    raised = np.exp(shifted - shifted.max(axis=axis, keepdims=True))
    found: Float64 = raised / raised.sum(axis=axis, keepdims=True)
    return found


STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
"""Of the grids that detectors of these families predict on, the usual ones first."""


def find_strides(size: tuple[int, int], rows: int, anchors: int = 1) -> tuple[int, ...] | None:
    """The strides of STRIDES whose cells over an image give so many rows; None where none do.

    size: height and width of the image, in pixels. anchors: rows of each cell.
    """
    return next((s for s in STRIDES if anchors * sum((size[0] // n) * (size[1] // n) for n in s) == rows), None)


def cell_grid(size: tuple[int, int], strides: Sequence[int]) -> tuple[Float64, Float64]:
    """Column and row of every cell of some grids over an image, (A, 2), and its stride, (A, 1).

    size: height and width of the image, in pixels. Grids stand in the order of `strides`, cells row by row. A cell that
    the image fills in part counts, as padded convolutions have it.
    """
    cells, steps = [], []
    for stride in strides:
        rows, columns = np.mgrid[: -(-size[0] // stride), : -(-size[1] // stride)]
        cells.append(np.stack([columns, rows], axis=-1).reshape(-1, 2))
        steps.append(np.full((columns.size, 1), stride))
    return np.concatenate(cells).astype(np.float64), np.concatenate(steps).astype(np.float64)
