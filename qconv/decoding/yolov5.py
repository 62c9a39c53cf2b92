"""Decodes YOLOv5 and YOLOv7 (Wang et al. 2022, arXiv 2207.02696): three rows a cell, each with an anchor of its own.

    centre = (2 sigmoid(xy) - 0.5 + cell) * stride    size = (2 sigmoid(wh))^2 * anchor    score = objectness * class

Exported with its decoding, a network gives one output (N, A, 5 + C), centre and size in pixels, the rest behind a
sigmoid; its segmenters have mask coefficients besides. Without it, it gives a map for each stride, as the layers are:
(N, 3, H, W, 5 + C) or (N, 3 (5 + C), H, W). A file does not hold anchors then. Those of YOLOv5 are taken, on which
YOLOv7-tiny was trained too; YOLOv7's own are 1.2 times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, corners_of, find_boxes, find_strides, sigmoid
from qconv.decoding.extras import Extras, Statement, tell_extras
from qconv.decoding.head import Head, NetworkFacts, OutputPart

IOU = 0.6

ANCHORS_A_CELL = 3

ANCHORS = {
    (8, 16, 32): (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    ),
    (8, 16, 32, 64): (
        ((19, 27), (44, 40), (38, 94)),
        ((96, 68), (86, 152), (180, 137)),
        ((140, 301), (303, 264), (238, 542)),
        ((436, 615), (739, 380), (925, 792)),
    ),
}
"""Width and height of the anchors of each stride, in pixels."""

MOST_USUAL_LOGIT = -2.0
"""What the median of objectness logits does not exceed: nearly all cells are background."""


def match(facts: NetworkFacts) -> Head | None:
    """The head of such a network; None for others."""
    found = (_match_rows(facts, name) for name in facts.outputs)
    return next((head for head in found if head is not None), None) or _match_maps(facts)


def _match_rows(facts: NetworkFacts, name: str) -> Head | None:
    array, stated = facts.outputs[name], Statement.of(facts.metadata)
    if not facts.is_float(name) or array.ndim != 3 or array.shape[2] < 6:
        return None
    strides = find_strides(facts.size, array.shape[1], ANCHORS_A_CELL)
    if strides is None or array[..., 2:4].max() <= 1 or array[..., 4].min() < 0 or array[..., 4].max() > 1:
        return None
    classes = len(stated.names) or array.shape[2] - 5 - _count_prototypes(facts)
    extras = tell_extras(facts, stated, array.shape[2] - 5 - classes)
    if extras is None or extras.angle or extras.keypoints[0]:
        return None
    where = f"three times the cells of strides {', '.join(map(str, strides))} at {facts.size[0]}x{facts.size[1]}"
    what = f"a box in pixels, objectness and {classes} classes{extras.in_words}"
    return Head(
        "YOLOv5/v7",
        f"{array.shape[1]} rows are {where}, with {what}",
        (name, *extras.outputs),
        _RowDecoder(facts.size, classes, extras),
        facts.size,
        0.25,
        stated.names,
        {name: (*_parts_of_rows(classes), *extras.parts(2, 5 + classes))},
    )


def _count_prototypes(facts: NetworkFacts) -> int:
    """Channels of a map of a quarter of the input's size; 0 where there is none."""
    quarter = (facts.size[0] // 4, facts.size[1] // 4)
    shapes = (facts.shape_of(name) for name in facts.outputs if facts.is_float(name))
    return next((shape[1] for shape in shapes if len(shape) == 4 and shape[2:] == quarter), 0)


def _parts_of_rows(classes: int) -> tuple[OutputPart, ...]:
    scores = OutputPart("scores", 2, 5, 5 + classes, times=OutputPart("objectness", 2, 4, 5))
    return OutputPart("boxes", 2, 0, 4, sure=scores), scores


def _parts_of_maps(axis: int, classes: int, rows: int) -> tuple[OutputPart, ...]:
    """Of numbers as the layers give them. rows: how many lie behind each other along the axis."""
    ends = (("boxes", 0, 4), ("objectness", 4, 5), ("scores", 5, 5 + classes))
    firsts = range(0, rows * (5 + classes), 5 + classes)
    return tuple(OutputPart(name, axis, first + start, first + stop) for first in firsts for name, start, stop in ends)


def _match_maps(facts: NetworkFacts) -> Head | None:
    grids = {name: _as_grid(facts, name) for name in facts.outputs}
    maps = {name: grid for name, grid in grids.items() if grid is not None}
    for strides, anchors in ANCHORS.items():
        sizes = [(facts.size[0] // stride, facts.size[1] // stride) for stride in strides]
        names = [next((name for name, grid in maps.items() if grid.shape[2:4] == size), "") for size in sizes]
        if "" in names or len(maps) != len(strides) or len({maps[name].shape[4] for name in names}) > 1:
            continue
        if any(np.median(maps[name][..., 4]) > MOST_USUAL_LOGIT for name in names):
            continue
        classes = maps[names[0]].shape[4] - 5
        flat = facts.outputs[names[0]].ndim == 4
        where = f"maps of strides {', '.join(map(str, strides))} at {facts.size[0]}x{facts.size[1]}"
        what = f"three boxes a cell, objectness and {classes} classes as the layers give them"
        return Head(
            "YOLOv5/v7",
            f"{where} hold {what}; anchors are taken to be those of YOLOv5",
            tuple(names),
            _MapDecoder(facts.size, strides, anchors),
            facts.size,
            0.25,
            Statement.of(facts.metadata).names,
            dict.fromkeys(names, _parts_of_maps(1, classes, ANCHORS_A_CELL) if flat else _parts_of_maps(4, classes, 1)),
        )
    return None


def _as_grid(facts: NetworkFacts, name: str) -> NDArray[Any] | None:
    """An output as (N, 3, H, W, 5 + C); None where it has no such shape."""
    array = facts.outputs[name]
    if not facts.is_float(name):
        return None
    if array.ndim == 4 and array.shape[1] % ANCHORS_A_CELL == 0:
        array = _split_channels(array)
    right = array.ndim == 5 and array.shape[1] == ANCHORS_A_CELL and array.shape[4] >= 6
    return array if right else None


def _split_channels(array: NDArray[Any]) -> NDArray[Any]:
    count, channels, *size = array.shape
    return np.moveaxis(array.reshape(count, ANCHORS_A_CELL, channels // ANCHORS_A_CELL, *size), 2, -1)


@dataclass(frozen=True, slots=True)
class _RowDecoder:
    size: tuple[int, int]
    classes: int
    extras: Extras

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        found = []
        for index, rows in enumerate(arrays[0]):
            places, detections = find_in_rows(rows[:, : 5 + self.classes], least)
            prototypes = arrays[1][index] if self.extras.prototypes else None
            found.append(self.extras.attach(detections, rows[places, 5 + self.classes :], prototypes, self.size))
        return found


def find_in_rows(rows: NDArray[Any], least: float) -> tuple[NDArray[np.int64], Detections]:
    """What rows (A, 5 + C) of centre, size, objectness and classes say: the row of each detection, and these."""
    able = np.flatnonzero(rows[:, 4] > least)  # a product of shares exceeds neither
    rows = rows[able]
    places, found = find_boxes(corners_of(rows[:, :2], rows[:, 2:4]), rows[:, 4:5] * rows[:, 5:], least, IOU)
    return able[places], found


@dataclass(frozen=True, slots=True)
class _MapDecoder:
    size: tuple[int, int]
    strides: tuple[int, ...]
    anchors: tuple[tuple[tuple[int, int], ...], ...]

    def __call__(self, arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        maps = [array if array.ndim == 5 else _split_channels(array) for array in arrays]
        return [self._find([grid[index] for grid in maps], least) for index in range(len(maps[0]))]

    def _find(self, maps: Sequence[NDArray[Any]], least: float) -> Detections:
        """What the maps (3, H, W, 5 + C) of one image say."""
        rows = []
        for grid, stride, sizes in zip(maps, self.strides, self.anchors, strict=True):
            anchor, row, column = np.nonzero(sigmoid(grid[..., 4]) > least)
            said = sigmoid(grid[anchor, row, column])
            said[:, :2] = (2 * said[:, :2] - 0.5 + np.stack([column, row], axis=1)) * stride
            said[:, 2:4] = (2 * said[:, 2:4]) ** 2 * np.array(sizes)[anchor]
            rows.append(said)
        return find_in_rows(np.concatenate(rows), least)[1]
