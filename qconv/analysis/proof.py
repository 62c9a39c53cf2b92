"""Recipes carried out by the whole pipeline, one after the other, and measured on the same pictures and machine.

What is scored is the written file, on pictures that no recipe was calibrated with where there are enough of them, and
all files are timed against each other in turns. Runs share what they find out of the float network (gather.Memory).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qconv.analysis.evaluate import class_vector
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.dataset import find_files
from qconv.data.loader import DataLoader
from qconv.errors import QconvError
from qconv.ir.files import Source, open_original
from qconv.metrics import comparison
from qconv.metrics.comparison import OutputArrays, ReferenceOutputs, collect_reference_outputs
from qconv.pipeline.collect import CalibrationCache
from qconv.pipeline.quantize import Listener, quantize
from qconv.results.comparison import Trial
from qconv.results.quantize import Report
from qconv.runtime.benchmark import Benchmark, TimingConditions, benchmark
from qconv.runtime.session import RUNTIME_VERSION, Session

MOST_HELD_BACK = 64
HELD_BACK_SHARE = 5
SCORED_BYTES = 64 * 2**20
"""Inputs and float outputs of the pictures to score on, which stay in memory."""
ROUNDS = 9
"""Turns that each file gets when it is timed."""
TIMED_AT_ONCE = 6
"""Files beside the float model that are in memory at the same time."""


@dataclass(frozen=True, slots=True)
class Held:
    """Pictures to score on. most: that are left to calibrate with. unseen: whether none of the former is among them."""

    feed: DataLoader
    most: int
    unseen: bool


def held_back(session: Session, recipe: Recipe, images: Sequence[str], listener: Listener) -> Held:
    """Pictures from `images`, or else the last ones of the draw that `recipe` reads from its beginning.

    A fifth of all are held back, MOST_HELD_BACK at most. Of a single picture none can be: it is then scored on itself.
    Raises QconvError where pictures cannot feed the network.
    """
    if images:
        chosen = replace(recipe, calib=tuple(images), samples=MOST_HELD_BACK, glob=None)
        feed = DataLoader.of(session, chosen, listener.warn, listener.progress)
        listing = find_files(recipe.calib, pattern=recipe.glob, samples=recipe.samples, seed=recipe.seed)
        seen = {path.resolve() for path in listing.paths}
        return Held(feed, listing.found, unseen=seen.isdisjoint(path.resolve() for path in feed.listing.paths))
    whole = DataLoader.of(session, replace(recipe, samples=10**9), listener.warn, listener.progress)
    paths = whole.listing.paths
    held = min(MOST_HELD_BACK, max(1, len(paths) // HELD_BACK_SHARE))
    if len(paths) == held:
        listener.warn("there is one picture alone: it is calibrated with and scored on, which tells little.")
    return Held(whole.over(paths[-held:]), max(1, len(paths) - held), unseen=len(paths) > held)


@dataclass(slots=True)
class Made:
    """A trial with what came of it: the file and the pipeline's report, or why there is none."""

    trial: Trial
    recipe: Recipe
    path: Path
    report: Report | None = None
    failure: QconvError | None = None


@dataclass(slots=True)
class Proof:
    """What recipes are carried out on, and all that were."""

    source: Source
    scored: ReferenceOutputs
    listener: Listener
    memory: CalibrationCache
    made: list[Made] = field(default_factory=list)

    @classmethod
    def of(
        cls, source: Source, feed: DataLoader, recipe: Recipe, listener: Listener, memory: CalibrationCache
    ) -> Proof:
        """feed: the pictures to score on, fed as they should be."""
        session = open_original(source, recipe)
        scored = collect_reference_outputs(session, feed, "float", most_bytes=SCORED_BYTES, warn=listener.warn)
        return cls(source, scored, listener, memory)

    def feed_otherwise(self, feed: DataLoader) -> None:
        """Quantized models get the pictures as `feed` has them from now on; what the float model says stays."""
        pairs = zip(feed.all("float"), self.scored.batches, strict=False)  # of which there may be fewer, for memory
        self.scored = replace(self.scored, batches=[(feeds, expected) for feeds, (_, expected) in pairs])

    def carry_out(
        self, name: str, recipe: Recipe, out: Path, options: Sequence[str] = (), causes: Sequence[str] = ()
    ) -> Made:
        """Quantize by `recipe`, write `out` and score it. What cannot be done is a trial that failed, and says why."""
        start = time.perf_counter()
        trial = Trial(name, tuple(options), tuple(causes))
        made = Made(trial, recipe, out)
        self.made.append(made)
        kinds: list[bool] = []
        try:
            made.report, _ = quantize(self.source, out, recipe, self.listener, self.memory)
            on_ort = TARGETS[recipe.target].on_ort
            session = Session(str(out), name=str(out), threads=recipe.threads, optimize=on_ort)
            found = self.scored.score(session, lambda outputs: kinds.append(_one_answer(outputs)))
        except QconvError as error:
            made.report, made.failure = None, error
            made.trial = replace(trial, failed=f"{error.message} {error.hint}", seconds=time.perf_counter() - start)
            return made
        span = None
        if found.agreement is not None and all(kinds):
            span = comparison.share_interval(round(found.agreement * found.images), found.images)
        made.trial = replace(
            trial,
            sqnr_db=found.sqnr_db,
            agreement=found.agreement,
            agreement_interval=span,
            size=made.report.quantized_bytes,
            seconds=time.perf_counter() - start,
        )
        return made

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
                self.listener.warn(f"nothing was timed: {error.message}")
                return None
            first, *others = found.timings
            float_ms.append(first.median_ms)
            for made, timing in zip(some, others, strict=True):
                # what the float model takes drifts from group to group
                steady = timing.ratio_to(first)[1] * float_ms[0]
                made.trial = replace(made.trial, ms=steady, ratio=timing.ratio_to(first))
        return float_ms[0]

    def _benchmark(self, paths: Sequence[str], threads: int | None, size: tuple[int, int] | None) -> Benchmark:
        conditions = TimingConditions(threads, None, size, ROUNDS)
        return benchmark(paths, conditions, version=RUNTIME_VERSION, progress=self.listener.progress)


def _one_answer(outputs: OutputArrays) -> bool:
    """Whether a picture gets one class, so that pictures can be counted."""
    return class_vector([output[:1] if np.ndim(output) else output for output in outputs]) is not None
