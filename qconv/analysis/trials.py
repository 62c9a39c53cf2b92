"""This module runs several recipes through the whole pipeline, and measures them on the same images and machine.

The written files are scored on images that no recipe was calibrated with, where there are enough of them, and timed
against each other in turns. The preprocessing is found once. Runs share what they find out of the float network
(`CalibrationCache`); equalization may make a network of its own for a recipe. A sweep is the same for recipes of a
file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.dataset import list_samples
from qconv.data.label_files import USE_EVALUATE
from qconv.data.loader import DataLoader
from qconv.errors import QconvError
from qconv.ir.files import Source, external_data_files, file_bytes, read_proto, refuse_quantized
from qconv.ir.original import open_original
from qconv.metrics.by_labels import DataLabels, open_data_labels
from qconv.metrics.comparison import ReferenceOutputs, collect_reference_outputs, find_task_metric
from qconv.metrics.demands import BY_LABELS
from qconv.metrics.similarity import share_interval
from qconv.pipeline.checks import check_places
from qconv.pipeline.collect import CalibrationCache
from qconv.pipeline.prepare import load_float
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.results.comparison import Sweep
from qconv.results.quantize import Report, Verification
from qconv.results.scores import PART_SQNR, SHARE, Metric, Score
from qconv.results.trials import Trial
from qconv.runtime.benchmark import Benchmark, TimingConditions, benchmark
from qconv.runtime.outputs import find_class_vector
from qconv.runtime.session import RUNTIME_VERSION, Session

MOST_HELD_OUT = 64

HELD_OUT_DIVISOR = 5

SCORED_BYTES = 64 * 2**20
"""Most bytes of the held-out images' inputs and float outputs, which stay in memory."""

TIMING_ROUNDS = 9
"""Rounds of timing, in each of which every file has its turn."""

TIMED_AT_ONCE = 6
"""Files beside the float model that are in memory at the same time."""


@dataclass(frozen=True, slots=True)
class HeldOutImages:
    """Images to score on. most: left to calibrate with. unseen: whether none of those is scored on."""

    feed: DataLoader
    most: int
    unseen: bool


