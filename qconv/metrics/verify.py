"""The saved file against the user's own float model: SQNR, agreement, and whether it got slower.

SQNR = 10 log10(sum ref^2 / sum (ref - q)^2), in dB, per output over all pictures
agreement = share of argmax positions (axis 1) equal to the float model's; of elements, for outputs of whole numbers
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import QconvError
from qconv.metrics.intervals import Interval, by_bootstrap
from qconv.results.quantize import Gate, OutputScore, Verification
from qconv.runtime.session import Session

FEWEST_TIMED = 5
SPREAD = (10, 90)

Batch = dict[str, NDArray[Any]]


@dataclass(slots=True)
class _Tally:
    signal: float = 0.0
    noise: float = 0.0
    equal: int = 0
    positions: int = 0
    measured: bool = False
    seen: int = 0
    finite: int = 0
    remark: str = ""
    rows: list[tuple[float, float]] = field(default_factory=list)

    def update(self, reference: Any, quantized: Any) -> None:
        if not (_is_numbers(reference) and _is_numbers(quantized)):
            self.remark = "no tensor of numbers, so it was not compared"
        elif reference.shape != quantized.shape:
            self.remark = "its shape depends on the data, so it was not compared"
        elif reference.dtype.kind == "f":
            self._compare(reference, quantized)
        else:  # classes, indices, masks: equal or not
            self.equal += int((reference == quantized).sum())
            self.positions += reference.size

    def _compare(self, reference: NDArray[Any], quantized: NDArray[Any]) -> None:
        self.measured = True
        finite = np.isfinite(reference)  # where the float model itself has no number there is nothing to keep
        self.seen += reference.size
        self.finite += int(finite.sum())
        ref, got = reference[finite].astype(np.float64), quantized[finite].astype(np.float64)
        signal, noise = float(np.sum(ref * ref)), float(np.sum(np.where(np.isfinite(got), (ref - got) ** 2, np.inf)))
        self.signal += signal
        self.noise += noise
        self.rows.append((signal, noise))
        if is_class_score(reference.shape):
            same = reference.argmax(axis=1) == quantized.argmax(axis=1)
            self.equal += int(same.sum())
            self.positions += same.size

    def score(self, name: str, *, spans: bool) -> OutputScore:
        """Raises QconvError where the float model gave no number at all."""
        if self.remark:
            return OutputScore(name, None, None, self.remark)
        agreement = self.equal / self.positions if self.positions else None
        if not self.measured:
            return OutputScore(name, None, agreement)
        if self.seen and not self.finite:
            fact = f"Output {name} of the float model holds NaN or infinity alone, on all pictures."
            raise QconvError(fact, "check the model's weights, and how pictures are fed.")
        remark = (
            "" if self.noise < math.inf else "the quantized model gives NaN or infinity where the float model does not"
        )
        span = self._span() if spans and 0 < self.noise < math.inf else None
        return OutputScore(name, sqnr_db(self.signal, self.noise), agreement, remark, span)

    def _span(self) -> Interval | None:
        return by_bootstrap(np.array(self.rows), lambda sums: 10 * np.log10(sums[:, 0] / sums[:, 1]))


def _is_numbers(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiub"


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where the noise is zero.

    A signal of zero and a noise without bound count as the least and the largest float.
    """
    if noise == 0:
        return None
    limits = np.finfo(np.float64)
    return 10 * (math.log10(max(signal, limits.tiny)) - math.log10(min(noise, limits.max)))


def is_class_score(shape: Sequence[int | None]) -> bool:
    """Whether axis 1 of an output holds class scores: a vector a picture, or a map that is no picture itself."""
    classes = shape[1] if len(shape) in (2, 4) else None
    return classes is not None and classes > 1 and not (len(shape) == 4 and classes == 3)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All outputs of two models, run on the same batches, added up."""

    tallies: dict[str, _Tally]

    @classmethod
    def of(cls, outputs: Sequence[str]) -> Comparison:
        """Nothing compared yet. outputs: their names, in the order in which `add` gets them."""
        return cls({name: _Tally() for name in outputs})

    def add(self, reference: Sequence[Any], quantized: Sequence[Any]) -> None:
        """Take in the outputs of one batch."""
        for tally, ref, got in zip(self.tallies.values(), reference, quantized, strict=True):
            tally.update(ref, got)

    def scores(self, *, spans: bool = False) -> tuple[OutputScore, ...]:
        """How every output compares. spans: with the interval of its SQNR, each batch taken for one draw."""
        return tuple(tally.score(name, spans=spans) for name, tally in self.tallies.items())


def verify(
    reference: Session,
    quantized: Session,
    batches: Iterable[Batch],
    as_float: Callable[[Batch], Batch] = lambda feeds: feeds,
) -> Verification:
    """Run both on every batch, one after the other.

    batches: what the quantized model is fed with; as_float: makes of it what the reference is fed with.
    """
    comparison = Comparison.of(reference.outputs)
    seconds: list[tuple[float, float]] = []
    images = 0
    for feeds in batches:
        floats = as_float(feeds)
        start = time.perf_counter()
        expected = reference.run_all(floats)
        middle = time.perf_counter()
        got = quantized.run(reference.outputs, feeds)
        seconds.append((middle - start, time.perf_counter() - middle))
        images += len(next(iter(feeds.values())))
        comparison.add(expected, got)
    slowdown = spread = None
    if len(seconds) >= FEWEST_TIMED:
        slow, fast = np.array(seconds[1:]).T
        slowdown = float(np.median(fast) / np.median(slow))
        low, high = np.percentile(fast / slow, SPREAD)
        spread = float(low), float(high)
    return Verification(images, comparison.scores(spans=True), slowdown, spread)


def gates(verification: Verification, min_agreement: float | None, min_sqnr: float | None) -> list[Gate]:
    """The user's demands against what was measured. Equal outputs pass any SQNR; no class score passes no agreement."""
    found = []
    if min_agreement is not None:
        got = verification.agreement
        found.append(Gate("min-agreement", min_agreement, got, got is not None and got >= min_agreement))
    if min_sqnr is not None:
        decibel = verification.sqnr_db
        held = verification.equal if decibel is None else decibel >= min_sqnr
        found.append(Gate("min-sqnr", min_sqnr, decibel, held))
    return found
