"""This module evaluates a model on labelled images and against another model, with confidence intervals.

top-1, top-5      share of images whose label is the highest score, or among the five highest
mAP, mIoU         of detectors and segmenters, by labels of boxes or of masks: see `metrics.labelled`
agreement         share of argmax positions (axis 1) equal to the other model's
SQNR              10 log10(sum ref^2 / sum (ref - got)^2), cosine: sum ref got / sqrt(sum ref^2 sum got^2), per output
flips             images that only one of the two gets right, with McNemar's test on whether that is chance
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qconv.analysis.evaluation import Evaluation, EvaluationOptions
from qconv.analysis.judge import Judge
from qconv.data.dataset import find_classes
from qconv.data.label_files import NAME_IMAGES
from qconv.data.model_with_data import ModelWithData, Outputs, open_models
from qconv.errors import QconvError
from qconv.ir.chance import describe_random_nodes
from qconv.ir.files import Source, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.original import open_original
from qconv.metrics.comparison import describe_differing_runs
from qconv.metrics.demands import require_extras
from qconv.metrics.labelled import open_labels
from qconv.reporter import Reporter
from qconv.runtime.session import Session


def evaluate(
    source: Source,
    request: EvaluationOptions,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Run the model, and the other one, on every image. Raises QconvError where there is nothing to measure."""
    reporter = reporter or Reporter()
    asked = request.label_request
    require_extras(request)
    classes = None if asked is not None else find_classes(request.data, request.classes)
    own, other = open_models(source, request.against, request.data, request.threads, reporter)
    _warn_of_chance(other, request, reporter)
    _require_outputs(own.session, own.session if other is None else other.session)
    paths = own.feed.listing.paths
    opened = None if asked is None else open_labels(asked, request.data, paths, reporter.warn, NAME_IMAGES)
    judge = Judge(request, own, other, reporter, classes, opened)
    lost: set[Path] = set()
    first: list[Any] = []
    readable = (path for path in paths if path not in lost)
    for done, (mine, theirs) in enumerate(_run_side_by_side(own, other, reporter, lost, first), 1):
        chosen = [] if other is None else [theirs[other.session.outputs.index(name)] for name in own.session.outputs]
        if done == 1:
            judge.begin(first[0], mine, chosen)
        judge.add(next(readable), mine, chosen)
        reporter.progress("evaluate", done + len(lost), len(paths))
    return judge.conclude(source.name, [path for path in paths if path not in lost])


def _warn_of_chance(other: ModelWithData | None, request: EvaluationOptions, reporter: Reporter) -> None:
    """Say by how much the other model differs from itself, where it draws at random."""
    source = request.against
    if other is None or source is None:
        return
    what = describe_random_nodes(load_unchanged(read_proto(source), source))
    if what:
        plain = partial(open_original, source, request.threads, required=False, optimize=False)
        feeds = (feeds for feeds, _ in other.batches(Reporter(), lambda path: None))
        differing = describe_differing_runs(what, other.session, plain, feeds)
        if differing:
            reporter.warn(differing)


def _run_side_by_side(
    own: ModelWithData, other: ModelWithData | None, reporter: Reporter, lost: set[Path], first: list[Any]
) -> Iterator[tuple[Outputs, Outputs]]:
    """Yield both models' outputs image by image; of the first alone where there is no other.

    first: gets the first batch of the other model, or of the only one.
    """
    batches = own.batches(reporter, lost.add)
    if other is None:
        yield from ((found, []) for found in own.outputs(_keep_first(batches, first)))
        return
    if own.takes_the_same_as(other):
        mine, its = itertools.tee(batches)
    else:
        mine, its = batches, other.batches(Reporter(), lambda path: None)
    yield from zip(own.outputs(mine), other.outputs(_keep_first(its, first)), strict=True)


def _keep_first(batches: Iterator[tuple[Any, int]], first: list[Any]) -> Iterator[tuple[Any, int]]:
    for feeds, count in batches:
        if not first:
            first.append(feeds)
        yield feeds, count


def _require_outputs(own: Session, reference: Session) -> None:
    """Raise QconvError where `reference` lacks an output of `own`."""
    known = [output.name for output in reference.model_outputs]
    missing = next((name for name in own.outputs if name not in known), None)
    if missing is not None:
        raise QconvError(
            f"{reference.name} has no output {missing!r}, but {', '.join(known)}.", "compare like with like."
        )
