"""This module evaluates a model on labelled images and against another model, with confidence intervals.

top-1, top-5      share of images whose label is the highest score, or among the five highest
agreement         share of argmax positions (axis 1) equal to the other model's
SQNR              10 log10(sum ref^2 / sum (ref - got)^2), cosine: sum ref got / sqrt(sum ref^2 sum got^2), per output
flips             images that only one of the two gets right, with McNemar's test on whether that is chance
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import check_run_options, take_types
from qconv.config.data_options import DataOptions
from qconv.data.dataset import LabelOptions, find_classes, labels_of
from qconv.data.model_with_data import ModelWithData, Outputs, open_models
from qconv.errors import QconvError
from qconv.ir.chance import describe_random_nodes
from qconv.ir.files import Source, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.original import open_original
from qconv.metrics.classification import PredictionRecorder, Predictions
from qconv.metrics.comparison import EVALUATED, LABELLED, ComparisonAccumulator, describe_differing_runs
from qconv.metrics.network_outputs import NetworkOutputs
from qconv.metrics.similarity import difference_interval, mcnemar_p_value, share_interval
from qconv.reporter import Reporter
from qconv.results.quantize import OutputFact, OutputScore
from qconv.results.scores import (
    AGREEMENT,
    COSINE,
    SQNR,
    TOP1,
    TOP5,
    Score,
    as_intervals,
    as_values,
    by_rank,
    find_score,
    worst_scores,
)
from qconv.runtime.outputs import ModelOutput, find_class_vector
from qconv.runtime.session import Session


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is to be measured. Raises QconvError for values that cannot be.

    Attributes:
        data: The images and their preprocessing.
        against: The other model.
        classes, label_offset: Of labels, see data.dataset.
        table: What the predictions are for: ".csv", ".npz" (then all outputs are kept) or None.
    """

    data: DataOptions
    against: Source | None = None
    classes: Path | None = None
    label_offset: int = 0
    table: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        take_types(self)
        check_run_options(self.threads)

    @property
    def labelling(self) -> LabelOptions:
        """The label options that the user gave."""
        return LabelOptions(self.label_offset, self.classes is not None or self.label_offset != 0)


@dataclass(frozen=True, slots=True)
class Flips:
    """Images that only this model gets right (won), or only the other (lost)."""

    won: int
    lost: int
    count: int

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar_p_value(self.won, self.lost)

    @property
    def difference(self) -> float:
        """This model's top-1 less the other's."""
        return (self.won - self.lost) / self.count


