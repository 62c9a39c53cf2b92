"""From pictures to ranges: the float network runs once, its tensors are watched batch by batch, only statistics stay.

A calibrator is a function from a tensor's statistics and its QuantSpec to a range, and a line in CALIBRATORS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import QconvError
from qconv.quant import QuantSpec
from qconv.runtime import Session


@dataclass(slots=True)
class Statistics:
    """What is remembered of one tensor: the exact extremes of each channel (axis 1), float32, and the sum of each,
    float64, all of shape (C,); count: elements that went into each sum.

    Tensors of rank 0 and 1 count as one channel.
    """

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    sums: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, x: NDArray[Any]) -> Statistics:
        """The statistics of one batch (N, C, ...). A tensor without elements counts as one zero."""
        if not x.size:
            x = np.zeros((1, 1), np.float32)
        rows = x.reshape(len(x), x.shape[1], -1) if x.ndim > 1 else x.reshape(1, 1, -1)
        lows, highs = rows.min(axis=2).min(axis=0), rows.max(axis=2).max(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite values are refused at the end
            sums = rows.sum(axis=2).sum(axis=0, dtype=np.float64)
        return cls(lows, highs, sums, rows.shape[0] * rows.shape[2])

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both sets of pictures together."""
        if self.lows.shape != other.lows.shape:
            # axis 1 grows with the picture: then there are no channels to speak of
            return self._overall().merge(other._overall())
        lows, highs = np.minimum(self.lows, other.lows), np.maximum(self.highs, other.highs)
        return Statistics(lows, highs, self.sums + other.sums, self.count + other.count)

    def _overall(self) -> Statistics:
        channels = len(self.lows)
        return Statistics(
            self.lows.min(keepdims=True),
            self.highs.max(keepdims=True),
            self.sums.sum(keepdims=True),
            self.count * channels,
        )

    @property
    def means(self) -> NDArray[np.float64]:
        """The mean of each channel."""
        return self.sums / max(self.count, 1)

    @property
    def low(self) -> float:
        """The least value of all."""
        return float(self.lows.min())

    @property
    def high(self) -> float:
        """The largest value of all."""
        return float(self.highs.max())


Calibrator = Callable[[Statistics, QuantSpec], tuple[float, float]]


def minmax(statistics: Statistics, spec: QuantSpec) -> tuple[float, float]:
    """The exact extremes: nothing is clipped. Krishnamoorthi 2018, section 3.1."""
    return statistics.low, statistics.high


CALIBRATORS: dict[str, Calibrator] = {"minmax": minmax}


def watch(
    session: Session,
    names: list[str],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    *,
    after_batch: Callable[[Mapping[str, NDArray[Any]]], None] | None = None,
) -> dict[str, Statistics]:
    """Run every batch once and keep statistics of the named tensors.

    Raises QconvError where a tensor holds NaN or infinity: no range would be right.
    """
    statistics: dict[str, Statistics] = {}
    inputs = {name for name, _, _ in session.inputs}
    outputs = [name for name in names if name not in inputs]
    for batch in batches:
        seen = dict(zip(outputs, session.run_into_buffers(outputs, batch), strict=True))
        for name in names:
            found = Statistics.of(batch[name] if name in inputs else seen[name])
            statistics[name] = statistics[name].merge(found) if name in statistics else found
        if after_batch is not None:
            after_batch(batch)
    for name, found in statistics.items():
        if not (np.isfinite(found.low) and np.isfinite(found.high)):
            raise QconvError(
                f"Tensor {name!r} holds NaN or infinite values on these pictures.",
                "check the preprocessing options, and the float model on one picture.",
            )
    return statistics
