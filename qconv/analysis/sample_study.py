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
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.autodetect import detect_preprocessing
from qconv.data.loader import DataLoader
from qconv.errors import QconvError, format_count
from qconv.ir import load, subgraph
from qconv.ir.files import Source, declared_opset, external_data_files, open_original, read_proto, refuse_quantized
from qconv.ir.metadata import needed_opset
from qconv.ir.model import Model
from qconv.metrics.comparison import ReferenceOutputs, collect_reference_outputs
from qconv.passes import fold
from qconv.pipeline.checks import check_output, require_layers, warn_of_unmatched_options
from qconv.planning.placement import choose_float_nodes
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.reporter import Reporter
from qconv.results.sample_curve import CurvePoint, SampleCurve, counts_up_to
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.session import Session
from qconv.search.candidate import quantize_to_nearest

SCORED_BYTES = 48 * 2**20
"""Most bytes of the held-out images' inputs and float outputs, which stay in memory."""


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What is asked beyond the recipe.

    Attributes:
        draws: How many sets of images of each size.
        holdout: Images to score on; None for a fifth, MOST_HELD_OUT at most.
        images: Where these come from; empty: held out from the calibration images.
    """

    draws: int = 3
    holdout: int | None = None
    images: tuple[str, ...] = ()


def study_samples(
    source: Source | str | Path,
    recipe: Recipe,
    question: StudyRequest | None = None,
    reporter: Reporter | None = None,
    out: Path | None = None,
) -> SampleCurve:
    """Measure accuracy over the number of calibration images.

    Weights are rounded to the nearest integer, whatever the recipe says: the question is what images do for the ranges.

    Args:
        source: The float model.
        recipe: How to quantize; its `samples` bounds the images.
        question: What is asked beyond it.
        reporter: Hears of progress and warnings.
        out: Where the caller will write a chart; checked, not written.

    Raises:
        QconvError: The user can mend it.
    """
    started = time.perf_counter()
    recipe = replace(
        recipe, equalize=False, tune_ranges=False
    )  # scales differ from draw to draw, and would need all pictures again
    question, reporter = question or StudyRequest(), reporter or Reporter()
    recipe = replace(recipe, effort="fast", rounding="nearest")
    source = source if isinstance(source, Source) else Source(str(source), Path(source))
    proto = read_proto(source)
    refuse_quantized(proto, source.name)
    if out is not None:
        check_output(source, out, external_data_files(proto, source))
    model, _ = load.load(proto, source, opset=needed_opset(recipe, declared_opset(proto)))
    del proto
    session = open_original(source, recipe)
    calibration, scoring = _open_feeds(session, recipe, question, reporter)
    detected = detect_preprocessing(model, session, calibration, recipe.preprocessing, threads=recipe.threads)
    calibration.preprocessing = scoring.preprocessing = detected.preprocessing
    fold.run_float_passes(model)
    warn_of_unmatched_options(model, recipe, reporter)
    floats = choose_float_nodes(model, recipe, calibration.preprocessing)
    plan = make_plan(model, recipe, TARGETS[recipe.target], floats)
    require_layers(plan, source)
    for doubt in detected.doubts():
        reporter.warn(doubt)
    taps = _plan_observers(plan, recipe)
    scored = collect_reference_outputs(session, scoring, "float", most_bytes=SCORED_BYTES, reporter=reporter)
    del session
    with open_sketch_spool() as kept:
        before = time.perf_counter()
        seconds = _sketch_each_image(model, taps, calibration, recipe, kept)
        after = time.perf_counter()
        points = _measure_points(_StudyJob(model, recipe, floats), kept, scored, question.draws, reporter)
    return SampleCurve(
        version=qconv.__version__,
        model=source.name,
        recipe=recipe.as_dict(),
        preprocessing=None if calibration.preprocessing is None else calibration.preprocessing.as_dict(),
        points=sorted(points, key=lambda point: (point.pictures, point.seed)),
        draws=question.draws,
        scored=scored.pictures,
        scored_on=question.images,
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
    taps = plan.taps(sketch_contents_for(recipe))
    if not taps:
        raise QconvError(
            "Nothing depends on the number of pictures: these options quantize no activation.",
            "pass --activation-bits 8, or use any pictures.",
        )
    return taps


# -- pictures ----------------------------------------------------------------------------------------------------------


def _open_feeds(
    session: Session,
    recipe: Recipe,
    question: StudyRequest,
    reporter: Reporter,
) -> tuple[DataLoader, DataLoader]:
    """Open the images to calibrate with and those to score on: no image is in both."""
    wanted = MOST_HELD_OUT if question.holdout is None else question.holdout
    if question.images:
        scoring = DataLoader.of(session, replace(recipe, calib=question.images, samples=wanted, glob=None), reporter)
        if question.holdout is not None and len(scoring.listing.paths) < wanted:
            reporter.warn(f"--holdout {wanted}: {' and '.join(question.images)} holds {len(scoring.listing.paths)}.")
        return DataLoader.of(session, recipe, reporter), scoring
    whole = DataLoader.of(session, replace(recipe, samples=recipe.samples + wanted), reporter)
    found, where = whole.listing.found, " and ".join(recipe.calib)
    if found < 2:
        raise QconvError(
            f"{where} holds {format_count(found, 'picture')}: one to calibrate with and one to score on are the least.",
            "add pictures, or pass others to score on with --images.",
        )
    held = max(1, min(wanted, found // HELD_OUT_DIVISOR)) if question.holdout is None else wanted
    if held >= found:
        raise QconvError(
            f"--holdout {held} leaves none of the {found} pictures in {where} to calibrate with.",
            "hold fewer back, or pass others to score on with --images.",
        )
    paths, most = whole.listing.paths, min(recipe.samples, found - held)
    return whole.over(paths[:most]), whole.over(paths[most : most + held])


def _sketch_each_image(
    model: Model, taps: list[Observer], feed: DataLoader, recipe: Recipe, kept: SketchSpool
) -> list[float]:
    """Sketch every image by itself. Returns how many seconds the pass took until each was seen."""
    session = open_observed_session(model, taps, recipe.threads)
    seconds, spent, start = [], 0.0, time.perf_counter()
    for sketches in observe_each_image(session, taps, feed.all("calibrate")):
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
        order = _order_images(len(kept), job.recipe.seed, seed)
        wanted = counts[:-1] if seed else counts  # all are the same set
        for count, sketches in _accumulate_sketches(kept, order, wanted):
            with job.quantized(sketches) as session:
                found = scored.score(session)
            points.append(CurvePoint(count, seed, found.sqnr_db, found.agreement))
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
