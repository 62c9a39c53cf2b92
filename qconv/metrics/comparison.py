"""Compares the outputs of two models (SQNR, agreement, slowdown), and computes confidence intervals.

    SQNR       = 10 log10(sum ref^2 / sum (ref - q)^2), in dB, per output over all images
    agreement  = share of argmax positions (axis 1) equal to the float model's; of elements, for integer outputs

    share       Wilson 1927: (p + z^2/2n +- z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)
    difference  of two shares on the same images, Agresti and Min 2005: 1/2 is added to each of the four cells
    test        McNemar's, exact (1947): of n images that only one of two models gets right, is the split a coin's?
    the rest    the bootstrap over images (Efron 1979): percentiles of the measure on resampled images

Images are taken as drawn independently. None of it says anything about images of another kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.loader import Batch, DataLoader
from qconv.errors import QconvError
from qconv.reporter import Reporter
from qconv.results.quantize import Gate, OutputScore, Verification
from qconv.runtime.outputs import ModelOutput, OutputKind
from qconv.runtime.session import Session

Z_975 = 1.959963984540054  # the normal distribution's 97.5th percentile

RESAMPLES = 1000

SIGNIFICANT = 0.05

Interval = tuple[float, float]


def share_interval(hits: int, count: int) -> Interval | None:
    """The interval of the share `hits` of `count` images; None without images."""
    if not count:
        return None
    share, z2 = hits / count, Z_975 * Z_975 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z_975 * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return middle - half if hits else 0.0, middle + half if hits < count else 1.0


def difference_interval(won: int, lost: int, count: int) -> Interval | None:
    """The interval of one share less another.

    won, lost: images of `count` that only the first, only the second counts.
    """
    if not count:
        return None
    whole, moved = count + 2.0, won - lost
    half = Z_975 * math.sqrt(max(won + lost + 1 - moved * moved / whole, 0.0)) / whole
    return max(-1.0, moved / whole - half), min(1.0, moved / whole + half)


def mcnemar_p_value(won: int, lost: int) -> float:
    """Two-sided p-value: how often a fair coin splits `won + lost` throws at least as unevenly."""
    throws = won + lost
    # Python's whole numbers are exact, floats of 2^-2000 are not
    tail = sum(math.comb(throws, k) for k in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**throws))


def bootstrap_interval(
    rows: NDArray[np.float64], measure: Callable[[NDArray[np.float64]], NDArray[Any]]
) -> Interval | None:
    """The interval of `measure` of the sums of `rows` over images.

    rows: (images, k). measure: sums (resamples, k) -> (resamples,). None where it is not finite, or of fewer than two
    pictures. Seeded: the same rows give the same interval.
    """
    count = len(rows)
    if count < 2:
        return None
    rng = np.random.default_rng(0)
    sums = np.stack([rng.multinomial(count, np.full(count, 1 / count)) @ rows for _ in range(RESAMPLES)])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = measure(sums)
    low, high = np.percentile(found, (2.5, 97.5)) if np.isfinite(found).all() else (np.nan, np.nan)
    return (float(low), float(high)) if np.isfinite(low) else None


FEWEST_TIMED_RUNS = 5

SLOWDOWN_PERCENTILES = (10, 90)

CLASS_KINDS = frozenset({OutputKind.CLASS_SCORES, OutputKind.CLASS_MAP})
"""Outputs of which the highest score says a class."""

LARGEST_POWER = 1e200
"""Power of what holds NaN or infinity: what can still be added up."""

InputBatch = dict[str, NDArray[Any]]


@dataclass(slots=True)
class _Tally:
    output: ModelOutput
    kind: OutputKind | None = None
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
        if self.kind is None and isinstance(reference, np.ndarray):
            self.output = self.output.seen(reference.shape)
            self.kind = self.output.kind
        if not (_is_numeric_array(reference) and _is_numeric_array(quantized)):
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
        self.seen += reference.size
        self.finite += int(np.isfinite(reference).sum())
        signal, noise = measure_error(reference, quantized)
        self.signal += signal
        self.noise += noise
        self.rows.append((signal, noise))
        if self.kind in CLASS_KINDS and reference.shape[self.output.axis] > 1:
            same = reference.argmax(axis=self.output.axis) == quantized.argmax(axis=self.output.axis)
            self.equal += int(same.sum())
            self.positions += same.size

    def score(self, *, spans: bool) -> OutputScore:
        """Raises QconvError where the float model gave no number at all."""
        name, kind = self.output.name, self.output.kind
        if self.remark:
            return OutputScore(name, None, None, self.remark, kind=kind)
        agreement = self.equal / self.positions if self.positions else None
        if not self.measured:
            return OutputScore(name, None, agreement, kind=kind)
        if self.seen and not self.finite:
            fact = f"Output {name} of the float model holds NaN or infinity alone, on all pictures."
            raise QconvError(fact, "check the model's weights, and how pictures are fed.")
        remark = (
            "" if self.noise < math.inf else "the quantized model gives NaN or infinity where the float model does not"
        )
        span = sqnr_interval(np.array(self.rows)) if spans and 0 < self.noise < math.inf else None
        return OutputScore(name, compute_sqnr_db(self.signal, self.noise), agreement, remark, span, kind)


def _is_numeric_array(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiub"


def compute_sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where the noise is zero.

    A signal of zero and a noise without bound count as the least and the largest float.
    """
    if noise == 0:
        return None
    limits = np.finfo(np.float64)
    return 10 * (math.log10(max(signal, limits.tiny)) - math.log10(min(noise, limits.max)))