@dataclass(slots=True)
class Evaluation:
    """What was measured. holds: what the outputs are. labelled: by labels, of this model and of the other one; nothing
    without labels. outputs: how near each is to the other model's."""

    model: str
    images: int
    words: str
    labels: str
    holds: tuple[OutputFact, ...]
    labelled: tuple[Score, ...] = ()
    other: str | None = None
    other_labelled: tuple[Score, ...] = ()
    flips: Flips | None = None
    outputs: tuple[OutputScore, ...] = ()
    predictions: Predictions | None = None

    @property
    def top1(self) -> Score | None:
        """Of this model, by labels."""
        return find_score(self.labelled, TOP1)

    @property
    def top5(self) -> Score | None:
        """Of this model, by labels, where there are more than five classes."""
        return find_score(self.labelled, TOP5)

    @property
    def worst(self) -> tuple[Score, ...]:
        """The worst of all outputs, by metric."""
        return worst_scores(output.scores for output in self.outputs)

    def rows(self) -> list[dict[str, Any]]:
        """The table that `--csv` writes: a row a measure, with its 95 % interval where it has one."""
        found: list[dict[str, Any]] = []

        def add(score: Score, model: str | None, output: str) -> None:
            low, high = score.interval or (None, None)
            named = {"measure": score.name, "model": model, "output": output}
            found.append({**named, "value": score.value, "low": low, "high": high})

        for model, scores in ((self.model, self.labelled), (self.other, self.other_labelled)):
            for score in scores:
                add(score, model, "")
        for output in self.outputs:
            for score in by_rank(output.scores):
                add(score, self.model, output.name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        against = None
        if self.other is not None:
            flips = self.flips
            against = {
                "model": self.other,
                **as_values(self.other_labelled, told=tuple(LABELLED)),
                **as_values(self.worst, told=(SQNR, AGREEMENT, COSINE)),
                "flips": flips and {"won": flips.won, "lost": flips.lost, "p_value": flips.p_value},
                "outputs": [
                    {"name": o.name, "kind": o.kind, **as_values(o.scores, told=(SQNR, COSINE, AGREEMENT))}
                    for o in self.outputs
                ],
            }
        return {
            "schema": 1,
            "model": self.model,
            "images": self.images,
            "outputs": [fact.as_dict() for fact in self.holds],
            **as_values(self.labelled, told=tuple(LABELLED)),
            "against": against,
            "intervals": self._intervals(),
            "labels": self.labels or None,
            "preprocessing": self.words or None,
        }

    def _intervals(self) -> dict[str, list[float] | None]:
        """Of every score that can have one, at 95 %."""
        spans = as_intervals(self.labelled, told=tuple(LABELLED))
        its = as_intervals(self.other_labelled, told=tuple(LABELLED))
        spans |= {f"against_{name}": span for name, span in its.items()}
        spans |= as_intervals(self.worst)
        flips = self.flips
        moved = None if flips is None else difference_interval(flips.won, flips.lost, flips.count)
        return {**spans, "top1_difference": None if moved is None else list(moved)}


def evaluate(
    source: Source,
    request: EvaluationOptions,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Run the model, and the other one, on every image. Raises QconvError where there is nothing to measure."""
    reporter = reporter or Reporter()
    classes = find_classes(request.data, request.classes)
    own, other = open_models(source, request.against, request.data, request.threads, reporter)
    _warn_of_chance(other, request, reporter)
    holds = _find_outputs(own.session, own.session if other is None else other.session)
    paths = own.feed.listing.paths
    lost: set[Path] = set()
    seen, its = PredictionRecorder(), PredictionRecorder()
    kept: list[Outputs] = []
    vector: int | None = None
    compared: ComparisonAccumulator | None = None
    for done, (mine, theirs) in enumerate(_run_side_by_side(own, other, reporter, lost), 1):
        if done == 1:  # what cannot be is better said before thousands of pictures
            holds = [o.seen(np.shape(array)) for o, array in zip(holds, mine, strict=True)]
            vector = _find_class_row(holds, mine)
            outputs = 0 if vector is None else mine[vector].shape[1]
            if labels_of(paths, request.data, classes, request.labelling, outputs) is None and other is None:
                raise _make_no_measure_error(request.data, vector)
            if request.table == ".csv" and vector is None:
                raise QconvError("No output of the model is one score a class.", "save all outputs in a .npz file.")
        chosen = [] if other is None else [theirs[other.session.outputs.index(name)] for name in own.session.outputs]
        if vector is not None and not all(len(found[vector]) == 1 for found in (mine, chosen) if found):
            vector = None  # rows that the data select, one of them on the pictures before
        if vector is not None:
            _require_finite(mine[vector], own.session, vector)
            seen.add(mine[vector])
        if other is not None:
            if vector is not None:
                _require_finite(chosen[vector], other.session, vector)
                its.add(chosen[vector])
            compared = compared or ComparisonAccumulator.of(NetworkOutputs(tuple(holds)), EVALUATED)
            compared.add(chosen, mine)
        if request.table == ".npz":
            kept.append(mine)
        reporter.progress("evaluate", done + len(lost), len(paths))
    left = [path for path in paths if path not in lost]
    result = Evaluation(source.name, len(left), own.words, "", tuple(output.fact for output in holds))
    labels = labels_of(left, request.data, classes, request.labelling, seen.classes if vector is not None else 0)
    if labels is None and other is None:
        raise _make_no_measure_error(request.data, vector)
    if labels is not None:
        assert classes is not None
        result.labels = classes.source + (f", {request.label_offset:+d}" if request.label_offset else "")
        result.labelled = _score_labels(seen, labels)
    if other is not None:
        result.other = other.session.name
        result.outputs = () if compared is None else compared.scores(spans=True)
        _tell_of_remarks(result.outputs, reporter, needed=labels is None)
        if labels is not None:
            result.other_labelled, result.flips = _score_labels(its, labels), _count_flips(seen, its, labels)
    classified = None if vector is None else seen
    names, offset = own.session.outputs, request.label_offset
    result.predictions = Predictions(left, labels, classes, offset, classified, its, names, kept)
    return result


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


def _count_flips(seen: PredictionRecorder, its: PredictionRecorder, labels: NDArray[np.int64]) -> Flips:
    right, wrong = seen.hits(labels, 1), its.hits(labels, 1)
    return Flips(int((right & ~wrong).sum()), int((wrong & ~right).sum()), len(labels))


def _run_side_by_side(
    own: ModelWithData, other: ModelWithData | None, reporter: Reporter, lost: set[Path]
) -> Iterator[tuple[Outputs, Outputs]]:
    """Yield both models' outputs image by image; of the first alone where there is no other."""
    batches = own.batches(reporter, lost.add)
    if other is None:
        yield from ((found, []) for found in own.outputs(batches))
        return
    if own.takes_the_same_as(other):
        mine, its = itertools.tee(batches)
    else:
        mine, its = batches, other.batches(Reporter(), lambda path: None)
    yield from zip(own.outputs(mine), other.outputs(its), strict=True)


def _require_finite(scores: NDArray[Any], session: Session, index: int) -> None:
    if not np.isfinite(scores).all():
        fact = (
            f"Output {session.outputs[index]} of {session.name} holds NaN or infinity, so that no class is the highest."
        )
        raise QconvError(fact, "check the preprocessing options, and the model on one picture.")


def _find_outputs(own: Session, reference: Session) -> list[ModelOutput]:
    """What the outputs of `own` hold, as `reference` has them. Raises QconvError where that lacks one."""
    known = {output.name: output for output in reference.model_outputs}
    missing = next((name for name in own.outputs if name not in known), None)
    if missing is not None:
        raise QconvError(
            f"{reference.name} has no output {missing!r}, but {', '.join(known)}.", "compare like with like."
        )
    return [known[name] for name in own.outputs]


def _find_class_row(holds: Sequence[ModelOutput], found: Outputs) -> int | None:
    """The output with one score a class for the picture at hand; None where that is several rows or none."""
    vector = find_class_vector(holds)
    return vector if vector is not None and len(found[vector]) == 1 else None


def _tell_of_remarks(outputs: Sequence[OutputScore], reporter: Reporter, *, needed: bool) -> None:
    """Warn of outputs that were not compared. Raises QconvError where none was and one is `needed`."""
    odd = [output for output in outputs if output.remark]
    if needed and len(odd) == len(outputs) and not any(output.scores for output in odd):
        raise QconvError(
            f"There is nothing to compare: output {odd[0].name}: {odd[0].remark}.",
            "compare models that give tensors of one shape, before the data select what is returned.",
        )
    for output in odd:
        reporter.warn(f"output {output.name}: {output.remark}.")


def _make_no_measure_error(data: DataOptions, vector: int | None) -> QconvError:
    """Build the error for neither labels nor another model. vector: the output with one score a class, or None."""
    where = " and ".join(data.paths)
    why, fix = f"the pictures in {where} lie in no class folders", "a folder with one folder of pictures a class."
    if not any(Path(path).is_dir() for path in data.paths) and data.arrays is None:
        why = f"{where} lists pictures, but not the order of their class folders among the outputs"
        fix = "the classes in output order with --classes FILE."
    if vector is None:
        why, fix = "no output is a class score", "--task classify where one is."
    fact = f"There is nothing to measure: {why}, and there is no other model."
    return QconvError(fact, f"pass --against FLOAT, or {fix}")


def _score_labels(seen: PredictionRecorder, labels: NDArray[np.int64]) -> tuple[Score, ...]:
    """What labels measure; the best of several classes where there are more than these."""
    found = []
    for metric, most in LABELLED.items():
        if most == 1 or seen.classes > most:
            hits = int(seen.hits(labels, most).sum())
            found.append(Score(metric, hits / len(labels), share_interval(hits, len(labels))))
    return tuple(found)
