"""Decodes networks of the kind of DETR (Carion et al. 2020, arXiv 2005.12872): a set of queries, a box and scores each.

    two outputs     logits (N, Q, C) or (N, Q, C + 1), boxes (N, Q, 4): centre, width and height as shares of the input
    Ultralytics'    RT-DETR (N, Q, 4 + C), and since 8.4.47 (N, Q, 6) of box, score and class

DETR itself has a class for no object, the last one, and a softmax over all. Deformable DETR (arXiv 2010.04159), RT-DETR
(arXiv 2304.08069) and what followed them have a sigmoid for each class, and the Q highest of all scores count: a query
can be found with several classes. Nothing is suppressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import MOST_BOXES, Detections, corners_of, pick_candidates, sigmoid, softmax
from qconv.decoding.extras import Statement
from qconv.decoding.head import Head, NetworkFacts, OutputPart
from qconv.decoding.yolo_end_to_end import has_classes

QUERIES_OF_RTDETR = 300

HEAD_OF_RTDETR = "RTDETRDecoder"

BEYOND = 0.05
"""By how much of the input's size a box may go beyond its edges and still count as inside."""

BOX = OutputPart("boxes", 2, 0, 4)
SCORE, SCORES = OutputPart("scores", 2, 4, 5), OutputPart("scores", 2, 4)

Decode = Callable[[Sequence[NDArray[Any]], float], list[Detections]]


def match(facts: NetworkFacts) -> Head | None:
    """The head of such a network; None for others."""
    for name in facts.outputs:
        if facts.is_float(name) and (found := _match_rows(facts, name)) is not None:
            return found
    return _match_pair(facts)


def _match_rows(facts: NetworkFacts, name: str) -> Head | None:
    array, stated = facts.outputs[name], Statement.of(facts.metadata)
    if array.ndim != 3 or array.shape[2] < 5 or not _are_centred(array):
        return None
    queries, width = array.shape[1:]
    known = stated.head == HEAD_OF_RTDETR or queries == QUERIES_OF_RTDETR
    words = f"{queries} queries with a box in shares of the input"
    if known and width == 6 and has_classes(array):
        parts: tuple[OutputPart, ...] = (replace(BOX, sure=SCORE), SCORE, OutputPart("classes", 2, 5))
        decode: Decode = partial(_decode_classes, size=facts.size)
        why = f"{words}, a score and a class"
    elif are_shares(array[..., 4:]) and (width == 4 + len(stated.names) or (known and not _add_up(array))):
        parts = (replace(BOX, sure=SCORES), SCORES)
        decode = partial(_decode_scores, size=facts.size)
        why = f"{words} and {width - 4} classes behind a sigmoid"
    else:
        return None
    return Head("RT-DETR", why, (name,), decode, facts.size, 0.25, stated.names, {name: parts})


def are_shares(array: NDArray[Any]) -> bool:
    """Whether all numbers are from 0 to 1."""
    return bool(array.min(initial=0.0) >= 0 and array.max(initial=0.0) <= 1)


def _add_up(array: NDArray[Any]) -> bool:
    """Whether rows are probabilities of classes that exclude each other, as a softmax gives them."""
    return bool(np.allclose(array.sum(axis=-1), 1, atol=1e-3))


def _match_pair(facts: NetworkFacts) -> Head | None:
    arrays = {name: a for name, a in facts.outputs.items() if facts.is_float(name) and a.ndim == 3}
    for box, boxes in arrays.items():
        if boxes.shape[2] != 4 or not _are_centred(boxes):
            continue
        others = [name for name, a in arrays.items() if name != box and a.shape[:2] == boxes.shape[:2]]
        name = next((name for name in others if not are_shares(arrays[name])), None)
        if name is None:
            continue
        logits = arrays[name]
        softly = _ends_in_no_object(logits)
        classes = logits.shape[2] - softly
        how = "a softmax, the last of which is no object" if softly else "a sigmoid each"
        sure = None if softly else OutputPart("scores", 2, tensor=name)
        return Head(
            "DETR" if softly else "RT-DETR",
            f"{boxes.shape[1]} queries with a box in shares of the input and {classes} logits, taken for {how}",
            (name, box),
            partial(_decode_pair, size=facts.size, softly=softly),
            facts.size,
            0.5,
            Statement.of(facts.metadata).names,
            {box: (OutputPart("boxes", 2, sure=sure),)},
        )
    return None


def _are_centred(array: NDArray[Any]) -> bool:
    """Whether rows start with boxes by centre and size, in shares of the input, most of which lie inside of it.

    Numbers from 0 to 1 at random would for 36 % of rows; edges would never have the second below the first.
    """
    boxes = array[..., :4]
    if not are_shares(boxes) or not (boxes[..., 2:] < boxes[..., :2]).any():
        return False
    edges = corners_of(boxes[..., :2], boxes[..., 2:])
    inside = (edges >= -BEYOND) & (edges <= 1 + BEYOND)
    return bool(inside.all(axis=-1).mean() > 0.5)


def _ends_in_no_object(logits: NDArray[Any]) -> bool:
    """Whether most queries have their highest logit in the last column."""
    return bool((logits.argmax(axis=-1) == logits.shape[-1] - 1).mean() > 0.5)


def _decode_pair(
    arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int], softly: bool
) -> list[Detections]:
    logits, boxes = arrays
    scores = softmax(logits, -1)[..., :-1] if softly else sigmoid(logits)
    return [_find(box, score, least, size, one_class=softly) for box, score in zip(boxes, scores, strict=True)]


def _decode_scores(arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int]) -> list[Detections]:
    return [_find(rows[:, :4], rows[:, 4:], least, size, one_class=True) for rows in arrays[0]]


def _decode_classes(arrays: Sequence[NDArray[Any]], least: float, *, size: tuple[int, int]) -> list[Detections]:
    found = []
    for rows in arrays[0]:
        sound = rows[np.isfinite(rows).all(axis=1)]
        detections = Detections.of(_edges_of(sound[:, :4], size), sound[:, 4], np.round(sound[:, 5]))
        found.append(detections.above(least))
    return found


def _find(
    boxes: NDArray[Any], scores: NDArray[Any], least: float, size: tuple[int, int], *, one_class: bool
) -> Detections:
    """What queries say, as many as there are at most. boxes: (Q, 4) in shares of the input. scores: (Q, C)."""
    found = pick_candidates(_edges_of(boxes, size), scores, least, one_class=one_class)[1]
    return found.select(slice(0, min(len(boxes), MOST_BOXES)))


def _edges_of(boxes: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes by their edges in pixels, of their centres and sizes in shares of an input of this height and width."""
    scaled = boxes.astype(np.float64) * np.array([size[1], size[0]] * 2)
    return corners_of(scaled[:, :2], scaled[:, 2:])
