"""Compares the outputs of two models, batch by batch, by the metrics that are registered here.

VERIFIED and EVALUATED say what is measured of which outputs: that depends on what an output holds (`runtime.outputs`).
A new metric is a class like `similarity.Sqnr`, and a line here. Reports, JSON, CSV and pages print whatever is
measured: none of them names a metric.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconv.data.loader import Batch, DataLoader, count_images
from qconv.decoding.head import OutputPart
from qconv.errors import QconvError, format_count
from qconv.metrics.by_labels import LabelledPair, Labels, Measure, add_batch
from qconv.metrics.classification import Agreement, ClassAgreement
from qconv.metrics.detection import DetectionComparison
from qconv.metrics.embeddings import Nearest, PictureCosine
from qconv.metrics.keypoints import mean_distance, pck
from qconv.metrics.network_outputs import BatchOutputs, NetworkOutputs, describe_outputs
from qconv.metrics.output_parts import sum_errors
from qconv.metrics.pictures import Psnr, RelativeError, Ssim
from qconv.metrics.segmentation import FloatMiou
from qconv.metrics.similarity import LARGEST_NOISE, Cosine, Sqnr, compute_sqnr_db
from qconv.reporter import Reporter
from qconv.results.quantize import OutputScore, PartScore, Verification
from qconv.results.scores import AGREEMENT, BOXES, FLOAT_MIOU, PCK, PICTURE_COSINE, Metric, Score
from qconv.runtime.outputs import ModelOutput, OutputKind
from qconv.runtime.session import Session


class PairMetric(Protocol):
    """Adds up what one output of two models is like, batch by batch."""

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch; both arrays are of one shape."""

    def score(self, *, spans: bool) -> Score | None:
        """What was measured, None where it says nothing. spans: with its interval, each batch taken for one draw."""


MetricsOfKind = Mapping[OutputKind, tuple[Callable[[ModelOutput], PairMetric], ...]]

VERIFIED: MetricsOfKind = {
    OutputKind.CLASS_SCORES: (Sqnr, Agreement),
    OutputKind.CLASS_MAP: (Sqnr, FloatMiou, Agreement),
    OutputKind.CLASS_IDS: (Agreement, FloatMiou),
    OutputKind.DETECTIONS: (Sqnr,),
    OutputKind.EMBEDDING: (Sqnr, PictureCosine, Nearest),
    OutputKind.KEYPOINTS: (Sqnr, pck, mean_distance),
    OutputKind.REGRESSION: (Sqnr,),
    OutputKind.INTEGER: (Agreement,),
}
"""What every check and every candidate of a search is measured by."""

EVALUATED: MetricsOfKind = {
    **VERIFIED,
    OutputKind.CLASS_SCORES: (Sqnr, Agreement, ClassAgreement, Cosine),
    OutputKind.CLASS_MAP: (Sqnr, FloatMiou, Agreement, ClassAgreement, Cosine),
    OutputKind.DETECTIONS: (Sqnr, Cosine),
    OutputKind.EMBEDDING: (Sqnr, PictureCosine, Nearest, Cosine),
    OutputKind.KEYPOINTS: (Sqnr, pck, mean_distance, Cosine),
    OutputKind.REGRESSION: (Sqnr, Psnr, Ssim, Cosine, RelativeError),
}
"""What `evaluate --against` measures."""

JUDGED_BY: Mapping[OutputKind, Metric] = {
    OutputKind.CLASS_SCORES: AGREEMENT,
    OutputKind.CLASS_MAP: FLOAT_MIOU,
    OutputKind.CLASS_IDS: FLOAT_MIOU,
    OutputKind.EMBEDDING: PICTURE_COSINE,
    OutputKind.KEYPOINTS: PCK,
}
"""What a task is judged by without labels; boxes by how many of the float model's are found."""


def find_task_metric(network: NetworkOutputs) -> Metric | None:
    """What a network's task is judged by without labels; None where that is SQNR."""
    if network.head is not None:
        return BOXES
    if all(output.kind is OutputKind.INTEGER for output in network.outputs):  # which have no SQNR
        return AGREEMENT
    return next((JUDGED_BY[output.kind] for output in network.outputs if output.kind in JUDGED_BY), None)


