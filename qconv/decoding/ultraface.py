"""Decodes UltraFace as it is exported (Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB), and other SSDs in its form.

Outputs are scores (N, A, 1 + C), background first, behind a softmax, and boxes (N, A, 4): left, top, right and bottom
as shares of the image, decoded and not yet suppressed. The exporter of qfgaohao/pytorch-ssd writes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, find_boxes
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import Size, scale_boxes
from qconv.decoding.retinaface import SCORE_PARTS, ULTRAFACE

NMS_IOU = 0.45

USUAL_SCORE = 0.4

FARTHEST = 4.0
"""Share of the image beyond which no corner lies: a prior that sticks out, and a box of three times its size."""


def match(facts: NetworkFacts) -> Head | None:
    """The head of a network with outputs of this form; None for others."""
    if len(facts.outputs) != 2:
        return None
    names = sorted(facts.outputs, key=lambda name: facts.shape_of(name)[-1:] == (4,))
    (scores, shape), (boxes, box_shape) = ((name, facts.shape_of(name)) for name in names)
    if len(shape) != 3 or box_shape != (*shape[:2], 4) or shape[2] < 2:
        return None
    if not (facts.is_float(scores) and facts.is_float(boxes)):
        return None
    shares, corners = facts.outputs[scores], facts.outputs[boxes]
    if shares.min(initial=0.0) < 0 or not np.allclose(shares.sum(axis=2), 1, atol=1e-3):
        return None
    if not (corners[..., 2:] >= corners[..., :2]).all() or np.abs(corners).max(initial=0.0) > FARTHEST:
        return None
    faces = shape[2] == 2 and shape[1] == len(ULTRAFACE.make_priors(facts.size))
    usual, iou = (ULTRAFACE.usual_score, ULTRAFACE.nms_iou) if faces else (USUAL_SCORE, NMS_IOU)
    why = f"{shape[1]} boxes by corners, as shares of the image, and scores of {shape[2] - 1} classes and background"
    decode = partial(_decode, size=facts.size, iou=iou)
    parts = {scores: SCORE_PARTS, boxes: (OutputPart("boxes", 2, sure=OutputPart("scores", 2, 1, tensor=scores)),)}
    family, known = "UltraFace" if faces else "SSD", read_class_names(facts.metadata)
    return Head(family, why, (scores, boxes), decode, facts.size, usual, known, parts)


def _decode(arrays: Sequence[NDArray[Any]], least: float, *, size: Size, iou: float) -> list[Detections]:
    found = []
    for scores, shares in zip(*(array.astype(np.float64) for array in arrays), strict=True):
        found.append(find_boxes(scale_boxes(shares, size), scores[:, 1:], least, iou)[1])
    return found
