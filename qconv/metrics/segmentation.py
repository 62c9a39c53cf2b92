"""Compares maps of classes: intersection over union, class by class.

    IoU(c)  = places where both say c / places where either says c
    mIoU    = mean of IoU over the classes that the expected map says

Everhart et al. 2015, The Pascal Visual Object Classes Challenge, section 4.2. Counts add up, over pictures and over
runs. By labels all these classes weigh alike. Beside the float model's own map a class weighs by the square root of the
places n(c) that it has there:

    mIoU    = sum over c of sqrt(n(c)) IoU(c) / sum over c of sqrt(n(c))

A dozen pictures hold a handful of places of many classes, whose IoU is chance: with equal weights a place that the
float model takes for a cat would count as much as all of the background. With weights n(c), as those of the
frequency-weighted IoU of Long et al. 2015 (arXiv 1411.4038), a small class could be lost unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.metrics.similarity import bootstrap_interval
from qconv.results.scores import FLOAT_MIOU, MIOU, PIXEL_ACCURACY, Metric, Score
from qconv.runtime.outputs import ModelOutput

Int64 = NDArray[np.int64]

FLOAT_POWER = 0.5
"""Power of the places of a class in the float model's map, which is its weight."""

MOST_CLASSES = 4096
"""Numbers from which on integers are taken for no classes."""


@dataclass(slots=True)
class ConfusionMatrix:
    """Counts of places by the class that is expected, and by the one that a map says. counts: (C, C)."""

    counts: Int64 = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def add(self, expected: NDArray[Any], got: NDArray[Any], classes: int, ignore: int | None = None) -> None:
        """Take in maps of class numbers below `classes`, of one shape. ignore: number of places that do not count."""
        if classes > len(self.counts):
            more = classes - len(self.counts)
            self.counts = np.pad(self.counts, (0, more))
        size = len(self.counts)
        known = np.ones(expected.shape, bool) if ignore is None else expected != ignore
        pairs = expected[known].astype(np.int64) * size + got[known].astype(np.int64)
        self.counts += np.bincount(pairs, minlength=size * size).reshape(size, size)

    def miou(self) -> float | None:
        """Mean IoU over the classes that are expected somewhere; None where there is none."""
        found = float(mean_iou(self.totals[None])[0])
        return None if np.isnan(found) else found

    def accuracy(self) -> float | None:
        """Share of places whose class is the expected one; None without places."""
        whole = int(self.counts.sum())
        return int(np.trace(self.counts)) / whole if whole else None

    @property
    def totals(self) -> NDArray[np.float64]:
        """Places where both say a class, where it is expected, and where it is said, (3, C)."""
        counts = self.counts.astype(np.float64)
        return np.stack([np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)])


def mean_iou(totals: NDArray[np.float64], power: float = 0.0) -> NDArray[np.float64]:
    """mIoU of totals (R, 3, C) as `ConfusionMatrix.totals` gives them, (R,); NaN where no class is expected.

    power: of a class's expected places, which is its weight; 0 for equal weights.
    """
    both, expected, said = totals[:, 0], totals[:, 1], totals[:, 2]
    counts = expected > 0
    iou = np.divide(both, expected + said - both, out=np.zeros_like(both), where=counts)
    weights = np.where(counts, expected**power, 0)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = (weights * iou).sum(axis=1) / weights.sum(axis=1)
    return found


