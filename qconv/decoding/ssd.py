"""Decodes SSD (Liu et al. 2016, arXiv 1512.02325) in front of its suppression: deltas of priors, and classes for each.

Outputs are deltas (N, A, 4) and scores (N, A, 1 + C), background first. No output tells the priors: they are those of
published networks, known by their number at the size of the input.

    TensorFlow      MobileNet backbones with strides from 16 on, and the ratios 1, 2, 1/2, 3, 1/3 in this order, as in
                    published configurations; deltas of y, x, height and width; logits for a sigmoid
    torchvision     ssdlite320_mobilenet_v3_large and ssd300_vgg16; deltas of x, y, width and height; for a softmax

Scores may already be behind their sigmoid or softmax. Priors of other backbones are not known. TensorFlow's networks of
before August 2017 have the larger square second and not last: their boxes are right in the finest grid alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, Float64, pick_candidates, sigmoid, softmax
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import PriorGrid, Size, halve_cells, move_priors, tile_priors
from qconv.decoding.retinaface import SCORE_PARTS

USUAL_SCORE = 0.5


@dataclass(frozen=True, slots=True)
class SsdFamily:
    """A way to make and to read priors.

    make_priors: of the size of the input; none where the family has no such input. rows_first: y before x, and height
    before width. squash: what makes scores of logits. nms_iou: overlap above which the weaker box is dropped.
    """

    name: str
    make_priors: Callable[[Size], Sequence[PriorGrid]]
    rows_first: bool
    squash: Callable[[NDArray[Any]], Float64]
    nms_iou: float


def spread_scales(least: float, most: float, count: int) -> Float64:
    """Sizes of priors in a row of grids, at equal distances, and 1 behind them, (count + 1,)."""
    return np.append(np.linspace(least, most, count), 1.0)


def shape_priors(scale: float, following: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Width and height of the priors of a cell: a square, a larger one, then each ratio lying and standing."""
    larger = (scale * following) ** 0.5
    pairs = [(scale, scale), (larger, larger)]
    for ratio in ratios:
        long, short = scale * ratio**0.5, scale / ratio**0.5
        pairs += [(long, short), (short, long)]
    return pairs


def _make_tensorflow_priors(size: Size) -> list[PriorGrid]:
    """MultipleGridAnchorGenerator with the numbers of the published MobileNet networks."""
    scales = spread_scales(0.2, 0.95, 6)
    cells = halve_cells((-(-size[0] // 16), -(-size[1] // 16)), 5)
    short = min(size)
    grids = []
    for index, grid in enumerate(cells):
        scale, following = scales[index], scales[index + 1]
        (square, larger, *others) = shape_priors(scale, following, (2, 3))
        shapes = [square, *others, larger] if index else [(0.1, 0.1), *others[:2]]
        sides = np.array(shapes) * np.array([short / size[1], short / size[0]])
        grids.append(PriorGrid(grid, sides))
    return grids


def _make_ssdlite_priors(size: Size) -> list[PriorGrid]:
    scales = spread_scales(0.2, 0.95, 6)
    cells = halve_cells((-(-size[0] // 16), -(-size[1] // 16)), 5)
    shapes = [np.minimum(shape_priors(scales[i], scales[i + 1], (2, 3)), 1) for i in range(6)]
    return [PriorGrid(grid, shape) for grid, shape in zip(cells, shapes, strict=True)]


SSD300_GRIDS = ((38, 8, (2,)), (19, 16, (2, 3)), (10, 32, (2, 3)), (5, 64, (2, 3)), (3, 100, (2,)), (1, 300, (2,)))
"""Cells in a row, their step in pixels, and ratios."""

SSD300_SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
"""Of networks trained on COCO."""


def _make_ssd300_priors(size: Size) -> list[PriorGrid]:
    if size != (300, 300):
        return []
    grids = []
    for index, (count, step, ratios) in enumerate(SSD300_GRIDS):
        shapes = np.minimum(shape_priors(SSD300_SCALES[index], SSD300_SCALES[index + 1], ratios), 1)
        grids.append(PriorGrid((count, count), shapes, (step / 300, step / 300)))
    return grids


FAMILIES = (
    SsdFamily("SSD of TensorFlow", _make_tensorflow_priors, True, sigmoid, 0.6),
    SsdFamily("SSDLite of torchvision", _make_ssdlite_priors, False, partial(softmax, axis=-1), 0.55),
    SsdFamily("SSD300 of torchvision", _make_ssd300_priors, False, partial(softmax, axis=-1), 0.45),
)


def match(facts: NetworkFacts) -> Head | None:
    """The head of an SSD whose priors are known; None for others."""
    if len(facts.outputs) != 2:
        return None
    shapes = {name: tuple(n for n in facts.shape_of(name)[:2]) for name in facts.outputs}
    deltas = [name for name in facts.outputs if facts.shape_of(name)[2:] in ((4,), (1, 4)) and facts.is_float(name)]
    scores = [name for name in facts.outputs if len(facts.shape_of(name)) == 3 and facts.is_float(name)]
    if len(deltas) == 2:  # three classes: deltas are what joins TensorFlow's and torchvision's outputs first
        deltas = deltas[:1]
    scores = [name for name in scores if name not in deltas and facts.shape_of(name)[2] >= 2]
    if len(deltas) != 1 or len(scores) != 1 or shapes[deltas[0]] != shapes[scores[0]]:
        return None
    return _make_head(facts, deltas[0], scores[0])


def _make_head(facts: NetworkFacts, deltas: str, scores: str) -> Head | None:
    count, width = facts.shape_of(scores)[1:]
    for family in FAMILIES:
        grids = family.make_priors(facts.size)
        if sum(map(len, grids)) != count:
            continue
        values = facts.outputs[scores]
        raw = values.min(initial=0.0) < 0 or values.max(initial=0.0) > 1
        form = "logits" if raw else "scores"
        cells = ", ".join(f"{grid.cells[0]}x{grid.cells[1]}" for grid in grids)
        why = f"deltas of {count} priors, in cells of {cells}, and {form} of {width - 1} classes and background"
        priors = tile_priors(grids)
        by_softmax = raw and family.squash is not sigmoid  # how sure a class is then hangs on all columns
        sure = None if by_softmax else OutputPart("scores", 2, 1, tensor=scores, places=1)
        decode = partial(_decode, family=family, priors=priors, size=facts.size, raw=bool(raw))
        parts = {deltas: _name_parts(len(facts.shape_of(deltas)), sure), scores: SCORE_PARTS}
        names = read_class_names(facts.metadata)
        return Head(family.name, why, (deltas, scores), decode, facts.size, USUAL_SCORE, names, parts)
    return None


def _name_parts(axes: int, sure: OutputPart | None) -> tuple[OutputPart, ...]:
    return OutputPart("centres", axes - 1, 0, 2, sure=sure), OutputPart("sizes", axes - 1, 2, 4, sure=sure)


def _decode(
    arrays: Sequence[NDArray[Any]], least: float, *, family: SsdFamily, priors: Float64, size: Size, raw: bool
) -> list[Detections]:
    order = [1, 0, 3, 2] if family.rows_first else [0, 1, 2, 3]
    scores = family.squash(arrays[1]) if raw else arrays[1].astype(np.float64)
    found = []
    for deltas, values in zip(arrays[0].astype(np.float64), scores, strict=True):
        boxes = move_priors(priors, deltas.reshape(-1, 4)[:, order], size)
        picked = pick_candidates(boxes, values[:, 1:], least)[1]
        found.append(picked.clipped(size[1], size[0]).suppressed(family.nms_iou))
    return found