def hold_out_images(session: Session, data: DataOptions, images: Sequence[str], reporter: Reporter) -> HeldOutImages:
    """Take images from `images`, or else the last ones of the draw that `data` reads from its beginning.

    A fifth of all are held out, MOST_HELD_OUT at most. A single image is scored on itself.

    Raises:
        QconvError: The images cannot be fed to the network.
    """
    if images:
        chosen = replace(data, paths=tuple(images), samples=MOST_HELD_OUT, glob=None, arrays=None)
        feed = DataLoader.of(session, chosen, reporter)
        listing = list_samples(data)
        seen = {path.resolve() for path in listing.paths}
        return HeldOutImages(feed, listing.found, unseen=seen.isdisjoint(path.resolve() for path in feed.listing.paths))
    whole = DataLoader.of(session, replace(data, samples=None), reporter)
    paths = whole.listing.paths
    held = min(MOST_HELD_OUT, max(1, len(paths) // HELD_OUT_DIVISOR))
    if len(paths) == held:
        reporter.warn("there is one picture alone: it is calibrated with and scored on, which tells little.")
    return HeldOutImages(whole.over(paths[-held:]), max(1, len(paths) - held), unseen=len(paths) > held)


def open_held_labels(
    data: DataOptions,
    held: HeldOutImages,
    reporter: Reporter,
    images: Sequence[str] = (),
    elsewhere: str = USE_EVALUATE,
) -> DataLabels | None:
    """Read the labels that `data` names of the images to score on.

    Args:
        data: Names them.
        held: The images.
        reporter: Hears of labels that are left out.
        images: As `hold_out_images` takes them.
        elsewhere: What to do where labels are of none of the images.

    Raises:
        QconvError: They cannot be read, or are of none of these images.
    """
    if data.labels is None and data.classes is None:
        return None
    data = replace(data, paths=tuple(images), glob=None) if images else data
    return open_data_labels(data, held.feed.listing.paths, reporter.warn, elsewhere)


def without_labels(data: DataOptions) -> DataOptions:
    """The same for runs that measure nothing by labels: their files are scored afterwards."""
    return replace(data, labels=None, label_map=None, classes=None)


@dataclass(slots=True)
class TrialRun:
    """A trial with the file and the pipeline's report, or why there is none."""

    trial: Trial
    recipe: Recipe
    data: DataOptions
    path: Path
    report: Report | None = None
    failure: QconvError | None = None

    def open(self) -> Session:
        """Open the file that was written."""
        on_ort = TARGETS[self.recipe.target].on_ort
        return Session(str(self.path), name=str(self.path), threads=self.recipe.threads, optimize=on_ort)


@dataclass(slots=True)
class TrialRunner:
    """Carries out recipes on one model and the same images, and keeps all trials."""

    source: Source
    scored: ReferenceOutputs
    reporter: Reporter
    cache: CalibrationCache
    made: list[TrialRun] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        source: Source,
        feed: DataLoader,
        session: Session,
        reporter: Reporter,
        cache: CalibrationCache,
        opened: DataLabels | None = None,
    ) -> TrialRunner:
        """Set up.

        Args:
            source: The float model.
            feed: The images to score on, with their preprocessing.
            session: The float model's.
            reporter: Hears of warnings and of progress.
            cache: What runs on the float model find out only once.
            opened: Labels of the images.

        Raises:
            QconvError: The labels do not suit the network.
        """
        scored = collect_reference_outputs(session, feed, "float", most_bytes=SCORED_BYTES, reporter=reporter)
        if opened is not None:
            labels = opened.fit(scored.network, session.metadata, feed.preprocessing, reporter.warn)
            labels.require_some(feed.listing.paths)
            scored = replace(scored, labels=labels)
        return cls(source, scored, reporter, cache)

    def feed_otherwise(self, feed: DataLoader) -> None:
        """Feed quantized models by `feed` from now on; what the float model says stays."""
        # of the scored batches there may be fewer, for memory
        pairs = zip(feed.iter_batches("float"), self.scored.batches, strict=False)
        self.scored = replace(self.scored, batches=[(feeds, expected) for feeds, (_, expected) in pairs])

    def carry_out(
        self,
        name: str,
        recipe: Recipe,
        data: DataOptions,
        out: Path,
        options: Sequence[str] = (),
        causes: Sequence[str] = (),
    ) -> TrialRun:
        """Quantize by `recipe`, write `out` and score it. A failure is a trial that says why."""
        start = time.perf_counter()
        trial = Trial(name, tuple(options), tuple(causes))
        made = TrialRun(trial, recipe, data, out)
        self.made.append(made)
        try:
            made.report, _ = quantize(self.source, out, recipe, data, self.reporter, self.cache, advises=False)
            found = self.scored.score(made.open(), self.reporter)
        except QconvError as error:
            made.report, made.failure = None, error
            made.trial = replace(trial, failed=f"{error.message} {error.hint}", seconds=time.perf_counter() - start)
            return made
        made.trial = replace(
            trial,
            scores=tuple(self._shown_scores(found)),
            ranked_by=self._find_ranking(found),
            labelled=found.labelled,
            size=made.report.quantized_bytes,
            in_float=made.report.in_float,
            seconds=time.perf_counter() - start,
        )
        return made

    def _find_ranking(self, found: Verification) -> Metric | None:
        """What the task is judged by."""
        return find_task_metric(self.scored.network) if found.labelled is None else found.labelled.metric

    def _shown_scores(self, found: Verification) -> Iterator[Score]:
        """Yield what trials show, first what they are ranked by."""
        ranking, labelled = self._find_ranking(found), found.labelled
        counted = find_class_vector(self.scored.outputs) is not None  # a picture gets one class
        beside = [_with_interval(score, found.images) if counted else score for score in found.scores]
        left_out = () if labelled is None else [own for own, by in BY_LABELS.items() if by == labelled.metric]
        yield from () if labelled is None else labelled.scores[:1]
        yield from (score for score in beside if score.metric == ranking)
        yield from (score for score in beside if score.metric != ranking and score.metric not in left_out)
        yield from _score_parts(found)

    def timed(self, threads: int | None, size: tuple[int, int] | None) -> float | None:
        """Time all files beside the float model, in turns. Returns the float model's median in ms.

        Trials get their times, and ratios to the float model's. None, and no times, where nothing can be timed: the
        float model came from a pipe, or files are for another runtime.
        """
        able = [made for made in self.made if not made.trial.failed and TARGETS[made.recipe.target].on_ort]
        if self.source.path is None or not able:
            return None
        float_ms: list[float] = []
        for start in range(0, len(able), TIMED_AT_ONCE):
            some = able[start : start + TIMED_AT_ONCE]
            try:
                found = self._benchmark([str(self.source.path), *(str(made.path) for made in some)], threads, size)
            except QconvError as error:
                self.reporter.warn(f"nothing was timed: {error.message}")
                return None
            first, *others = found.timings
            float_ms.append(first.median_ms)
            for made, timing in zip(some, others, strict=True):
                # what the float model takes drifts from group to group
                steady = timing.ratio_to(first)[1] * float_ms[0]
                made.trial = replace(made.trial, ms=steady, ratio=timing.ratio_to(first))
        return float_ms[0]

    def _benchmark(self, paths: Sequence[str], threads: int | None, size: tuple[int, int] | None) -> Benchmark:
        conditions = TimingConditions(threads, None, size, TIMING_ROUNDS)
        return benchmark(paths, conditions, version=RUNTIME_VERSION, reporter=self.reporter)


def _score_parts(found: Verification) -> tuple[Score, ...]:
    """The mean SQNR over the parts of the worst output that has some; nothing where none has."""
    parted = [[part.sqnr_db for part in output.parts if part.sqnr_db is not None] for output in found.outputs]
    means = [sum(own) / len(own) for own in parted if own]
    return (Score(PART_SQNR, min(means, default=None)),) if any(output.parts for output in found.outputs) else ()


def _with_interval(score: Score, images: int) -> Score:
    """A share of so many pictures with its interval; other scores as they are."""
    if score.unit != SHARE or score.value is None:
        return score
    return replace(score, interval=share_interval(round(score.value * images), images))


@dataclass(frozen=True, slots=True)
class SweepEntry:
    """A recipe with its name, where its file goes, and its own options, beyond those that all share."""

    name: str
    recipe: Recipe
    data: DataOptions
    out: Path
    options: tuple[str, ...] = ()


def run_sweep(source: Source, entries: Sequence[SweepEntry], reporter: Reporter | None = None) -> Sweep:
    """Carry all recipes out, in their order. They must read the same images.

    A recipe that fails is a trial that says why; the others go on.

    Raises:
        QconvError: None can be carried out.
    """
    reporter = reporter or Reporter()
    proto = read_proto(source)
    refuse_quantized(proto, source.name)
    shared, data = entries[0].recipe, entries[0].data
    written = {f"the output of {entry.name}": entry.out for entry in entries}
    check_places(source, external_data_files(proto, source), written, data.paths)
    session = open_original(source, shared.threads, data.tasks)
    held = hold_out_images(session, data, (), reporter)
    opened = open_held_labels(data, held, reporter)
    del session
    data = replace(data, samples=min(data.samples or held.most, held.most))
    cache = CalibrationCache()
    loaded = load_float(source, shared, data, reporter.without_warnings(), cache=cache, hold_back=True)
    held.feed.preprocessing = loaded.data.preprocessing
    del loaded
    if shared.embed_preprocessing is not None:
        held.feed.take_pixels(shared.embed_preprocessing)
    session = open_original(source, shared.threads, data.tasks)
    proof = TrialRunner.of(source, held.feed, session, reporter, cache, opened)
    del session
    for done, entry in enumerate(entries):
        reporter.progress("recipes", done, len(entries))
        proof.reporter = reporter.of_part(entry.name)
        own = data if entry.recipe.max_drop is not None else without_labels(data)
        proof.carry_out(entry.name, entry.recipe, own, entry.out, entry.options)
    failures = [made.failure for made in proof.made if made.failure is not None]
    if len(failures) == len(entries):
        raise failures[0]
    proof.reporter = reporter
    float_ms = proof.timed(shared.threads, held.feed.size)
    trials, outputs = tuple(made.trial for made in proof.made), tuple(str(entry.out) for entry in entries)
    return Sweep(
        source.name,
        file_bytes(read_proto(source), source),
        float_ms,
        proof.scored.pictures,
        held.unseen,
        trials,
        outputs,
        proof.scored.given,
    )