@dataclass(slots=True)
class FloatMiou:
    """mIoU with the float model's own map, classes weighed by their places. rows: totals of each batch, (3, C)."""

    output: ModelOutput
    classes: int = 0
    countable: bool = True
    rows: list[NDArray[np.float64]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        expected, said = self.output.labels(reference), self.output.labels(got)
        highest = max(int(expected.max(initial=0)), int(said.max(initial=0)))
        lowest = min(int(expected.min(initial=0)), int(said.min(initial=0)))
        self.countable = self.countable and lowest >= 0 and highest < MOST_CLASSES
        if not self.countable:
            return
        self.classes = max(self.classes, highest + 1, self.output.classes)
        matrix = ConfusionMatrix()
        matrix.add(expected, said, self.classes)
        self.rows.append(matrix.totals)

    def score(self, *, spans: bool) -> Score | None:
        """None where integers are no class numbers. The interval is the bootstrap's over batches."""
        if not self.countable or not self.rows:
            return None
        rows = np.stack([np.pad(row, ((0, 0), (0, self.classes - row.shape[1]))) for row in self.rows])
        measure = partial(mean_iou, power=FLOAT_POWER)
        value, flat = float(measure(rows.sum(axis=0, keepdims=True))[0]), rows.reshape(len(rows), -1)
        span = bootstrap_interval(flat, partial(_measure_flat, measure=measure)) if spans else None
        return None if np.isnan(value) else Score(FLOAT_MIOU, value, span)


@dataclass(slots=True)
class LabelledMiou:
    """mIoU and pixel accuracy by labels. rows: the totals of each picture, (3, C), see `ConfusionMatrix.totals`."""

    rows: list[NDArray[np.float64]] = field(default_factory=list)

    def add(self, expected: NDArray[Any], got: NDArray[Any], classes: int, ignore: int) -> None:
        """Take in the maps of one picture, see `ConfusionMatrix.add`. classes: at least so many."""
        matrix = ConfusionMatrix()
        highest = max(int(expected.max(initial=0)), int(got.max(initial=0)))
        matrix.add(expected, got, max(classes, highest + 1), ignore)
        self.rows.append(matrix.totals)

    def scores(self) -> tuple[Score, ...]:
        """What was measured, with the bootstrap's intervals over pictures; without a number where nothing counts."""
        flat = self._flatten(self.classes)
        found = []
        for metric, measure in MASK_MEASURES.items():
            value = float(_measure_flat(flat.sum(axis=0, keepdims=True), measure)[0])
            span = bootstrap_interval(flat, partial(_measure_flat, measure=measure))
            found.append(Score(metric, None if np.isnan(value) else value, span))
        return tuple(found)

    def differences(self, other: LabelledMiou) -> tuple[Score, ...]:
        """By how much each measure is above another model's on the same pictures, which both bootstraps draw alike."""
        classes = max(self.classes, other.classes)
        pair = np.concatenate([self._flatten(classes), other._flatten(classes)], axis=1)

        def differ(sums: NDArray[np.float64], measure: Measure) -> NDArray[np.float64]:
            own, its = np.split(sums, 2, axis=1)
            return _measure_flat(own, measure) - _measure_flat(its, measure)

        found = []
        for metric, measure in MASK_MEASURES.items():
            value = float(differ(pair.sum(axis=0, keepdims=True), measure)[0])
            span = bootstrap_interval(pair, partial(differ, measure=measure))
            found.append(Score(metric, None if np.isnan(value) else value, span))
        return tuple(found)

    @property
    def classes(self) -> int:
        """How many have been seen, or are known."""
        return max((row.shape[1] for row in self.rows), default=0)

    def _flatten(self, classes: int) -> NDArray[np.float64]:
        rows = [np.pad(row, ((0, 0), (0, classes - row.shape[1]))) for row in self.rows]
        return np.stack(rows).reshape(len(rows), -1)


Measure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Of totals (R, 3, C), (R,)."""


def _measure_flat(sums: NDArray[np.float64], measure: Measure) -> NDArray[np.float64]:
    return measure(sums.reshape(len(sums), 3, -1))


def pixel_accuracy(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of places whose class is the expected one, of totals (R, 3, C), (R,); NaN without places."""
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = totals[:, 0].sum(axis=1) / totals[:, 1].sum(axis=1)
    return found


MASK_MEASURES: Mapping[Metric, Measure] = {MIOU: mean_iou, PIXEL_ACCURACY: pixel_accuracy}
"""What masks as labels measure."""
