"""Reads boxes that the network itself has decoded and suppressed, as SSD and other detectors are exported with it.

    TensorFlow        detection_boxes (N, K, 4), detection_classes, detection_scores (N, K) and num_detections (N,), by
                      these names, or as TFLite_Detection_PostProcess has them: top, left, bottom, right as shares
    torchvision       boxes (K, 4) in pixels, labels (K,) and scores (K,) of one image; masks and points may follow
    EfficientNMS      num_dets (N, 1), boxes (N, K, 4), scores (N, K) and classes (N, K), as of TensorRT's operator
    MMDeploy          boxes with their scores (N, K, 5) in pixels, and labels (N, K)

Other boxes are left, top, right and bottom: in pixels, or as shares of the image where none exceeds 2. Classes keep the
numbers that the file gives them, so that TensorFlow's and torchvision's begin at 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head, NetworkFacts, OutputPart, read_class_names
from qconv.decoding.priors import Size, scale_boxes

USUAL_SCORE = 0.5

LARGEST_SHARE = 2.0

TENSORFLOW_NAMES = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")


def match(facts: NetworkFacts) -> Head | None:
    """The head of a network with such outputs; None for others."""
    return _match_tensorflow(facts) or _match_batched(facts) or _match_torchvision(facts) or _match_mmdeploy(facts)


def _match_tensorflow(facts: NetworkFacts) -> Head | None:
    found = [next((n for n in facts.outputs if n.split(":")[0] == name), "") for name in TENSORFLOW_NAMES]
    if "" in found or len(facts.shape_of(found[0])) != 3:
        return None
    why = "outputs with the names of TensorFlow's Object Detection API, whose boxes are shares of the image, top first"
    return _make_head(facts, "boxes of TensorFlow", why, found, rows_first=True, shares=True)


def _match_batched(facts: NetworkFacts) -> Head | None:
    """Three or four outputs: boxes (N, K, 4), scores and classes (N, K), and how many count."""
    boxes = [name for name in facts.outputs if len(facts.shape_of(name)) == 3 and facts.shape_of(name)[2] == 4]
    if len(boxes) != 1 or len(facts.outputs) not in (3, 4) or not facts.is_float(boxes[0]):
        return None
    batch, most, _ = facts.shape_of(boxes[0])
    pair = [name for name in facts.outputs if facts.shape_of(name) == (batch, most) and name != boxes[0]]
    count = [name for name in facts.outputs if name not in (*boxes, *pair)]
    if len(pair) == 3:  # one box alone: how many count stands first, or last
        count = [pair[-1] if next(iter(facts.outputs)) == boxes[0] else pair[0]]
        pair.remove(count[0])
    if len(pair) != 2 or any(facts.outputs[name].size != batch for name in count):
        return None
    labelled = _tell_scores(facts, pair)
    if labelled is None:
        return None
    scores, classes = labelled
    of_tflite = bool(count) and facts.is_float(count[0]) and facts.is_float(classes)
    numbers = facts.outputs[boxes[0]]
    shares = of_tflite or float(np.abs(numbers).max(initial=0.0)) <= LARGEST_SHARE
    if not (numbers[..., 2:] >= numbers[..., :2]).all():
        return None
    order = "top" if of_tflite else "left"
    unit = "as shares of the image" if shares else "in pixels"
    why = f"{most} boxes {unit}, {order} first, their scores, their classes{' and their number' if count else ''}"
    family = "boxes of TFLite" if of_tflite else "suppressed boxes"
    return _make_head(facts, family, why, [*boxes, scores, classes, *count], rows_first=of_tflite, shares=shares)


def _tell_scores(facts: NetworkFacts, pair: Sequence[str]) -> tuple[str, str] | None:
    """Which of two outputs holds scores, and which classes; None where neither can be so."""
    first, second = pair
    if facts.is_float(first) == facts.is_float(second):
        whole = [bool((facts.outputs[name] == np.rint(facts.outputs[name])).all()) for name in pair]
        named = "score" in first.lower()
        scores, classes = (first, second) if whole[0] < whole[1] or (all(whole) and named) else (second, first)
    else:
        scores, classes = (first, second) if facts.is_float(first) else (second, first)
    numbers, labels = facts.outputs[scores], facts.outputs[classes]
    right = facts.is_float(scores) and numbers.max(initial=0.0) <= 1 and (labels == np.rint(labels)).all()
    return (scores, classes) if right and numbers.min(initial=0.0) >= -1 else None


def _match_torchvision(facts: NetworkFacts) -> Head | None:
    boxes = [name for name in facts.outputs if facts.shape_of(name)[1:] == (4,) and facts.is_float(name)]
    if len(boxes) != 1:
        return None
    rows = facts.shape_of(boxes[0])
    flat = [name for name in facts.outputs if facts.shape_of(name) == rows[:1]]
    scores = [name for name in flat if facts.is_float(name)]
    labels = [name for name in flat if facts.outputs[name].dtype.kind in "iu"]
    if len(scores) != 1 or len(labels) != 1:
        return None
    numbers, edges = facts.outputs[scores[0]], facts.outputs[boxes[0]]
    if numbers.min(initial=0.0) < 0 or numbers.max(initial=0.0) > 1 or not (edges[:, 2:] >= edges[:, :2]).all():
        return None
    if (edges < 0).any() or (edges > np.array([facts.size[1], facts.size[0]] * 2)).any():  # they are cut off there
        return None
    why = "boxes (K, 4), labels (K,) and scores (K,) of one image, in pixels, as torchvision gives them"
    return _make_head(facts, "boxes of torchvision", why, [boxes[0], scores[0], labels[0]])


def _match_mmdeploy(facts: NetworkFacts) -> Head | None:
    boxes = [name for name in facts.outputs if len(facts.shape_of(name)) == 3 and facts.shape_of(name)[2] == 5]
    if len(boxes) != 1 or not facts.is_float(boxes[0]):
        return None
    rows = facts.shape_of(boxes[0])[:2]
    labels = [n for n in facts.outputs if facts.shape_of(n) == rows and facts.outputs[n].dtype.kind in "iu"]
    numbers = facts.outputs[boxes[0]]
    if len(labels) != 1 or numbers[..., 4].min(initial=0.0) < 0 or numbers[..., 4].max(initial=0.0) > 1:
        return None
    why = f"{rows[1]} boxes in pixels with their scores, and their labels, as MMDeploy gives them"
    scores = OutputPart("scores", 2, 4)
    parts = {boxes[0]: (OutputPart("boxes", 2, 0, 4, sure=scores), scores)}
    names = read_class_names(facts.metadata)
    found = (boxes[0], labels[0])
    return Head("boxes of MMDeploy", why, found, _decode_joined, facts.size, USUAL_SCORE, names, parts)


def _make_head(
    facts: NetworkFacts,
    family: str,
    why: str,
    outputs: Sequence[str],
    *,
    rows_first: bool = False,
    shares: bool = False,
) -> Head:
    size = facts.size if shares else (1, 1)
    decode = partial(_decode, size=size, rows_first=rows_first, batched=len(facts.shape_of(outputs[0])) == 3)
    names = read_class_names(facts.metadata)
    return Head(family, why, tuple(outputs), decode, facts.size, USUAL_SCORE, names)


def _decode(
    arrays: Sequence[NDArray[Any]], least: float, *, size: Size, rows_first: bool, batched: bool
) -> list[Detections]:
    boxes, scores, classes = arrays[:3] if batched else [array[None] for array in arrays[:3]]
    counts = np.maximum(np.rint(arrays[3]), 0).astype(np.int64).reshape(-1) if len(arrays) > 3 else [None] * len(boxes)
    order = [1, 0, 3, 2] if rows_first else [0, 1, 2, 3]
    found = []
    for edges, values, labels, count in zip(boxes, scores, classes, counts, strict=True):
        whole = Detections.of(scale_boxes(edges[:count, order], size), values[:count], np.rint(labels[:count]))
        found.append(whole.above(least))
    return found


def _decode_joined(arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
    return [Detections.of(rows[:, :4], rows[:, 4], labels).above(least) for rows, labels in zip(*arrays, strict=True)]
