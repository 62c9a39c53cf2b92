"""The range of each group of weights that shares a scale: its extremes, or what clips them at the least error.

The same searches and closed forms as for activations (see clipping.py), on the weights themselves instead of a
histogram, for all channels or blocks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration import range_estimators
from qconv.calibration.sketch import make_histogram
from qconv.quantizer import Granularity, PerBlock, PerChannel, PerTensor, QuantSpec, group_extremes

Floats = NDArray[np.floating[Any]]
Ends = tuple[Floats, Floats]
COARSE = np.linspace(1.0, 0.2, 13)
FINE = np.linspace(-0.06, 0.06, 9)
TOGETHER, ALONE = ((1, 1),), ((1, 0), (0, 1))
"""Which ends a finer search moves: the lower, the upper."""
LARGEST_PART = 2**20


def largest(weight: Floats, spec: QuantSpec) -> Ends:
    """The extremes: nothing is clipped."""
    return group_extremes(weight, spec.granularity)


def least_squares(weight: Floats, spec: QuantSpec, importance: Floats | None = None) -> Ends:
    """The ends with the least squared error of each group. Both ends move together, then each alone if they may.

    importance: how much the square of each weight's error counts, of the weight's shape; None: all alike.
    """
    low, high = group_extremes(weight, spec.granularity)
    if not low.shape and importance is None:
        return _as_arrays(range_estimators.search_least_squares(make_histogram(weight), spec, float(low), float(high)))
    rows = _rows(weight, spec.granularity)
    counts = None if importance is None else _rows(importance, spec.granularity)
    low_rows, high_rows = (_by_row(ends, spec.granularity).reshape(-1) for ends in (low, high))
    by_row = replace(spec, granularity=PerChannel(0))
    shares = np.empty((2, len(rows)))
    for part in np.array_split(np.arange(len(rows)), min(len(rows), -(-rows.size // LARGEST_PART))):
        count = None if counts is None else counts[part]
        shares[:, part] = _best_shares(rows[part], by_row, low_rows[part], high_rows[part], count)
    return _back(low_rows * shares[0], low, spec.granularity), _back(high_rows * shares[1], high, spec.granularity)


def _best_shares(rows: Floats, spec: QuantSpec, low: Floats, high: Floats, importance: Floats | None) -> Floats:
    """The shares of lower and upper ends with the least error of each of G rows, (2, G)."""
    shares = np.ones((2, len(rows)))
    least = _error(rows, spec, low, high, importance)

    def attempt(candidate: Floats) -> None:
        error = _error(rows, spec, low * candidate[0], high * candidate[1], importance)
        better = error < least
        shares[:, better], least[better] = candidate[:, better], error[better]

    for share in COARSE:
        attempt(np.full_like(shares, share))
    for end in () if spec.symmetric else (0, 1, 0):
        for share in COARSE:
            candidate = shares.copy()
            candidate[end] = share
            attempt(candidate)
    for move in TOGETHER if spec.symmetric else TOGETHER + ALONE:
        start = shares.copy()
        for step in FINE:
            attempt(np.clip(start + np.array(move)[:, None] * step, 0.0, 1.0))
    return shares


def _error(rows: Floats, spec: QuantSpec, low: Floats, high: Floats, importance: Floats | None) -> Floats:
    lost = spec.from_range(low, high).fake(rows)
    lost -= rows
    if importance is None:
        return np.asarray(np.einsum("ge,ge->g", lost, lost, dtype=np.float64))
    return np.asarray(np.einsum("ge,ge,ge->g", lost, lost, importance, dtype=np.float64))


def aciq(weight: Floats, spec: QuantSpec) -> Ends:
    """The closed-form optimum of Laplace's or Gauss's density, whichever fits a group better."""
    low, high = group_extremes(weight, spec.granularity)
    if not low.shape:
        return _as_arrays(range_estimators.aciq_closed_form(make_histogram(weight), spec, float(low), float(high)))
    rows = _rows(weight, spec.granularity).astype(np.float64)
    counts = _by_row(_counts(weight, spec.granularity), spec.granularity)
    padding = rows.shape[1] - counts  # zeros behind a short last block
    centre = rows.sum(axis=1) / counts
    away = np.abs(rows - centre[:, None])
    spread = (away.sum(axis=1) - padding * np.abs(centre)) / counts
    deviation = np.sqrt(np.maximum((away**2).sum(axis=1) - padding * centre**2, 0.0) / counts)
    alpha = np.where(
        range_estimators.is_laplace_likelier(spread, deviation),
        range_estimators.laplace_clipping_factor(spec.bits, one_sided=False) * spread,
        range_estimators.gauss_clipping_factor(spec.bits, one_sided=False) * deviation,
    )
    lows, highs = (_back(ends, low, spec.granularity) for ends in (centre - alpha, centre + alpha))
    return np.maximum(low, lows), np.minimum(high, highs)


WEIGHT_RANGES: dict[str, Callable[[Floats, QuantSpec], Ends]] = {
    "max": largest,
    "mse": least_squares,
    "aciq": aciq,
}


# -- one row for each group that shares a scale ------------------------------------------------------------------------


def _rows(weight: Floats, granularity: Granularity) -> Floats:
    """(G, E); zeros, which cost nothing, fill up short blocks."""
    if isinstance(granularity, PerTensor):
        return weight.reshape(1, -1)
    if isinstance(granularity, PerChannel):
        moved = np.moveaxis(weight, granularity.axis, 0)
        return np.ascontiguousarray(moved.reshape(len(moved), -1))
    moved = np.moveaxis(weight, granularity.axis, -1)
    short = -moved.shape[-1] % granularity.size
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, short)])
    return padded.reshape(-1, granularity.size)


def _by_row(ends: NDArray[Any], granularity: Granularity) -> NDArray[Any]:
    return np.moveaxis(ends, granularity.axis, -1).reshape(-1) if isinstance(granularity, PerBlock) else ends


def _back(by_row: NDArray[Any], like: NDArray[Any], granularity: Granularity) -> NDArray[Any]:
    """The reverse of `_by_row`."""
    if isinstance(granularity, PerTensor):
        return by_row.reshape(())
    if not isinstance(granularity, PerBlock):
        return by_row
    moved = np.moveaxis(like, granularity.axis, -1).shape
    return np.moveaxis(by_row.reshape(moved), -1, granularity.axis)


def _counts(weight: Floats, granularity: Granularity) -> NDArray[np.float64]:
    """How many weights each group has, in the shape of its parameters."""
    if isinstance(granularity, PerBlock):
        starts = np.arange(0, weight.shape[granularity.axis], granularity.size)
        return np.asarray(np.add.reduceat(np.ones(weight.shape), starts, axis=granularity.axis))
    assert isinstance(granularity, PerChannel)
    channels = weight.shape[granularity.axis]
    return np.full(channels, weight.size / max(channels, 1))


def _as_arrays(ends: range_estimators.Range) -> Ends:
    return np.asarray(ends[0]), np.asarray(ends[1])
