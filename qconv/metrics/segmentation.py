"""Compares maps of classes: intersection over union, class by class.

    IoU(c)  = places where both say c / places where either says c
    mIoU    = mean of IoU over the classes that the expected map says

Everhart et al. 2015, The Pascal Visual Object Classes Challenge, section 4.2. Counts add up, over pictures and over
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.metrics.similarity import bootstrap_interval
from qconv.results.scores import FLOAT_MIOU, Score
from qconv.runtime.outputs import ModelOutput

Int64 = NDArray[np.int64]

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


def mean_iou(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU of totals (R, 3, C) as `ConfusionMatrix.totals` gives them, (R,); NaN where no class is expected."""
    both, expected, said = totals[:, 0], totals[:, 1], totals[:, 2]
    counts = expected > 0
    iou = np.divide(both, expected + said - both, out=np.zeros_like(both), where=counts)
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = iou.sum(axis=1) / counts.sum(axis=1)
    return found


@dataclass(slots=True)
class FloatMiou:
    """mIoU with the float model's own map. rows: the totals of each batch, (3, C)."""

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
        value = float(mean_iou(rows.sum(axis=0, keepdims=True))[0])
        flat = rows.reshape(len(rows), -1)
        span = bootstrap_interval(flat, lambda sums: mean_iou(sums.reshape(len(sums), 3, -1))) if spans else None
        return Score(FLOAT_MIOU, value, span)
