"""Defines `Extras`: what a row of the YOLO families holds behind its box and its scores, and how that is read.

    mask = coefficients @ prototypes > 0, inside the box     keypoints: x, y and a score of each     angle: radians

Ultralytics' programs write into their files what a network is for. That is believed first; without it, the number of
columns and the other outputs tell.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64
from qconv.decoding.head import NetworkFacts, OutputPart, read_class_names


@dataclass(frozen=True, slots=True)
class Statement:
    """What Ultralytics' programs say of a network in its file.

    task: as "detect", "segment", "pose" or "obb"; empty where the file says nothing. names: of classes. keypoints: how
    many, and how many numbers each has. end_to_end: whether boxes need no suppression. head: the class of the last
    layer.
    """

    task: str = ""
    names: Mapping[int, str] = field(default_factory=dict)
    keypoints: tuple[int, int] = (0, 0)
    end_to_end: bool = False
    head: str = ""

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Statement:
        """Read from the metadata of a file."""
        names = read_class_names(metadata)
        end_to_end = metadata.get("end2end") == "True"
        keypoints = _read_keypoints(metadata.get("kpt_shape", ""))
        return cls(metadata.get("task", ""), names, keypoints, end_to_end, metadata.get("head", ""))


def _read_keypoints(text: str) -> tuple[int, int]:
    try:
        count, numbers = ast.literal_eval(text)
        return int(count), int(numbers)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return 0, 0


@dataclass(frozen=True, slots=True)
class Extras:
    """Columns behind box and scores: one of these kinds, or none.

    prototypes: the output that holds them, (N, coefficients, h, w). keypoints: how many, and how many numbers each has.
    """

    prototypes: str = ""
    coefficients: int = 0
    keypoints: tuple[int, int] = (0, 0)
    angle: bool = False

    @property
    def in_words(self) -> str:
        """What they are, to go behind other words."""
        if self.coefficients:
            return f", {self.coefficients} mask coefficients"
        if self.keypoints[0]:
            return f", {self.keypoints[0]} keypoints"
        return ", an angle" if self.angle else ""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Other outputs that are read with the rows."""
        return (self.prototypes,) if self.prototypes else ()

    def parts(self, axis: int, start: int) -> tuple[OutputPart, ...]:
        """The columns from `start` on, as parts of an output."""
        if self.coefficients:
            return (OutputPart("mask coefficients", axis, start),)
        if self.angle:
            return (OutputPart("angle", axis, start),)
        step = self.keypoints[1]
        names = ("keypoints x", "keypoints y", "keypoint scores")[:step]
        return tuple(OutputPart(name, axis, start + index, None, step) for index, name in enumerate(names))

    def attach(
        self, found: Detections, columns: NDArray[Any], prototypes: NDArray[Any] | None, size: tuple[int, int]
    ) -> Detections:
        """Detections with masks or keypoints. columns: of each detection, (N, C). prototypes: of the image, (C, h, w).

        size: height and width of the network's input. A keypoint without a score gets 1.
        """
        if prototypes is not None:
            return replace(found, masks=masks_of(columns, prototypes, found.boxes, size))
        if self.keypoints[0]:
            points = columns.astype(np.float64).reshape(len(found), *self.keypoints)
            if self.keypoints[1] == 2:
                points = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)
            return replace(found, keypoints=points)
        return found


def tell_extras(facts: NetworkFacts, stated: Statement, width: int) -> Extras | None:
    """What so many columns behind box and scores are; None where they are none of the known kinds."""
    if width == 0:
        return Extras()
    if stated.task in ("", "segment"):
        for name in facts.outputs:
            shape = facts.shape_of(name)
            if facts.is_float(name) and len(shape) == 4 and shape[1] == width:
                return Extras(name, width)
    if stated.task in ("", "obb") and width == 1:
        return Extras(angle=True)
    if stated.task in ("", "pose"):
        stands = stated.keypoints if stated.task else (width // 3, 3)
        if stands[0] * stands[1] == width and stands[1] in (2, 3):
            return Extras(keypoints=stands)
    return None


def masks_of(
    coefficients: NDArray[Any], prototypes: NDArray[Any], boxes: Float64, size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Masks of objects on the grid of the prototypes (Bolya et al. 2019, arXiv 1904.02689), (N, h, w).

    coefficients: (N, C). prototypes: (C, h, w). boxes: by edges, in pixels of an input of this height and width.
    """
    count, height, width = prototypes.shape
    found: NDArray[np.bool_] = (coefficients @ prototypes.reshape(count, -1) > 0).reshape(-1, height, width)
    scaled = boxes * (np.array([width, height] * 2) / np.array([size[1], size[0]] * 2))
    left, top, right, bottom = (edge[:, None] for edge in scaled.T)
    columns, rows = np.arange(width), np.arange(height)
    found &= ((columns >= left) & (columns < right))[:, None, :]
    found &= ((rows >= top) & (rows < bottom))[:, :, None]
    return found
