"""Cuts outputs into parts that mean one thing each, so that errors are weighed by the power of their own part.

    noise = sum over parts of sum (ref - got)^2 / sqrt(sum ref^2 * sum got^2)

A detector's boxes are pixels and its scores are shares of 1: summed in one number, an error that loses every object is
nothing beside a box that is a pixel off. Parts are what the decoder of the family says; else what the last Concat
joins; else rows along the axis of channels with powers that differ by POWER_RATIO and more.

Errors are over the power of both sides, in the geometric mean. Over that of the reference alone, a network that says
nothing has a noise of 1, and one that finds every object, but not where it should be as sure, may have more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.head import OutputPart
from qconv.ir.judged_tensors import find_selections
from qconv.ir.model import Model
from qconv.metrics.similarity import finite_power, measure_error
from qconv.runtime.outputs import ModelOutput, OutputKind

Parts = Mapping[str, tuple[OutputPart, ...]]
"""Parts by the name of their output; an output without any is one whole."""

NO_PARTS: Parts = {}

PARTED_KINDS = frozenset({OutputKind.DETECTIONS, OutputKind.REGRESSION, OutputKind.KEYPOINTS})
"""What may hold more than one thing."""

POWER_RATIO = 100.0

MOST_ROWS = 4096
"""Rows along an axis from which on it is one of places rather than of channels."""

WORST_NOISE = 1e6
"""The noise of outputs with NaN or infinity, or of a part that holds nothing but zeros any more."""


def find_parts(output: ModelOutput, array: NDArray[Any]) -> tuple[OutputPart, ...]:
    """The parts of an output that no decoder knows. array: what the float model says of one batch."""
    if output.kind not in PARTED_KINDS or array.dtype.kind != "f" or array.ndim < 2:
        return ()
    join = None if output.origin is None else output.origin.join
    if join is not None and array.shape[join.axis : join.axis + 1] == (sum(join.sizes),):
        ends = np.cumsum(join.sizes).tolist()
        starts = [0, *ends[:-1]]
        return tuple(OutputPart(f"{a} to {b - 1}", join.axis, a, b) for a, b in zip(starts, ends, strict=True))
    return _split_by_power(array)


def _split_by_power(array: NDArray[Any]) -> tuple[OutputPart, ...]:
    """Two parts: the rows with about the largest power, and those far below; none where all are alike."""
    if not array.size:
        return ()
    axis = min(range(1, array.ndim), key=lambda at: array.shape[at] if array.shape[at] > 1 else array.size)
    if not 2 <= array.shape[axis] <= MOST_ROWS:
        return ()
    others = tuple(at for at in range(array.ndim) if at != axis)
    powers = np.square(np.where(np.isfinite(array), array, 0).astype(np.float64)).mean(axis=others)
    small = powers * POWER_RATIO <= powers.max()
    if not small.any() or not powers[small].any():
        return ()
    groups = {"large": np.flatnonzero(~small), "small": np.flatnonzero(small)}
    return tuple(OutputPart(name, axis, rows=tuple(rows.tolist())) for name, rows in groups.items())


def add_selected_parts(parts: Parts, model: Model) -> Parts:
    """The parts of outputs, and of the tensors that stand for them: what scores select counts as far as these say."""
    found = dict(parts)
    for value, selected in find_selections(model).items():
        if selected is not None and value.name not in found:
            of_scores, layout = selected.scores.name or "", selected.classes_first
            scores = OutputPart("scores", tensor=of_scores, places=selected.axis, classes_first=layout)
            found[value.name or ""] = (OutputPart("selected", sure=scores),)
    return found


def sum_errors(
    parts: Parts,
    names: Sequence[str],
    reference: Sequence[Any],
    got: Sequence[Any],
    everything: Mapping[str, Any] | None = None,
) -> NDArray[np.float64]:
    """Signal, noise and signal of the other side, of every part of every output of one batch, (parts, 3).

    Sums of squares: `ref`, `ref - got`, `got`. Nothing for what is no tensor of numbers, or has another shape. Of
    integers: how many there are, and differ. everything: what else the reference says, by name, where scores may be.
    """
    rows, tensors = [], everything or dict(zip(names, reference, strict=True))
    for name, ref, result in zip(names, reference, got, strict=True):
        count = max(1, len(parts.get(name, ())))
        if not isinstance(ref, np.ndarray) or ref.dtype.kind not in "fiub" or ref.shape != result.shape:
            rows += [(0.0, 0.0, 0.0)] * count
        elif ref.dtype.kind == "f":
            pairs = [part.compared(ref, result, tensors) for part in parts.get(name, ())] or [(ref, result)]
            rows += [_measure_pair(*pair) for pair in pairs]
        else:
            differing = float((ref != result).sum())
            rows += [(float(ref.size), differing, float(ref.size))] + [(0.0, 0.0, 0.0)] * (count - 1)
    return np.array(rows, np.float64).reshape(-1, 3)


def _measure_pair(reference: NDArray[Any], got: NDArray[Any]) -> tuple[float, float, float]:
    signal, noise = measure_error(reference, got)
    finite = np.isfinite(reference)
    return signal, noise, finite_power(got if finite.all() else got[finite])


def relative_noise(sums: NDArray[np.float64]) -> float:
    """The noise of all parts, each over its own power. sums: (parts, 3), as `sum_errors` gives them."""
    signal, noise, got = sums[sums[:, 0] > 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        total = float((noise / np.sqrt(signal * got)).sum())
    return min(total, WORST_NOISE) if np.isfinite(total) else WORST_NOISE


def measure_output_noise(
    parts: Parts,
    names: Sequence[str],
    expected: Iterable[Sequence[Any]],
    got: Iterable[Sequence[Any]],
    weights: Iterable[float] = itertools.repeat(1.0),
) -> float:
    """The noise between outputs of batch after batch, see the module. weights: how many batches each stands for.

    Powers are those of all batches together: on an image without any object the scores of a detector have hardly any
    power, and their noise is nothing beside it.
    """
    pairs = zip(expected, got, strict=True)
    sums = [weight * sum_errors(parts, names, *pair) for pair, weight in zip(pairs, weights, strict=False)]
    return relative_noise(np.sum(sums, axis=0)) if sums else 0.0
