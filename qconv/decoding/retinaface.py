"""Decodes RetinaFace (Deng et al. 2019, arXiv 1905.00641; biubug6/Pytorch_Retinaface) and UltraFace as it is trained.

RetinaFace has outputs (N, A, 4), (N, A, 2) and (N, A, 10): deltas of priors, background and face, and deltas of five
points. UltraFace has the first two. A counts the priors, two or three squares for each cell. Scores are behind a
softmax, or still in front of it, as their numbers tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, find_boxes, softmax
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.priors import PriorGrid, Size, cells_by_stride, move_points, move_priors, tile_priors

DELTA_PARTS = (OutputPart("centres", 2, 0, 2), OutputPart("sizes", 2, 2, 4))

SCORE_PARTS = (OutputPart("background", 2, 0, 1), OutputPart("scores", 2, 1))


@dataclass(frozen=True, slots=True)
class FaceFamily:
    """A family of face detectors. sides: of the squares of a cell, in pixels, by stride. points: how many a face has.

    fills: whether cells are a share of the image, and no multiple of the stride; sizes then end at the image's.
    """

    name: str
    sides: dict[int, tuple[int, ...]]
    points: int
    fills: bool
    usual_score: float
    nms_iou: float

    def make_priors(self, size: Size) -> Float64:
        """The priors for an image of this height and width, (A, 4)."""
        grids = []
        for stride, sides in self.sides.items():
            shapes = np.array(sides)[:, None] / np.array([size[1], size[0]])
            step = None if self.fills else (stride / size[0], stride / size[1])
            cells = cells_by_stride(size, stride)
            grids.append(PriorGrid(cells, np.minimum(shapes, 1) if self.fills else shapes, step))
        return tile_priors(grids)


RETINAFACE = FaceFamily("RetinaFace", {8: (16, 32), 16: (64, 128), 32: (256, 512)}, 5, False, 0.6, 0.4)

ULTRAFACE = FaceFamily(
    "UltraFace", {8: (10, 16, 24), 16: (32, 48), 32: (64, 96), 64: (128, 192, 256)}, 0, True, 0.7, 0.5
)


def match(facts: NetworkFacts) -> Head | None:
    """The head of a network of either family; None for others."""
    if any(len(facts.shape_of(name)) != 3 or not facts.is_float(name) for name in facts.outputs):
        return None
    by_width = {facts.shape_of(name)[2]: name for name in facts.outputs}
    for family in (RETINAFACE, ULTRAFACE):
        widths = (4, 2, 2 * family.points) if family.points else (4, 2)
        if set(by_width) != set(widths) or len(facts.outputs) != len(widths):
            continue
        outputs = tuple(by_width[width] for width in widths)
        priors = family.make_priors(facts.size)
        if any(facts.shape_of(name)[1] != len(priors) for name in outputs):
            continue
        return _make_head(facts, family, outputs, priors)
    return None


def _make_head(facts: NetworkFacts, family: FaceFamily, outputs: tuple[str, ...], priors: Float64) -> Head:
    sums = facts.outputs[outputs[1]].sum(axis=2)
    raw = not np.allclose(sums, 1, atol=1e-3)
    form = "in front of its softmax" if raw else "behind a softmax"
    points = f" and {family.points} keypoints" if family.points else ""
    strides = ", ".join(map(str, family.sides))
    why = (
        f"deltas{points} of {len(priors)} priors, which are squares in cells of {strides} pixels, and a face's score "
        f"{form} for each"
    )
    decode = partial(_decode, family=family, priors=priors, size=facts.size, raw=raw)
    # in front of a softmax, how sure a face is hangs on two columns
    sure = None if raw else OutputPart("scores", 2, 1, tensor=outputs[1])
    deltas = tuple(replace(part, sure=sure) for part in DELTA_PARTS)
    points_part = (OutputPart("keypoints", 2, sure=sure),)
    parts = {outputs[0]: deltas, outputs[1]: SCORE_PARTS} | dict.fromkeys(outputs[2:], points_part)
    return Head(family.name, why, outputs, decode, facts.size, family.usual_score, parts=parts)


def _decode(
    arrays: Sequence[NDArray[Any]], least: float, *, family: FaceFamily, priors: Float64, size: Size, raw: bool
) -> list[Detections]:
    scores = softmax(arrays[1], axis=2) if raw else arrays[1].astype(np.float64)
    found = []
    for index, face in enumerate(scores[..., 1:]):
        boxes = move_priors(priors, arrays[0][index].astype(np.float64), size)
        rows, detections = find_boxes(boxes, face, least, family.nms_iou)
        if family.points:
            points = move_points(priors[rows], arrays[2][index].astype(np.float64)[rows], size)
            detections = replace(detections, keypoints=points)
        found.append(detections)
    return found
