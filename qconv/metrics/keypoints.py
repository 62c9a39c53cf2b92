"""Compares keypoints with those of the float model: how far they are off, and how many are where it sees them.

    distance  = mean of |p - p_float| / extent
    PCK       = share of keypoints with |p - p_float| <= 0.05 extent     (Yang and Ramanan 2013)

The extent is the diagonal of the box around the float model's points in the picture: files do not tell whether
coordinates are pixels, shares of the input or something else. Points of heat maps are their highest places, in cells,
and their extent is the map's own diagonal. Depth and scores of points do not count; SQNR measures them.

Of points that lie flat in one row, as x y x y or as x y z x y z, the float model's numbers tell how many make a point:
neighbours in the list are near each other, so that the mean of |a[i + step] - a[i]| is smallest for that step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.metrics.similarity import bootstrap_interval
from qconv.results.scores import KEYPOINT_DISTANCE, PCK, Metric, Score
from qconv.runtime.outputs import ModelOutput

Float64 = NDArray[np.float64]

STEPS = (2, 3, 5)
"""How many numbers a point can have in a flat row: x and y, a depth or a score, visibility and presence."""

WIDEST_POINT = 5

NEAR = 0.05
"""Distance up to which a keypoint is where the float model sees it, in extents."""

LOST = 1.0
"""Distance of a point that is NaN or infinite, in extents."""


def choose_step(rows: NDArray[Any]) -> int:
    """How many numbers make a point in flat rows (N, D); 0 where D is no multiple of any of STEPS."""
    steps = [step for step in STEPS if rows.shape[1] % step == 0]
    flat = np.nan_to_num(rows.astype(np.float64))
    return min(steps, key=lambda step: _mean_stride(flat, step), default=0)


def _mean_stride(rows: Float64, step: int) -> float:
    return float(np.abs(rows[:, step:] - rows[:, :-step]).mean()) if rows.shape[1] > step else float("inf")


def read_coordinates(array: NDArray[Any], step: int) -> Float64 | None:
    """x and y of the points that an array holds as coordinates, (N, K, 2); None where it holds none.

    step: how many numbers make a point where they lie flat.
    """
    rows = array.reshape(len(array), *(side for side in array.shape[1:] if side != 1))
    if rows.ndim == 2 and step:
        rows = rows.reshape(len(rows), -1, step)
    if rows.ndim != 3 or not 2 <= rows.shape[2] <= WIDEST_POINT:
        return None
    return rows[..., :2].astype(np.float64)


def read_heat_maps(maps: NDArray[Any]) -> Float64:
    """Column and row of the highest place of each map, (N, K, 2). maps: (N, K, H, W)."""
    width = maps.shape[3]
    places = maps.reshape(*maps.shape[:2], -1).argmax(axis=2)
    return np.stack([places % width, places // width], axis=-1).astype(np.float64)


def measure_extents(points: Float64) -> Float64:
    """Diagonal of the box around the finite points of each picture, (N, 1); 0 where there are fewer than two."""
    finite = np.isfinite(points)
    high = np.where(finite, points, -np.inf).max(axis=1)
    low = np.where(finite, points, np.inf).min(axis=1)
    with np.errstate(invalid="ignore"):
        sides = high - low
    found: Float64 = np.hypot(sides[:, 0], sides[:, 1])[:, None]
    return np.where(np.isfinite(found), found, 0.0)


def measure_distances(ref: Float64, got: Float64, extents: Float64) -> Float64:
    """Distances of points (N, K, 2) from those of the float model, over extents (N, 1), (P,).

    Points that the float model does not place, and those of pictures without an extent, are left out.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.hypot(*np.moveaxis(ref - got, -1, 0)) / extents
    found[~np.isfinite(got).all(axis=-1)] = LOST
    placed: Float64 = found[np.isfinite(ref).all(axis=-1) & (extents > 0)]
    return placed


@dataclass(slots=True)
class KeypointMeasure:
    """A mean over keypoints.

    add: sums up what it is the mean of, over distances in extents, (P,). step: how many numbers make a point in flat
    rows; 0 before the first batch. rows: the sum, and the number of points, of each batch.
    """

    output: ModelOutput
    metric: Metric
    add: Callable[[Float64], float]
    step: int = 0
    rows: list[tuple[float, int]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        if reference.ndim < 2:
            return
        distances = self._distances(reference, got)
        self.rows.append((self.add(distances), distances.size))

    def score(self, *, spans: bool) -> Score | None:
        """None where no points can be read. The interval is the bootstrap's over batches."""
        total, points = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0.0, 0)
        if not points:
            return None
        rows = np.array(self.rows, np.float64)
        span = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return Score(self.metric, total / points, span)

    def _distances(self, reference: NDArray[Any], got: NDArray[Any]) -> Float64:
        """Of the points that the float model places, in extents, (P,)."""
        if reference.ndim == 4:
            maps, others = (np.moveaxis(array, self.output.axis, 1) for array in (reference, got))
            height, width = maps.shape[2:]
            if min(height, width) > 1:
                extents = np.full((len(maps), 1), np.hypot(height, width))
                return measure_distances(read_heat_maps(maps), read_heat_maps(others), extents)
        self.step = self.step or choose_step(reference.reshape(len(reference), -1))
        ref, other = (read_coordinates(array, self.step) for array in (reference, got))
        if ref is None or other is None:
            return np.zeros(0)
        return measure_distances(ref, other, measure_extents(ref))


def mean_distance(output: ModelOutput) -> KeypointMeasure:
    """How far keypoints are from the float model's, in extents."""
    return KeypointMeasure(output, KEYPOINT_DISTANCE, lambda distances: float(distances.sum()))


def pck(output: ModelOutput) -> KeypointMeasure:
    """How many keypoints are where the float model sees them, as a share."""
    return KeypointMeasure(output, PCK, lambda distances: float((distances <= NEAR).sum()))