FEWEST_TIMED_RUNS = 5

SLOWDOWN_PERCENTILES = (10, 90)

InputBatch = dict[str, NDArray[Any]]


@dataclass(slots=True)
class _OutputTally:
    """All metrics of one output. seen, finite: numbers of the reference, and those of them that are finite.

    empty, batches: how many had none, which no metric can take, and how many there were. parts: what it is joined of;
    errors: signal and noise of each, (parts, 2).
    """

    output: ModelOutput
    registry: MetricsOfKind
    parts: tuple[OutputPart, ...] = ()
    errors: NDArray[np.float64] | None = None
    metrics: list[PairMetric] | None = None
    seen: int = 0
    finite: int = 0
    broken: bool = False
    empty: int = 0
    batches: int = 0
    remark: str = ""

    def update(self, reference: Any, quantized: Any, everything: Mapping[str, Any]) -> None:
        """everything: all that the reference says, by name."""
        if not (_is_numeric_array(reference) and _is_numeric_array(quantized)):
            self.remark = "no tensor of numbers for each picture, so it was not compared"
            return
        if reference.shape != quantized.shape:
            self.remark = "its shape depends on the data, so it was not compared"
            return
        self.batches += 1
        if not reference.size:
            self.empty += 1
            return
        if self.metrics is None:
            self.output = self.output.seen(reference.shape)
            self.metrics = [make(self.output) for make in self.registry[self.output.kind]]
        finite = np.isfinite(reference)
        self.seen += reference.size
        self.finite += int(finite.sum())
        self.broken = self.broken or not np.isfinite(quantized[finite]).all()
        for metric in self.metrics:
            metric.update(reference, quantized)
        if self.parts:
            found = sum_errors({self.output.name: self.parts}, [self.output.name], [reference], [quantized], everything)
            self.errors = found if self.errors is None else self.errors + found

    def score(self, *, spans: bool) -> OutputScore:
        """Raises QconvError where the float model gave no number at all."""
        name, kind = self.output.name, self.output.kind
        if self.remark:
            return OutputScore(name, (), self.remark, kind)
        if self.empty and not self.seen:
            return OutputScore(name, (), "it is empty on all pictures, so there was nothing to compare", kind)
        if self.seen and not self.finite:
            fact = f"Output {name} of the float model holds NaN or infinity alone, on all pictures."
            raise QconvError(fact, "check the model's weights, and how pictures are fed.")
        found = [metric.score(spans=spans) for metric in self.metrics or ()]
        some = f"it is empty on {self.empty} of {format_count(self.batches, 'batch')}, and compared on the others"
        remark = some if self.empty else ""
        if self.broken:
            remark = "the quantized model gives NaN or infinity where the float model does not"
        parts = tuple(
            PartScore(part.name, compute_sqnr_db(signal, min(noise, LARGEST_NOISE)))
            for part, (signal, noise, _) in zip(
                self.parts, self.errors if self.errors is not None else (), strict=False
            )
        )
        return OutputScore(name, tuple(score for score in found if score is not None), remark, kind, parts)