def measure_error(reference: NDArray[Any], got: NDArray[Any]) -> tuple[float, float]:
    """Signal and noise of one batch, as float64: sum ref^2 and sum (ref - got)^2.

    Where the reference itself is NaN or infinite there is nothing to be near to, and nothing counts. The noise is
    infinite where only `got` is.
    """
    finite = np.isfinite(reference)
    ref, other = reference[finite].astype(np.float64), got[finite].astype(np.float64)
    noise = np.sum(np.where(np.isfinite(other), (ref - other) ** 2, np.inf))
    return float(np.sum(ref * ref)), float(noise)


def signal_power(x: NDArray[Any]) -> float:
    """Sum of squares in float32, for tensors of layers, which are large; LARGEST_POWER where that is no number."""
    flat = x.reshape(-1).astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(flat, flat))
        if not math.isfinite(found):
            found = float(np.sum(flat.astype(np.float64) ** 2))
    return found if math.isfinite(found) else LARGEST_POWER


def sqnr_interval(rows: NDArray[np.float64]) -> Interval | None:
    """Of SQNR in dB, by the bootstrap. rows: signal and noise of each draw, (draws, 2)."""
    return bootstrap_interval(rows, lambda sums: 10 * np.log10(sums[:, 0] / sums[:, 1]))


@dataclass(frozen=True, slots=True)
class ComparisonAccumulator:
    """Accumulates the comparison of all outputs of two models on the same batches."""

    tallies: tuple[_Tally, ...]

    @classmethod
    def of(cls, outputs: Sequence[ModelOutput]) -> ComparisonAccumulator:
        """Nothing compared yet. outputs: in the order in which `add` gets them."""
        return cls(tuple(map(_Tally, outputs)))

    def add(self, reference: Sequence[Any], quantized: Sequence[Any]) -> None:
        """Take in the outputs of one batch."""
        for tally, ref, got in zip(self.tallies, reference, quantized, strict=True):
            tally.update(ref, got)

    def scores(self, *, spans: bool = False) -> tuple[OutputScore, ...]:
        """How every output compares. spans: with the interval of its SQNR, each batch taken for one draw."""
        return tuple(tally.score(spans=spans) for tally in self.tallies)


def verify(
    reference: Session,
    quantized: Session,
    batches: Iterable[InputBatch],
    as_float: Callable[[InputBatch], InputBatch] = lambda feeds: feeds,
) -> Verification:
    """Run both on every batch, one after the other.

    batches: what the quantized model is fed with; as_float: makes of it what the reference is fed with.
    """
    comparison = ComparisonAccumulator.of(reference.model_outputs)
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
    if len(seconds) >= FEWEST_TIMED_RUNS:
        slow, fast = np.array(seconds[1:]).T
        slowdown = float(np.median(fast) / np.median(slow))
        low, high = np.percentile(fast / slow, SLOWDOWN_PERCENTILES)
        spread = float(low), float(high)
    return Verification(images, comparison.scores(spans=True), slowdown, spread)


def check_gates(verification: Verification, min_agreement: float | None, min_sqnr: float | None) -> list[Gate]:
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


OutputArrays = list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """Batches with the float model's outputs, to score any number of models on. pictures: how many they hold."""

    outputs: tuple[ModelOutput, ...]
    batches: list[tuple[Batch, OutputArrays]]
    pictures: int

    def score(self, quantized: Session, hear: Callable[[OutputArrays], None] = lambda outputs: None) -> Verification:
        """`quantized` against the float model. hear: gets what it says of each batch."""
        comparison, names = ComparisonAccumulator.of(self.outputs), [output.name for output in self.outputs]
        for feeds, expected in self.batches:
            got = quantized.run(names, feeds)
            comparison.add(expected, got)
            hear(got)
        return Verification(self.pictures, comparison.scores())


def collect_reference_outputs(
    session: Session,
    feed: DataLoader,
    stage: str,
    *,
    most_bytes: int,
    reporter: Reporter,
    batches: Collection[int] | None = None,
) -> ReferenceOutputs:
    """Run the float model on the pictures of `feed`, as many as there is room for with their outputs.

    batches: those that count; None for all.
    """
    kept: list[tuple[Batch, OutputArrays]] = []
    size, total = 0, len(feed.listing.paths)
    for index, feeds in enumerate(feed.all(stage)):
        if batches is not None and index not in batches:
            continue
        kept.append((feeds, session.run_all(feed.as_float(feeds))))
        size += sum(a.nbytes for a in (*feeds.values(), *kept[-1][1]) if isinstance(a, np.ndarray))
        if size >= most_bytes:
            break
    seen = sum(len(next(iter(feeds.values()))) for feeds, _ in kept)
    pictures = min(seen, total)
    if size >= most_bytes and pictures < total:
        reporter.warn(
            f"scored on {pictures} of {total} pictures: inputs and outputs of more would not fit into memory kept."
        )
    outputs = session.model_outputs
    if kept:
        outputs = tuple(o.seen(np.shape(array)) for o, array in zip(outputs, kept[0][1], strict=True))
    return ReferenceOutputs(outputs, kept, pictures)
