"""Decodes YOLOv10, YOLO26 and others that need no suppression: rows of box, score, class, the highest scores first.

    (N, M, 6 + extras): left, top, right, bottom in pixels, score behind a sigmoid, number of the class

Extras are mask coefficients, keypoints or an angle; with an angle the box is centre, width and height. Ultralytics'
programs write the same form where they put suppression into the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.extras import Extras, Statement, tell_extras
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.rotated import with_corners

MOST_ROWS = 1000
"""Rows of one image that an output without a statement can have."""

TASKS = ("detect", "segment", "pose", "obb")


def match(facts: NetworkFacts) -> Head | None:
    """The head of such a network; None for others."""
    stated = Statement.of(facts.metadata)
    for name, array in facts.outputs.items():
        if not facts.is_float(name) or array.ndim != 3 or array.shape[2] < 6:
            continue
        extras = tell_extras(facts, stated, array.shape[2] - 6)
        if extras is None or not (has_classes(array) and (stated.task in TASKS or is_in_pixels(array))):
            continue
        task = f", and the file says task {stated.task}" if stated.task else " as their scores and classes look"
        scores = OutputPart("scores", 2, 4, 5)
        parts = (OutputPart("boxes", 2, 0, 4, sure=scores), scores, OutputPart("classes", 2, 5, 6))
        return Head(
            "YOLOv10/26",
            f"{array.shape[1]} rows are boxes without overlaps{extras.in_words}{task}",
            (name, *extras.outputs),
            _EndToEndDecoder(facts.size, extras),
            facts.size,
            0.25,
            stated.names,
            {name: (*parts, *extras.parts(2, 6))},
        )
    return None


def has_classes(array: NDArray[Any]) -> bool:
    """Whether rows (N, M, 6 or more) have a score from 0 to 1, falling from row to row, and then a whole number."""
    scores, classes = array[..., 4], array[..., 5]
    falling = (np.diff(scores, axis=1) <= 0).all() and scores.min() >= 0 and scores.max() <= 1
    return bool(falling and (classes >= 0).all() and (classes == np.round(classes)).all())


def is_in_pixels(array: NDArray[Any]) -> bool:
    """Whether rows (N, M, 6 or more), not too many, start with boxes in pixels."""
    return array.shape[1] <= MOST_ROWS and bool(array[..., :4].max() > 1)


@dataclass(frozen=True, slots=True)
class _EndToEndDecoder:
    size: tuple[int, int]
    extras: Extras

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        return [
            self._find(rows, arrays[1][index] if self.extras.prototypes else None, least)
            for index, rows in enumerate(arrays[0])
        ]

    def _find(self, rows: NDArray[Any], prototypes: NDArray[Any] | None, least: float) -> Detections:
        """What the rows (M, 6 + extras) of one image say."""
        rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
        rows = rows[rows[:, 4] > least]
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        box, score, number, beyond = np.split(rows, (4, 5, 6), axis=1)
        scores, classes = score[:, 0], np.round(number[:, 0]).astype(np.int64)
        if self.extras.angle:
            return with_corners(np.concatenate([box, beyond], axis=1), scores, classes)
        return self.extras.attach(Detections(box, scores, classes), beyond, prototypes, self.size)
