"""From pictures to ranges: the float network runs once, its tensors are watched batch by batch, only statistics stay.

A calibrator is a function from a tensor's statistics and its QuantSpec to a range, and a line in CALIBRATORS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import save
from qconv.errors import QconvError
from qconv.graph import Model
from qconv.quant import QuantSpec
from qconv.runtime import Session


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor to watch. What nobody asks for is not computed: reductions cost as much as the network itself.

    per_channel: whether extremes of every channel and their means are wanted, or of the whole tensor only.
    never_negative: whether the graph says so; then its low counts as zero unseen, as every range holds zero. pooled:
    whether the network itself takes the maximum and the mean of each channel; for (N, C, H, W) that are never negative.
    """

    name: str
    per_channel: bool = True
    never_negative: bool = False
    pooled: bool = False


@dataclass(slots=True)
class Statistics:
    """What is remembered of one tensor: the exact extremes of each channel (axis 1), float32, and the sum of each,
    float64, all of shape (C,); count: what went into each sum, elements or means of maps; 0 where nobody asked.

    Tensors of rank 0 and 1 count as one channel.
    """

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    sums: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, x: NDArray[Any], *, per_channel: bool = True, never_negative: bool = False) -> Statistics:
        """The statistics of one batch (N, C, ...). A tensor without elements counts as one zero."""
        if not x.size:
            x = np.zeros((1, 1), np.float32)
        if not per_channel:
            low, high = 0.0 if never_negative else x.min(), x.max()
            return cls(np.array([low], np.float32), np.array([high], np.float32), np.zeros(1), 0)
        rows = x.reshape(len(x), x.shape[1], -1) if x.ndim > 1 else x.reshape(1, 1, -1)
        highs = _over_pictures(np.maximum, rows.max(axis=2))
        lows = np.zeros_like(highs) if never_negative else _over_pictures(np.minimum, rows.min(axis=2))
        # einsum adds up twice as fast as sum, at 1e-5 of relative error
        sums = np.einsum("ncx->nc", rows).sum(axis=0, dtype=np.float64)
        return cls(lows, highs, sums, rows.shape[0] * rows.shape[2])

    @classmethod
    def of_pools(cls, highs: NDArray[np.float32], means: NDArray[np.float32]) -> Statistics:
        """The statistics of maximum and mean of each channel, (N, C, 1, 1) both, of what is never negative."""
        top = highs.max(axis=(0, 2, 3))
        return cls(np.zeros_like(top), top, means.sum(axis=(0, 2, 3), dtype=np.float64), len(means))

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
    session: Session, taps: Iterable[Tap], batches: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, Statistics]:
    """Run every batch once and keep statistics of the tapped tensors, by their names.

    Raises QconvError where a tensor holds NaN or infinity: no range would be right.
    """
    taps = list(taps)
    statistics: dict[str, Statistics] = {}
    inputs = {name for name, _, _ in session.inputs}
    outputs = [name for tap in taps if tap.name not in inputs for name in _outputs_of(tap)]
    with np.errstate(over="ignore", invalid="ignore"):  # infinite values are refused at the end
        for batch in batches:
            seen = {**batch, **dict(zip(outputs, session.run_into_buffers(outputs, batch), strict=True))}
            for tap in taps:
                found = _statistics_of(tap, [seen[name] for name in _outputs_of(tap)])
                known = statistics.get(tap.name)
                statistics[tap.name] = found if known is None else known.merge(found)
    for name, found in statistics.items():
        # a maximum pool may swallow NaN, a mean cannot
        if not np.isfinite([found.low, found.high, *found.sums]).all():
            raise QconvError(
                f"Tensor {name!r} holds NaN or infinite values on these pictures.",
                "check the preprocessing options, the float model on one picture, and its weights.",
            )
    return statistics


@contextlib.contextmanager
def tapped(model: Model, taps: Iterable[Tap]) -> Iterator[str | bytes]:
    """The model as ONNX Runtime takes it, which returns what `watch` wants to see."""
    whole = [tap.name for tap in taps if not tap.pooled]
    with save.runnable(model, whole, [tap.name for tap in taps if tap.pooled]) as runnable:
        yield runnable


def _outputs_of(tap: Tap) -> tuple[str, ...]:
    return save.pooled_names(tap.name) if tap.pooled else (tap.name,)


def _statistics_of(tap: Tap, seen: list[NDArray[Any]]) -> Statistics:
    if tap.pooled:
        return Statistics.of_pools(*seen)
    return Statistics.of(seen[0], per_channel=tap.per_channel, never_negative=tap.never_negative)


def _over_pictures(extreme: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
    """(N, C) -> (C,)."""
    found: NDArray[Any] = rows[0] if len(rows) == 1 else extreme.reduce(rows, axis=0)
    return found
