"""Compares what two detectors find in the same images: how many of the float model's boxes the other one finds.

    boxes = float's boxes that are found / float's boxes

A box counts from the score on that programs of its family show it. It is found where the other model shows one of its
class that overlaps it by an IoU of 0.5 or more; each box finds one, the highest scores first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import LEAST_SCORE, Detections, pairwise_iou
from qconv.decoding.head import Head
from qconv.metrics.similarity import bootstrap_interval
from qconv.results.scores import BOXES, Score

FOUND_IOU = 0.5


def match_boxes(reference: Detections, got: Detections, iou: float = FOUND_IOU) -> NDArray[np.int64]:
    """Which box of `got` finds each box of `reference`, (N,); -1 for none. Both are sorted by falling score."""
    overlaps = pairwise_iou(reference.boxes, got.boxes)
    overlaps[reference.classes[:, None] != got.classes[None, :]] = 0
    left, found = np.ones(len(got), bool), np.full(len(reference), -1)
    for place, row in enumerate(overlaps):
        near = np.where(left, row, 0)
        if near.size and near.max() >= iou:
            found[place] = near.argmax()
            left[found[place]] = False
    return found


def count_found(reference: Detections, got: Detections, iou: float = FOUND_IOU) -> int:
    """How many of the boxes of `reference` are found in `got`. Both are sorted by falling score."""
    return int((match_boxes(reference, got, iou) >= 0).sum())


@dataclass(slots=True)
class DetectionComparison:
    """Adds up what two models find, batch by batch.

    rows: boxes that are found, and boxes of the float model, of each image.
    """

    head: Head
    rows: list[tuple[int, int]] = field(default_factory=list)

    def update(self, reference: Mapping[str, NDArray[Any]], got: Mapping[str, NDArray[Any]]) -> None:
        """Take in the outputs of a batch, by name."""
        sides = (self.head.read(reference, LEAST_SCORE), self.head.read(got, LEAST_SCORE))
        for own, other in zip(*sides, strict=True):
            shown = own.above(self.head.usual_score)
            self.rows.append((count_found(shown, other.above(self.head.usual_score)), len(shown)))

    def scores(self, *, spans: bool) -> tuple[Score, ...]:
        """What was measured; without a number where the float model finds nothing in any image."""
        found, whole = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0, 0)
        if not whole:
            return (Score(BOXES, None),)
        rows = np.array(self.rows, np.float64)
        span = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return (Score(BOXES, found / whole, span),)
