"""This module measures how many images are enough: the network is quantized with 1, 2, 5, 10 ... images and scored.

Every calibration image passes the float network once. Its sketches are stored, and those of any set of images are the
sum of theirs. The first draw is the order in which `quantize` reads: with `--samples N` it makes the model of the point
of N images. Each set holds the smaller ones of its draw. The images to score on are the next ones of that order, so
that no point was calibrated with any of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import qconv
from qconv.analysis.trials import HELD_OUT_DIVISOR, MOST_HELD_OUT
from qconv.calibration.observer import Observer, observe_each_image, open_observed_session
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.calibration.sketch import Sketch
from qconv.calibration.statistics_file import SketchSpool, open_sketch_spool
from qconv.config.choices import require_range, take_types
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.data.dataset import list_samples
from qconv.data.loader import DataLoader
from qconv.errors import QconvError, format_count
from qconv.ir import subgraph
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.ir.original import open_original
from qconv.metrics.comparison import ReferenceOutputs, collect_reference_outputs
from qconv.pipeline.prepare import Prepared, prepare
from qconv.planning.plan import Plan
from qconv.reporter import Reporter
from qconv.results.sample_curve import CurvePoint, SampleCurve, counts_up_to
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.session import Session
from qconv.search.candidate import quantize_to_nearest

SCORED_BYTES = 48 * 2**20
"""Most bytes of the held-out images' inputs and float outputs, which stay in memory."""


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What is asked beyond the recipe. Raises QconvError for values that cannot be.

    Attributes:
        draws: How many sets of images of each size.
        holdout: Images to score on; None for a fifth, MOST_HELD_OUT at most.
        images: Where these come from; empty: held out from the calibration images.
    """

    draws: int = 3
    holdout: int | None = None
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        take_types(self, {"draws": "--seeds"})
        require_range("--seeds", self.draws, 1)
        require_range("--holdout", self.holdout, 1)


def study_samples(
    source: Source | str | Path,
    recipe: Recipe,
    data: DataOptions,
    request: StudyRequest | None = None,
    reporter: Reporter | None = None,
    out: Path | None = None,
) -> SampleCurve:
    """Measure accuracy over the number of calibration images.

    Weights are rounded to the nearest integer, whatever the recipe says: the question is what images do for the ranges.

    Args:
        source: The float model.
        recipe: How to quantize.
        data: The images; its `samples` bounds them.
        request: What is asked beyond it.
        reporter: Hears of progress and warnings.
        out: Where the caller will write a chart; checked, not written.

    Raises:
        QconvError: The user can mend it.
    """
    started = time.perf_counter()
    request, reporter = request or StudyRequest(), (reporter or Reporter()).of_part()
    # scales of equalization and ranges of outputs differ from draw to draw, and would need all pictures again
    recipe = replace(recipe, equalize=False, tune_ranges=False, effort="fast", rounding="nearest")
    source = source if isinstance(source, Source) else Source(str(source), Path(source))
    written = {} if out is None else {"the chart": out}
    taken, held = _split_images(data, request)
    found = prepare(source, recipe, replace(data, samples=taken), reporter, written=written)
    feed = found.data.feed
    assert feed is not None  # there are images, or `_split_images` would have found none
    observers = _plan_observers(found.plan, recipe)
    scored = _run_float_model(source, found, replace(data, samples=held), request, reporter, recipe.threads)
    with open_sketch_spool() as kept:
        before = time.perf_counter()
        seconds = _sketch_each_image(found.model, observers, feed, recipe, kept)
        after = time.perf_counter()
        job = _StudyJob(found.model, recipe, data.seed, found.plan.floats)
        points = _measure_points(job, kept, scored, request.draws, reporter)
    return SampleCurve(
        version=qconv.__version__,
        model=source.name,
        recipe=recipe.as_dict(data),
        preprocessing=None if found.data.model_preprocessing is None else found.data.model_preprocessing.as_dict(),
        points=sorted(points, key=lambda point: (point.pictures, point.seed)),
        draws=request.draws,
        scored=scored.pictures,
        scored_on=request.images,
        seconds={count: seconds[count - 1] for count in counts_up_to(len(seconds))},
        warnings=reporter.warnings,
        time={
            "load": before - started,
            "calibrate": after - before,
            "points": time.perf_counter() - after,
            "total": time.perf_counter() - started,
        },
        peak_rss_mb=peak_rss_mb(),
    )


def _plan_observers(plan: Plan, recipe: Recipe) -> list[Observer]:
    if recipe.bias_correction == "sequential":
        raise QconvError(
            "--bias-correction sequential is not possible in a study: it walks the network for every point.",
            "leave it out: means hardly depend on the number of pictures.",
        )
    observers = plan.observers(sketch_contents_for(recipe))
    if not observers:
        fact, hint = "these options quantize no activation", "pass --activation-bits 8, or use any pictures."
        if recipe.activation_bits != 32 and plan.kept:
            node, kept = next(iter(plan.kept.items()))
            fact, hint = f"no activation is quantized (of {node}: {kept.why})", "use any pictures."
        raise QconvError(f"Nothing depends on the number of pictures: {fact}.", hint)
    return observers


# -- pictures ----------------------------------------------------------------------------------------------------------


def _split_images(data: DataOptions, request: StudyRequest) -> tuple[int, int]:
    """How many pictures to calibrate with, the first of the draw, and how many of those behind them to score on.

    Where other pictures are scored on, the second number is of these, at most.
    """
    wanted = MOST_HELD_OUT if request.holdout is None else request.holdout
    found = list_samples(data).found
    if request.images:
        return min(data.samples or found, found), wanted
    where = " and ".join(data.paths)
    if found < 2:
        raise QconvError(
            f"{where} holds {format_count(found, 'picture')}: one to calibrate with and one to score on are the least.",
            "add pictures, or pass others to score on with --images.",
        )
    held = max(1, min(wanted, found // HELD_OUT_DIVISOR)) if request.holdout is None else wanted
    if held >= found:
        raise QconvError(
            f"--holdout {held} leaves none of the {found} pictures in {where} to calibrate with.",
            "hold fewer back, or pass others to score on with --images.",
        )
    return min(data.samples or found, found - held), held


def _run_float_model(
    source: Source, found: Prepared, data: DataOptions, request: StudyRequest, reporter: Reporter, threads: int | None
) -> ReferenceOutputs:
    """What the float model says of the pictures to score on, none of which is calibrated with.

    data: its `samples` says how many there are.
    """
    feed, session = found.data.feed, open_original(source, threads, data.tasks)
    assert feed is not None
    if request.images:
        scoring = DataLoader.of(session, replace(data, paths=request.images, glob=None, arrays=None), reporter)
        count = len(scoring.listing.paths)
        if request.holdout is not None and count < request.holdout:
            reporter.warn(f"--holdout {request.holdout}: {' and '.join(request.images)} holds {count}.")
    else:
        taken, held = len(feed.listing.paths), data.samples or 0
        drawn = DataLoader.of(session, replace(data, samples=taken + held), Reporter()).listing.paths
        scoring = feed.over(drawn[taken:])
    scoring.preprocessing = feed.preprocessing
    if found.data.pixels is not None:
        scoring.take_pixels(found.data.pixels)
    return collect_reference_outputs(session, scoring, "float", most_bytes=SCORED_BYTES, reporter=reporter)


def _sketch_each_image(
    model: Model, observers: list[Observer], feed: DataLoader, recipe: Recipe, kept: SketchSpool
) -> list[float]:
    """Sketch every image by itself. Returns how many seconds the pass took until each was seen."""
    session = open_observed_session(model, observers, recipe.threads)
    seconds, spent, start = [], 0.0, time.perf_counter()
    for sketches in observe_each_image(session, observers, feed.iter_batches("calibrate")):
        spent += time.perf_counter() - start
        seconds.append(spent)
        kept.put(sketches)
        start = time.perf_counter()
    return seconds


# -- points ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _StudyJob:
    """What is done with every draw. folded: the network, which stays as it is; floats: nodes left in float."""

    folded: Model
    recipe: Recipe
    seed: int
    floats: Mapping[str, str]

    @contextlib.contextmanager
    def quantized(self, sketches: dict[str, Sketch]) -> Iterator[Session]:
        """Quantize as `pipeline.quantize` does with these sketches, and load the model."""
        model = quantize_to_nearest(self.folded, self.recipe, sketches, self.floats)
        with subgraph.runnable_with_outputs(model, ()) as runnable:
            yield Session(runnable, name="the quantized model", threads=self.recipe.threads)


def _measure_points(
    job: _StudyJob, kept: SketchSpool, scored: ReferenceOutputs, draws: int, reporter: Reporter
) -> list[CurvePoint]:
    counts = counts_up_to(len(kept))
    total, points = draws * (len(counts) - 1) + 1, []
    for seed in range(draws):
        order = _order_images(len(kept), job.seed, seed)
        wanted = counts[:-1] if seed else counts  # all are the same set
        for count, sketches in _accumulate_sketches(kept, order, wanted):
            with job.quantized(sketches) as session:
                found = scored.score(session)
            points.append(CurvePoint(count, seed, found.scores))
            reporter.progress("points", len(points), total)
    return points


def _order_images(pictures: int, recipe_seed: int, draw: int) -> list[int]:
    """Return the order in which a draw takes the images; the first draw's is that in which they were read."""
    if not draw:
        return list(range(pictures))
    return [int(index) for index in np.random.default_rng([recipe_seed, draw]).permutation(pictures)]


def _accumulate_sketches(
    kept: SketchSpool, order: list[int], counts: list[int]
) -> Iterator[tuple[int, dict[str, Sketch]]]:
    """Yield the sketches of the first so many images, for each of the ascending `counts`."""
    total: dict[str, Sketch] = {}
    done = 0
    for count in counts:
        for index in order[done:count]:
            new = kept.get(index)
            total = {name: sketch.merge(total[name]) if total else sketch for name, sketch in new.items()}
        done = count
        yield count, total