def _is_numeric_array(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "fiub"


@dataclass(frozen=True, slots=True)
class ComparisonAccumulator:
    """Accumulates the comparison of all outputs of two models on the same batches."""

    network: NetworkOutputs
    tallies: tuple[_OutputTally, ...]
    detections: DetectionComparison | None = None

    @classmethod
    def of(cls, network: NetworkOutputs, registry: MetricsOfKind = VERIFIED) -> ComparisonAccumulator:
        """Nothing compared yet. network: outputs in the order in which `add` gets them. registry: what is measured."""
        head = network.head
        return cls(
            network,
            tuple(_OutputTally(output, registry, network.parts.get(output.name, ())) for output in network.outputs),
            None if head is None else DetectionComparison(head),
        )

    def add(self, reference: Sequence[Any], quantized: Sequence[Any]) -> None:
        """Take in the outputs of one batch."""
        self.add_heard(self.network.hear(reference, reference=True), self.network.hear(quantized))

    def add_heard(self, reference: BatchOutputs, quantized: BatchOutputs) -> None:
        """Take in the outputs of one batch, of which others may read detections as well."""
        everything = reference.by_name
        for tally, ref, got in zip(self.tallies, reference.arrays, quantized.arrays, strict=True):
            tally.update(ref, got, everything)
        if self.detections is not None:
            self.detections.update(reference.detections, quantized.detections)

    def heads(self, *, spans: bool = False) -> tuple[OutputScore, ...]:
        """How what is read from several outputs together compares. spans: with intervals."""
        if self.detections is None:
            return ()
        head = self.detections.head
        name = ", ".join(head.outputs)
        return (OutputScore(name, self.detections.scores(spans=spans), kind=OutputKind.DETECTIONS),)

    def scores(self, *, spans: bool = False) -> tuple[OutputScore, ...]:
        """How every output compares. spans: with intervals, each batch taken for one draw."""
        return tuple(tally.score(spans=spans) for tally in self.tallies)

    def all_scores(self) -> tuple[OutputScore, ...]:
        """How every output compares, and what is read from several together, with intervals."""
        return (*self.scores(spans=True), *self.heads(spans=True))


@dataclass(frozen=True, slots=True)
class LabelledBatches:
    """Labels of the pictures in batches. paths: the pictures, in their order."""

    labels: Labels
    paths: Iterator[Path]


def verify(
    reference: Session,
    quantized: Session,
    batches: Iterable[InputBatch],
    as_float: Callable[[InputBatch], InputBatch] = lambda feeds: feeds,
    labels: LabelledBatches | None = None,
) -> Verification:
    """Run both on every batch, one after the other.

    batches: what the quantized model is fed with; as_float: makes of it what the reference is fed with. labels: of the
    pictures in them.
    """
    comparison: ComparisonAccumulator | None = None
    pair = None if labels is None else LabelledPair.of(labels.labels)
    seconds: list[tuple[float, float]] = []
    images = 0
    for feeds in batches:
        floats = as_float(feeds)
        start = time.perf_counter()
        expected = reference.run_all(floats)
        middle = time.perf_counter()
        got = quantized.run(reference.outputs, feeds)
        seconds.append((middle - start, time.perf_counter() - middle))
        size = count_images(feeds)
        images += size
        comparison = comparison or ComparisonAccumulator.of(describe_outputs(reference, floats, expected))
        both = comparison.network.hear(expected, reference=True), comparison.network.hear(got)
        comparison.add_heard(*both)
        if pair is not None and labels is not None:
            pair.add(tuple(itertools.islice(labels.paths, size)), size, *both)
    comparison = comparison or ComparisonAccumulator.of(NetworkOutputs(reference.model_outputs))
    slowdown = spread = None
    if len(seconds) >= FEWEST_TIMED_RUNS:
        slow, fast = np.array(seconds[1:]).T
        slowdown = float(np.median(fast) / np.median(slow))
        low, high = np.percentile(fast / slow, SLOWDOWN_PERCENTILES)
        spread = float(low), float(high)
    scores, heads = comparison.scores(spans=True), comparison.heads(spans=True)
    labelled = None if pair is None else pair.scores()
    return Verification(images, scores, slowdown, spread, heads=heads, labelled=labelled)


MOST_REPEATED_BATCHES = 8


def describe_differing_runs(
    what: str, session: Session, plain: Callable[[], Session], batches: Iterable[InputBatch]
) -> str:
    """A sentence on a model that draws at random, as `what` says: by how much two runs on the same pictures differ.

    session: the model as users run it. plain: opens it without the runtime's optimizations, which leave out a Dropout
    between two nodes although it is in training mode. Empty where no two runs differ, or none can be compared.
    """
    feeds = list(itertools.islice(batches, MOST_REPEATED_BATCHES))
    optimized = verify(session, session, feeds)
    if optimized.differs:
        return (
            f"{what}, so that two runs of the float model on the same pictures differ: {optimized.in_words}; no result "
            "can be nearer to it than it is to itself."
        )
    unoptimized = plain()
    apart = verify(unoptimized, unoptimized, feeds)
    if not apart.differs:
        return ""
    return (
        f"{what}: run as it stands, two runs of the float model on the same pictures differ by {apart.in_words}. "
        "ONNX Runtime's optimizer takes it out, and the result is compared without it."
    )


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """Batches with the float model's outputs, to score any number of models on.

    Attributes:
        network: What the outputs are.
        batches: Inputs and outputs, of which detections are read once for all models.
        pictures: How many they hold.
        given: How many there were, of which others did not fit into memory.
        paths: The pictures in each batch.
        labels: Of the pictures; None where there are none.
    """

    network: NetworkOutputs
    batches: list[tuple[Batch, BatchOutputs]]
    pictures: int
    given: int = 0
    paths: list[tuple[Path, ...]] = field(default_factory=list)
    labels: Labels | None = None
    _measured: list[Measure] = field(default_factory=list)

    def score(self, quantized: Session, reporter: Reporter | None = None) -> Verification:
        """`quantized` against the float model. reporter: hears how many pictures are scored."""
        reporter = reporter or Reporter()
        done = 0
        comparison, names = ComparisonAccumulator.of(self.network), self.network.names
        pair = None if self.labels is None else LabelledPair.of(self.labels, self.float_measure)
        for place, (feeds, expected) in enumerate(self.batches):
            got = self.network.hear(quantized.run(names, feeds))
            comparison.add_heard(expected, got)
            if pair is not None:
                add_batch(pair.own, self.paths[place], count_images(feeds), got)
            done += count_images(feeds)
            reporter.progress("score", min(done, self.pictures), self.pictures)
        labelled = None if pair is None else pair.scores()
        return Verification(self.pictures, comparison.scores(), heads=comparison.heads(), labelled=labelled)

    @property
    def float_measure(self) -> Measure | None:
        """How right the float model is by labels; None where there are none."""
        if self.labels is not None and not self._measured:
            measure = self.labels.start()
            for paths, (feeds, expected) in zip(self.paths, self.batches, strict=True):
                add_batch(measure, paths, count_images(feeds), expected)
            self._measured.append(measure)
        return self._measured[0] if self._measured else None

    @property
    def outputs(self) -> tuple[ModelOutput, ...]:
        """What the outputs are."""
        return self.network.outputs


def collect_reference_outputs(
    session: Session,
    feed: DataLoader,
    stage: str,
    *,
    most_bytes: int,
    reporter: Reporter,
    batches: Collection[int] | None = None,
    labels: Labels | None = None,
) -> ReferenceOutputs:
    """Run the float model on the pictures of `feed`, as many as there is room for with their outputs.

    batches: those that count; None for all. labels: of the pictures.
    """
    kept: list[tuple[Batch, list[Any]]] = []
    paths: list[tuple[Path, ...]] = []
    size, total, left = 0, len(feed.listing.paths), feed.iter_paths()
    for index, feeds in enumerate(feed.iter_batches(stage)):
        own = tuple(itertools.islice(left, count_images(feeds)))
        if batches is not None and index not in batches:
            continue
        kept.append((feeds, session.run_all(feed.as_float(feeds))))
        paths.append(own)
        size += sum(a.nbytes for a in (*feeds.values(), *kept[-1][1]) if isinstance(a, np.ndarray))
        if size >= most_bytes:
            break
    seen = sum(count_images(feeds) for feeds, _ in kept)
    pictures = min(seen, total)
    if size >= most_bytes and pictures < total:
        reporter.warn(
            f"scored on {pictures} of {total} pictures: inputs and outputs of more would not fit into memory kept."
        )
    network = NetworkOutputs(session.model_outputs)
    if kept:
        network = describe_outputs(session, *kept[0])
    heard = [(feeds, network.hear(arrays, reference=True)) for feeds, arrays in kept]
    given = total if size >= most_bytes else pictures
    return ReferenceOutputs(network, heard, pictures, given, paths, labels)
