"""Measures a detector by labels of boxes: average precision as COCO defines it.

    AP      = mean over 101 recalls r, 0 to 1, of the highest precision at a recall of r or more
    mAP50   = mean of AP over the classes that have labels, where a box is found at an IoU of 0.5
    mAP     = mean of this over IoU limits of 0.5, 0.55, ... 0.95

In each picture and class the 100 boxes with the highest scores are matched, the highest first, each with the label that
it overlaps most and that no box has; crowds and ignored labels count neither way. Lin et al. 2014 (arXiv 1405.0312)
and its program pycocotools, which the number is equal to: it is computed by faster-coco-eval, of the extra
qconv[detect], imported here alone.

Intervals are the bootstrap's over pictures. Matches do not depend on which pictures are drawn: they are made once, and
AP is computed of them under weights, how often each picture is drawn. With weights of 1 it is the number above.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.box_labels import BoxLabels
from qconv.decoding.boxes import NOTHING, Detections, pairwise_iou
from qconv.errors import QconvError
from qconv.metrics.similarity import iter_resamples, percentile_interval
from qconv.results.scores import MAP, MAP50, Metric, Score

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Flags = NDArray[np.bool_]

IOU_LIMITS = np.linspace(0.5, 0.95, 10)

RECALLS = np.linspace(0.0, 1.0, 101)

MOST_OF_A_CLASS = 100
"""Boxes of one class in one picture that are looked at."""

AP_RESAMPLES = 300

BLOCK = 2**22
"""Numbers of a table that are computed at once."""

LARGEST_AREA = 1e10
"""Of the range of sizes that COCO calls `all`: boxes outside of it that find nothing do not count."""


def require_detect_extra() -> None:
    """Raise QconvError where faster-coco-eval is missing."""
    try:
        importlib.import_module("faster_coco_eval")
    except ImportError as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        raise QconvError(
            f"mAP needs faster-coco-eval, which {why}.", "install the extra: pip install 'qconv[detect]'."
        ) from None


@dataclass(frozen=True, slots=True)
class ClassMatches:
    """Boxes of one class in all pictures, by falling score, and what they found.

    Attributes:
        pictures: The number of the picture of each, (D,).
        hits: Whether it found a label, at each IoU limit, (10, D).
        counted: Whether it counts, at each IoU limit, (10, D).
        wanted: Labels that count in each picture, (P,).
    """

    pictures: Int64
    hits: Flags
    counted: Flags
    wanted: Int64

    def precision(self, weights: Float64) -> Float64:
        """AP at each IoU limit under weights of pictures (R, P), (R, 10); NaN where nothing is wanted."""
        wanted = weights @ self.wanted  # (R,)
        found = np.zeros((len(weights), len(IOU_LIMITS)))
        whole: Float64 | None = None
        for index, (hits, counted) in enumerate(zip(self.hits, self.counted, strict=True)):
            if whole is None or not np.array_equal(counted, self.counted[index - 1]):
                whole = np.cumsum(weights[:, self.pictures] * counted, axis=1)  # (R, D)
            places = np.flatnonzero(hits & counted)
            right = np.cumsum(weights[:, self.pictures[places]], axis=1)  # (R, H)
            found[:, index] = _integrate(right, whole[:, places], wanted)
        found[wanted == 0] = np.nan
        return found


def _integrate(right: Float64, whole: Float64, wanted: Float64) -> Float64:
    """The mean of the highest precision at each recall or above, (R,).

    right, whole: of boxes that found a label, how many had up to it, and how many boxes there were, (R, H).
    """
    if not right.shape[1]:
        return np.zeros(len(right))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = right / (whole + np.spacing(1))
        reached = np.searchsorted(RECALLS, right / wanted[:, None], side="right")  # recalls up to each box
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    gained: Float64 = (highest * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)
    return gained


def _match_picture(found: Float64, labels: BoxLabels) -> tuple[Flags, Flags]:
    """Boxes (D, 4) of one class in one picture: whether each found a label, and counts, at each IoU limit, (10, D)."""
    limits, shape = np.minimum(IOU_LIMITS, 1 - 1e-10), (len(IOU_LIMITS), len(found))
    hits, counted = np.zeros(shape, bool), np.ones(shape, bool)
    order = np.argsort(labels.ignored, kind="stable")  # those that count first
    ignored, crowd = labels.ignored[order], labels.crowd[order]
    overlaps = _overlaps(found, labels.boxes[order], crowd)  # (D, G)
    free = np.ones((len(limits), len(order)), bool)
    for index in np.flatnonzero(overlaps.max(axis=1, initial=0) >= limits[0]):
        able = (overlaps[index] >= limits[:, None]) & (free | crowd)  # (10, G)
        able &= ~ignored | ~(able & ~ignored).any(axis=1, keepdims=True)
        value = np.where(able, overlaps[index], -1.0)
        best = len(order) - 1 - np.argmax(value[:, ::-1], axis=1)  # the last of equal ones, as pycocotools takes it
        hit = able.any(axis=1)
        hits[:, index] = hit
        counted[:, index] = ~(hit & ignored[best])
        free[np.flatnonzero(hit), best[hit]] = False
    return hits, counted


def _overlaps(boxes: Float64, labels: Float64, crowd: Flags) -> Float64:
    """IoU of boxes (D, 4) with labels (G, 4); with crowds the share of the box that lies in it."""
    found = pairwise_iou(boxes, labels)
    groups = labels[crowd]
    shared = np.minimum(boxes[:, None, 2:], groups[None, :, 2:]) - np.maximum(boxes[:, None, :2], groups[None, :, :2])
    inside = np.maximum(shared, 0).prod(axis=2)
    area = np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1)[:, None]
    found[:, crowd] = np.divide(inside, area, out=np.zeros_like(inside), where=area > 0)
    return found


@dataclass(slots=True)
class AveragePrecision:
    """Adds up what a detector finds in labelled pictures, and measures it."""

    found: list[Detections] = field(default_factory=list)
    labels: list[BoxLabels] = field(default_factory=list)
    _matches: list[ClassMatches] | None = None
    _values: Mapping[Metric, float | None] | None = None
    _drawn: Float64 | None = None

    def add(self, found: Detections, labels: BoxLabels) -> None:
        """Take in one picture, boxes and labels in its pixels."""
        self.found.append(found)
        self.labels.append(labels)
        self._matches = self._values = self._drawn = None

    def scores(self) -> tuple[Score, ...]:
        """mAP and mAP50; without a number where no label counts."""
        drawn = self.resampled()
        return tuple(
            Score(metric, value, None if drawn is None or value is None else percentile_interval(drawn[:, index]))
            for index, (metric, value) in enumerate(self.values.items())
        )

    def differences(self, other: AveragePrecision) -> tuple[Score, ...]:
        """By how much each measure is above another model's on the same pictures, which both bootstraps draw alike."""
        own, theirs = self.resampled(), other.resampled()
        found = []
        for index, (metric, value) in enumerate(self.values.items()):
            its = other.values[metric]
            if value is None or its is None:
                found.append(Score(metric, None))
                continue
            span = None if own is None or theirs is None else percentile_interval((own - theirs)[:, index])
            found.append(Score(metric, value - its, span))
        return tuple(found)

    @property
    def values(self) -> Mapping[Metric, float | None]:
        """mAP and mAP50 by the library; None where no label counts."""
        if self._values is None:
            self._values = _ask_library(self.found, self.labels)
        return self._values

    def measure(self, weights: Float64) -> Float64:
        """mAP and mAP50 under weights of pictures (R, P), (R, 2); NaN where no label counts."""
        total = np.zeros((len(weights), len(IOU_LIMITS)))
        classes = np.zeros(len(weights))
        for matches in self.matches:
            step = max(1, BLOCK // max(1, len(matches.pictures)))
            precision = np.concatenate(
                [matches.precision(weights[start : start + step]) for start in range(0, len(weights), step)]
            )
            known = ~np.isnan(precision[:, 0])
            total[known] += precision[known]
            classes += known
        with np.errstate(invalid="ignore"):
            by_limit = total / classes[:, None]
        return np.stack([by_limit.mean(axis=1), by_limit[:, 0]], axis=1)

    @property
    def matches(self) -> list[ClassMatches]:
        """Of each class that has labels."""
        if self._matches is None:
            self._matches = _match(_Boxes.of(self.found), self.labels)
        return self._matches

    def resampled(self) -> Float64 | None:
        """Both measures on resampled pictures, (AP_RESAMPLES, 2); None of fewer than two pictures."""
        count = len(self.labels)
        if self._drawn is None and count > 1:
            self._drawn = self.measure(np.stack([*iter_resamples(count, AP_RESAMPLES)]).astype(np.float64))
        return self._drawn


@dataclass(frozen=True, slots=True)
class _Boxes:
    """All boxes of all pictures that are looked at, by class and falling score."""

    boxes: Float64
    pictures: Int64
    classes: Int64

    @classmethod
    def of(cls, found: Sequence[Detections]) -> _Boxes:
        """Those that are looked at."""
        pictures = np.repeat(np.arange(len(found)), [len(own) for own in found])
        parts = [np.concatenate([getattr(own, name) for own in (*found, NOTHING)]) for name in ("classes", "scores")]
        classes, scores = parts
        boxes = np.concatenate([own.boxes for own in (*found, NOTHING)])
        order = np.lexsort((-scores, pictures, classes))
        group = classes[order] * len(found) + pictures[order]
        rank = np.arange(len(order)) - np.searchsorted(group, group)
        order = order[rank < MOST_OF_A_CLASS]
        order = order[np.lexsort((-scores[order], classes[order]))]
        return cls(boxes[order], pictures[order], classes[order])

    def of_class(self, number: int) -> slice:
        """Where a class lies."""
        return slice(*np.searchsorted(self.classes, (number, number + 1)))


def _match(boxes: _Boxes, labels: Sequence[BoxLabels]) -> list[ClassMatches]:
    """What the boxes of each class that has labels have found."""
    numbers = np.unique(np.concatenate([np.zeros(0, np.int64), *(own.classes for own in labels)]))
    matches = []
    for number in numbers:
        place = boxes.of_class(int(number))
        own, pictures = boxes.boxes[place], boxes.pictures[place]
        area = (own[:, 2:] - own[:, :2]).prod(axis=1)
        hits = np.zeros((len(IOU_LIMITS), len(own)), bool)
        counted = np.repeat([(area >= 0) & (area <= LARGEST_AREA)], len(IOU_LIMITS), axis=0)
        wanted = np.zeros(len(labels), np.int64)
        for picture, its in enumerate(labels):
            if number in its.classes:
                its = _select_labels(its, its.classes == number)
                wanted[picture] = int((~its.ignored).sum())
                rows = np.flatnonzero(pictures == picture)
                found, able = _match_picture(own[rows], its)
                hits[:, rows] = found
                counted[:, rows] = np.where(found, able, counted[:, rows])
        matches.append(ClassMatches(pictures, hits, counted, wanted))
    return matches


def _select_labels(labels: BoxLabels, index: Flags) -> BoxLabels:
    return BoxLabels(labels.boxes[index], labels.classes[index], labels.crowd[index], labels.ignored[index])


def _ask_library(found: Sequence[Detections], labels: Sequence[BoxLabels]) -> Mapping[Metric, float | None]:
    """mAP and mAP50 by faster-coco-eval; None where no label counts."""
    require_detect_extra()
    from faster_coco_eval import COCO, COCOeval_faster

    truth = _as_coco(labels)
    results = _as_results(found)
    if not any((~one.ignored).any() for one in labels):
        return {MAP: None, MAP50: None}
    if not results:
        return {MAP: 0.0, MAP50: 0.0}
    expected = COCO(truth)
    judge = COCOeval_faster(expected, expected.loadRes(results), "bbox", print_function=lambda *told: None)
    judge.run()
    return {MAP: float(judge.stats[0]), MAP50: float(judge.stats[1])}


def _as_coco(labels: Sequence[BoxLabels]) -> dict[str, Any]:
    """Labels as COCO writes them. Numbers of pictures and annotations begin at 1: 0 stands for no match there."""
    annotations: list[dict[str, Any]] = []
    for picture, own in enumerate(labels, 1):
        for index in range(len(own)):
            left, top, right, bottom = own.boxes[index].tolist()
            width, height = right - left, bottom - top
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture,
                    "category_id": int(own.classes[index]),
                    "bbox": [left, top, width, height],
                    "area": 2 * LARGEST_AREA if own.ignored[index] and not own.crowd[index] else width * height,
                    "iscrowd": int(own.crowd[index]),
                }
            )
    classes = sorted({entry["category_id"] for entry in annotations})
    images = [{"id": picture} for picture in range(1, len(labels) + 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": number} for number in classes]}


def _as_results(found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Detections as COCO's programs read them."""
    results = []
    for picture, own in enumerate(found, 1):
        for box, score, number in zip(own.boxes.tolist(), own.scores.tolist(), own.classes.tolist(), strict=True):
            left, top, right, bottom = box
            sides = [left, top, right - left, bottom - top]
            results.append({"image_id": picture, "category_id": number, "bbox": sides, "score": score})
    return results
