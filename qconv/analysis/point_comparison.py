"""Pairs tensors of a quantized network with the float model's, and adds up how near they are, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.analysis.weight_comparison import make_histogram
from qconv.ir.metadata import EqualizationRecord
from qconv.ir.model import Value
from qconv.ir.tensor_matching import ComparisonPoint, TensorPair
from qconv.metrics.similarity import compute_sqnr_db, signal_power
from qconv.results.comparison import LayerComparison, ValueStatistics

Arrays = Mapping[str, NDArray[Any]]

ARITHMETIC_NOISE_SHARE = 1e-12
"""Share of the signal's power that a difference of float arithmetic alone may have."""


def match_points(
    found: Sequence[ComparisonPoint],
    batches: Iterable[tuple[Arrays, Mapping[ComparisonPoint, NDArray[Any]]]],
    equalization: EqualizationRecord,
) -> list[TensorPair]:
    """Match every point with the nearest candidate on the first batch where a shape fits; leave out those without."""
    pairs: dict[ComparisonPoint, TensorPair] = {}
    for floats, got in batches:
        waiting = [point for point in found if point not in pairs]
        for point in waiting:
            nearest = _find_nearest(point, floats, got[point], equalization)
            if nearest is not None:
                pairs[point] = TensorPair(point, nearest)
        # tensors whose shape no data change fit now or never
        if not any(_may_fit(point, floats, got[point]) for point in waiting if point not in pairs):
            break
    return [pairs[point] for point in found if point in pairs]


def _find_nearest(
    point: ComparisonPoint, floats: Arrays, q: NDArray[Any], equalization: EqualizationRecord
) -> Value | None:
    """The candidate that is nearest to the tensor `q` of a point; None where none has its shape, or it is empty."""
    away = {}
    for value in point.candidates:
        name = value.name or ""
        x = floats.get(name)
        if (
            isinstance(x, np.ndarray)
            and isinstance(q, np.ndarray)
            and x.size
            and x.shape == q.shape
            and x.dtype.kind == q.dtype.kind == "f"
        ):
            away[value] = signal_power(equalization.moved(name, x) - q) / max(signal_power(q), ARITHMETIC_NOISE_SHARE)
    return min(away, key=lambda value: away[value]) if away else None


def _may_fit(point: ComparisonPoint, floats: Arrays, q: NDArray[Any]) -> bool:
    """Whether a candidate has the rank of `q` and the data may select how much of it there is."""
    known = (floats.get(value.name or "") for value in point.candidates)
    tensors = [x for x in known if isinstance(x, np.ndarray) and isinstance(q, np.ndarray)]
    shapes = [x.shape for x in tensors if x.ndim == q.ndim]
    return any(sum(a != b for a, b in zip(shape, q.shape, strict=True)) < 2 for shape in shapes)


@dataclass(slots=True)
class PointTally:
    """Sums of signal and error at one point.

    batches, apart: how many count, and on how many the two networks have tensors of different shapes.
    isolated: the signal where the layer's own error is known.
    """

    batches: int = 0
    apart: int = 0
    signal: float = 0.0
    received: float = 0.0
    isolated: float = 0.0
    added: float = 0.0
    product: float = 0.0
    power: float = 0.0
    count: int = 0
    clipped: int = 0
    codes: NDArray[np.int64] | None = None
    sample: list[NDArray[np.float32]] = field(default_factory=list)

    def add(
        self,
        pair: TensorPair,
        reference: NDArray[Any],
        got: Arrays,
        isolated_output: NDArray[Any] | None,
        equalization: EqualizationRecord,
        each: int,
    ) -> None:
        """Take in a batch.

        Args:
            pair: What is compared.
            reference: The float model's tensor.
            got: The quantized network's, by name, in its own units.
            isolated_output: The point's own tensor where it is fed with float ones.
            equalization: From the float model's units to the quantized network's.
            each: How many values of a tensor are kept for its histogram.
        """
        name, point = pair.tensor.name or "", pair.point
        q = equalization.back(name, got[point.value.name or ""])
        if q.shape != reference.shape:
            self.apart += 1
            return
        signal = signal_power(reference)
        self.batches += 1
        self.signal += signal
        self.received += signal_power(q - reference)
        if isolated_output is not None and isolated_output.shape == reference.shape:
            self.isolated += signal
            self.added += signal_power(equalization.back(name, isolated_output) - reference)
        with np.errstate(over="ignore", invalid="ignore"):
            self.product += float(np.dot(q.reshape(-1), reference.reshape(-1)))
        self.power += signal_power(q)
        if point.grid is None or point.codes is None:
            return
        own = equalization.moved(name, reference).reshape(-1)
        half = point.grid.scale / 2
        self.count += own.size
        self.clipped += int(np.count_nonzero((own < point.grid.low - half) | (own > point.grid.high + half)))
        self.sample.append(own[:: max(1, own.size // each)].copy())
        codes = got[point.codes.name or ""].reshape(-1).astype(np.int64) - point.grid.least
        last = point.grid.most - point.grid.least
        counted = np.bincount(np.clip(codes, 0, last), minlength=last + 1)
        self.codes = counted if self.codes is None else self.codes + counted


def make_layer_row(
    pair: TensorPair, tally: PointTally, share: float | None, weights: ValueStatistics | None
) -> LayerComparison:
    """What was found at a point. share: of the error at the outputs. weights: how its weights compare."""
    point, values = pair.point, None
    if point.grid is not None and tally.codes is not None:
        numbers = np.concatenate(tally.sample)
        values = ValueStatistics(
            point.grid.bits,
            point.grid.low,
            point.grid.high,
            tally.clipped / max(1, tally.count),
            float(np.count_nonzero(tally.codes)) / tally.codes.size,
            make_histogram(numbers, point.grid.low, point.grid.high),
        )
    known = bool(tally.signal and tally.power) and math.isfinite(tally.product)
    return LayerComparison(
        name=point.name,
        op=point.op,
        tensor=pair.tensor.name or "",
        sqnr_db=_to_decibel(tally.signal, tally.received),
        added_sqnr_db=None if point.copy else _to_decibel(tally.isolated, tally.added),
        cosine=tally.product / math.sqrt(tally.signal) / math.sqrt(tally.power) if known else None,
        output_share=share,
        values=values,
        weights=weights,
        input=point.input,
    )


def _to_decibel(signal: float, noise: float) -> float | None:
    return None if noise <= ARITHMETIC_NOISE_SHARE * signal else compute_sqnr_db(signal, noise)
