"""Decodes YOLOv8, v9, v11, v12 and others that Ultralytics' programs write: rows of 4 + C numbers, one a cell.

    (N, 4 + C + extras, A), or transposed: centre, width and height in pixels, scores behind a sigmoid

Extras are mask coefficients, keypoints or an angle. Boxes are suppressed as by Ultralytics' validators: each class that
reaches the score counts, class by class, at an IoU of 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, corners_of, find_boxes, find_strides
from qconv.decoding.extras import Extras, Statement, tell_extras
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.rotated import find_rotated

IOU = 0.7

WIDTH_OF_COCO = 84
"""Columns that are 4 + 80 rather than 5 + 79, where rows are no channels and the file says nothing."""


def match(facts: NetworkFacts) -> Head | None:
    """The head of such a network; None for others."""
    stated = Statement.of(facts.metadata)
    if stated.end_to_end:
        return None
    for name, array in facts.outputs.items():
        if facts.is_float(name) and array.ndim == 3:
            for axis in (1, 2):
                if (found := _match_rows(facts, stated, name, axis)) is not None:
                    return found
    return None


def _match_rows(facts: NetworkFacts, stated: Statement, name: str, axis: int) -> Head | None:
    """axis: along which the numbers of a row lie."""
    array = facts.outputs[name]
    width, rows = array.shape[axis], array.shape[3 - axis]
    strides = find_strides(facts.size, rows)
    if strides is None or width < 5 or (axis == 2 and not stated.task and width != WIDTH_OF_COCO):
        return None
    columns = np.moveaxis(array, axis, 0).reshape(width, -1)
    classes = len(stated.names) if stated.task else _count_classes(columns)
    extras = tell_extras(facts, stated, width - 4 - classes)
    if extras is None or not classes or not _are_scores(columns[4 : 4 + classes]) or columns[:4].max() <= 1:
        return None
    where = f"{rows} rows are the cells of strides {', '.join(map(str, strides))} at {facts.size[0]}x{facts.size[1]}"
    task = f", and the file says task {stated.task}" if stated.task else ""
    scores = OutputPart("scores", axis, 4, 4 + classes)
    parts = (OutputPart("boxes", axis, 0, 4, sure=scores), scores)
    return Head(
        "YOLOv8",
        f"{where}, with a box and {classes} classes{extras.in_words}{task}",
        (name, *extras.outputs),
        _CellDecoder(facts.size, axis, classes, extras),
        facts.size,
        0.25,
        stated.names,
        {name: (*parts, *extras.parts(axis, 4 + classes))},
    )


def _are_scores(columns: NDArray[Any]) -> bool:
    return bool(columns.min() >= 0 and columns.max() <= 1)


def _count_classes(columns: NDArray[Any]) -> int:
    """How many columns behind the box hold nothing but numbers from 0 to 1, up to the first that does not."""
    beyond = columns[4:]
    others = np.flatnonzero((beyond.min(axis=1) < 0) | (beyond.max(axis=1) > 1))
    return int(others[0]) if others.size else len(beyond)


@dataclass(frozen=True, slots=True)
class _CellDecoder:
    size: tuple[int, int]
    axis: int
    classes: int
    extras: Extras

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        rows = arrays[0] if self.axis == 2 else arrays[0].transpose(0, 2, 1)
        return [
            self._find(image, arrays[1][index] if self.extras.prototypes else None, least)
            for index, image in enumerate(rows)
        ]

    def _find(self, rows: NDArray[Any], prototypes: NDArray[Any] | None, least: float) -> Detections:
        """What the rows (A, 4 + C + extras) of one image say."""
        box, scores, beyond = np.split(rows, (4, 4 + self.classes), axis=1)
        if self.extras.angle:
            return find_rotated(np.concatenate([box, beyond], axis=1), scores, least, IOU)
        places, found = find_boxes(corners_of(box[:, :2], box[:, 2:]), scores, least, IOU)
        return self.extras.attach(found, beyond[places], prototypes, self.size)
