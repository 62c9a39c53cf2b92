"""Compares what two detectors find in the same images: how many of the float model's boxes the other one finds.

    boxes = float's boxes that are found / float's boxes

A box counts from the score on that programs of its family show it. It is found where the other model shows one of its
class that overlaps it by an IoU of 0.5 or more; each box finds one, the highest scores first.

Where faster-coco-eval is installed, of the extra qconv[detect], the same boxes serve as labels, too, of which the other
model's boxes have an average precision (`average_precision`). Of a class in a picture 100 are labels, as so many boxes
are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qconv.data.box_labels import BoxLabels
from qconv.decoding.boxes import MOST_BOXES, Detections, pairwise_iou
from qconv.decoding.head import Head
from qconv.errors import QconvError
from qconv.metrics.average_precision import MOST_OF_A_CLASS, AveragePrecision, require_detect_extra
from qconv.metrics.similarity import bootstrap_interval
from qconv.results.scores import BOXES, FLOAT_MAP, MAP, Score, find_score

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


def as_labels(shown: Detections) -> BoxLabels:
    """Boxes of the float model, by falling score, as labels: those that have an area, MOST_OF_A_CLASS of each class."""
    ranks = np.array([(shown.classes[:place] == number).sum() for place, number in enumerate(shown.classes)], np.int64)
    areas = (shown.boxes[:, 2:] - shown.boxes[:, :2]).clip(0).prod(axis=1)
    kept = shown.select((ranks < MOST_OF_A_CLASS) & (areas > 0))
    return BoxLabels.of(kept.boxes, kept.classes)


def _start_precision() -> AveragePrecision | None:
    """None where the extra is not installed."""
    try:
        require_detect_extra()
    except QconvError:
        return None
    return AveragePrecision()


@dataclass(slots=True)
class DetectionComparison:
    """Adds up what two models find, batch by batch.

    rows: boxes that are found, and boxes of the float model, of each image. precision: of these as labels; None where
    it cannot be computed.
    """

    head: Head
    rows: list[tuple[int, int]] = field(default_factory=list)
    precision: AveragePrecision | None = field(default_factory=_start_precision)

    def update(self, reference: Sequence[Detections], got: Sequence[Detections]) -> None:
        """Take in what was read of a batch, from LEAST_SCORE on."""
        for own, other in zip(reference, got, strict=True):
            shown = own.above(self.head.usual_score)
            if self.precision is not None:
                self.precision.add(other.select(slice(0, MOST_BOXES)), as_labels(shown.select(slice(0, MOST_BOXES))))
            self.rows.append((count_found(shown, other.above(self.head.usual_score)), len(shown)))

    def scores(self, *, spans: bool) -> tuple[Score, ...]:
        """What was measured; without a number where the float model finds nothing in any image."""
        found, whole = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0, 0)
        if not whole:
            return (Score(BOXES, None),)
        rows = np.array(self.rows, np.float64)
        span = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return (Score(BOXES, found / whole, span, whole), *self._precision_score(spans=spans))

    def _precision_score(self, *, spans: bool) -> tuple[Score, ...]:
        """mAP beside the float model's boxes; nothing where it cannot be computed."""
        value = None if self.precision is None else self.precision.values[MAP]
        if self.precision is None or value is None:
            return ()
        measured = find_score(self.precision.scores(), MAP) if spans else None
        whole = value > 1 - 1e-9  # COCO's precision of boxes that are all right falls short of 1 by rounding
        return (Score(FLOAT_MAP, 1.0 if whole else value, None if measured is None else measured.interval),)
