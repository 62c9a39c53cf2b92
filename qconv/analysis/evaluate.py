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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import DataOptions
from qconv.data.dataset import LabelOptions, find_classes, labels_of
from qconv.data.loader import ModelWithData, Outputs, open_models
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.metrics import comparison
from qconv.metrics.classification import TOP_K, PredictionRecorder, Predictions
from qconv.metrics.comparison import CLASS_KINDS, Interval, compute_sqnr_db
from qconv.reporter import Reporter
from qconv.results.quantize import OutputFact
from qconv.runtime.outputs import ModelOutput, find_class_vector
from qconv.runtime.session import Session

LARGEST_NOISE = float(np.finfo(np.float64).max) / 1e6  # the noise of NaN: what can still be added up


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is to be measured.

    Attributes:
        recipe: Names the images (its `calib`), and their preprocessing.
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

    @property
    def labelling(self) -> LabelOptions:
        """The label options that the user gave."""
        return LabelOptions(self.label_offset, self.classes is not None or self.label_offset != 0)


@dataclass(frozen=True, slots=True)
class MeasuredShare:
    """A share: hits of count images (or positions, in a map of classes), with its interval."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """How near one output is to the other model's. sqnr_db: None where nothing differs."""

    name: str
    sqnr_db: float | None
    cosine: float | None
    agreement: MeasuredShare | None
    sqnr_interval: Interval | None


@dataclass(frozen=True, slots=True)
class Flips:
    """Images that only this model gets right (won), or only the other (lost)."""

    won: int
    lost: int
    count: int

    @property
    def p_value(self) -> float:
        """The p-value of McNemar's exact test."""
        return comparison.mcnemar_p_value(self.won, self.lost)

    @property
    def difference(self) -> float:
        """This model's top-1 less the other's."""
        return (self.won - self.lost) / self.count


@dataclass(slots=True)
class Evaluation:
    """What was measured. top1, top5: None without labels, top5 also where there are few classes."""

    model: str
    images: int
    words: str
    labels: str
    holds: tuple[OutputFact, ...]
    top1: MeasuredShare | None = None
    top5: MeasuredShare | None = None
    other: str | None = None
    other_top1: MeasuredShare | None = None
    other_top5: MeasuredShare | None = None
    flips: Flips | None = None
    outputs: tuple[OutputComparison, ...] = ()
    predictions: Predictions | None = None

    @property
    def agreement(self) -> MeasuredShare | None:
        """The lowest agreement of the outputs."""
        return min((o.agreement for o in self.outputs if o.agreement), key=lambda share: share.value, default=None)

    @property
    def worst(self) -> OutputComparison | None:
        """The output with the lowest SQNR; None where nothing differs."""
        found = [output for output in self.outputs if output.sqnr_db is not None]
        return min(found, key=lambda output: output.sqnr_db or 0.0, default=None)

    def rows(self) -> list[dict[str, Any]]:
        """The table that `--csv` writes: a row a measure, with its 95 % interval where it has one."""
        found: list[dict[str, Any]] = []

        def add(measure: str, model: str | None, output: str, value: float | None, span: Interval | None) -> None:
            low, high = span or (None, None)
            named = {"measure": measure, "model": model, "output": output}
            found.append({**named, "value": value, "low": low, "high": high})

        for model, shares in ((self.model, (self.top1, self.top5)), (self.other, (self.other_top1, self.other_top5))):
            for measure, share in zip(("top1", "top5"), shares, strict=True):
                if share is not None:
                    add(measure, model, "", share.value, share.interval)
        for output in self.outputs:
            if output.agreement is not None:
                add("agreement", self.model, output.name, output.agreement.value, output.agreement.interval)
            add("sqnr_db", self.model, output.name, output.sqnr_db, output.sqnr_interval)
            add("cosine", self.model, output.name, output.cosine, None)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        against = None
        if self.other is not None:
            flips = self.flips
            against = {
                "model": self.other,
                "top1": _value_of(self.other_top1),
                "top5": _value_of(self.other_top5),
                "agreement": _value_of(self.agreement),
                "sqnr_db": self.worst.sqnr_db if self.worst else None,
                "flips": flips and {"won": flips.won, "lost": flips.lost, "p_value": flips.p_value},
                "outputs": [
                    {"name": o.name, "sqnr_db": o.sqnr_db, "cosine": o.cosine, "agreement": _value_of(o.agreement)}
                    for o in self.outputs
                ],
            }
        spans = {
            "top1": _interval_of(self.top1),
            "top5": _interval_of(self.top5),
            "against_top1": _interval_of(self.other_top1),
            "against_top5": _interval_of(self.other_top5),
            "agreement": _interval_of(self.agreement),
            "sqnr_db": _interval_as_list(self.worst.sqnr_interval if self.worst else None),
            "top1_difference": _interval_as_list(
                comparison.difference_interval(self.flips.won, self.flips.lost, self.flips.count)
                if self.flips
                else None
            ),
        }
        return {
            "schema": 1,
            "model": self.model,
            "images": self.images,
            "outputs": [fact.as_dict() for fact in self.holds],
            "top1": _value_of(self.top1),
            "top5": _value_of(self.top5),
            "against": against,
            "intervals": spans,
            "labels": self.labels or None,
            "preprocessing": self.words or None,
        }


def _value_of(share: MeasuredShare | None) -> float | None:
    return None if share is None else share.value


def _interval_of(share: MeasuredShare | None) -> list[float] | None:
    return None if share is None else _interval_as_list(share.interval)


def _interval_as_list(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


# -- counting ----------------------------------------------------------------------------------------------------------


def _sum_output(output: ModelOutput, ref: NDArray[Any], got: NDArray[Any]) -> list[float]:
    signal, noise = comparison.measure_error(ref, got)
    finite = np.isfinite(ref) & np.isfinite(got)
    wide, other = np.where(finite, ref, 0).astype(np.float64), np.where(finite, got, 0).astype(np.float64)
    equal = positions = 0
    if ref.dtype.kind != "f":
        equal, positions = int((ref == got).sum()), ref.size
    elif output.kind in CLASS_KINDS and ref.shape[output.axis] > 1:
        same = ref.argmax(axis=output.axis) == got.argmax(axis=output.axis)
        equal, positions = int(same.sum()), same.size
    dot, own = float(np.sum(wide * other)), float(np.sum(other * other))
    return [signal, min(noise, LARGEST_NOISE), dot, own, equal, positions]


def _compare_output(name: str, rows: list[list[float]]) -> OutputComparison:
    table = np.array(rows)
    signal, noise, dot, own, equal, positions = table.sum(axis=0)
    agreement = None
    if positions:
        whole = (table[:, 5] == 1).all()
        span = (
            comparison.share_interval(int(equal), int(positions))
            if whole
            else comparison.bootstrap_interval(table[:, 4:], lambda sums: sums[:, 0] / sums[:, 1])
        )
        agreement = MeasuredShare(float(equal / positions), span)
    cosine = float(dot / np.sqrt(signal * own)) if signal * own > 0 else None
    decibel = compute_sqnr_db(float(signal), float(noise))
    span = None
    if decibel is not None:
        span = comparison.sqnr_interval(table[:, :2])
    return OutputComparison(name, decibel, cosine, agreement, span)


def evaluate(
    source: Source,
    wishes: EvaluationOptions,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Run the model, and the other one, on every image. Raises QconvError where there is nothing to measure."""
    reporter = reporter or Reporter()
    root = wishes.data.root
    classes = find_classes(root, wishes.classes)
    own, other = open_models(source, wishes.against, wishes.data, wishes.threads, reporter)
    if other is not None:
        missing = next((name for name in own.session.outputs if name not in other.session.outputs), None)
        if missing is not None:
            names = ", ".join(other.session.outputs)
            raise QconvError(f"{other.session.name} has no output {missing!r}, but {names}.", "compare like with like.")
    paths = own.feed.listing.paths
    lost: set[Path] = set()
    seen, its = PredictionRecorder(), PredictionRecorder()
    rows: list[list[list[float]]] = [[] for _ in own.session.outputs]
    kept: list[Outputs] = []
    vector: int | None = None
    told = {output.name: output for output in (other or own).session.model_outputs}
    holds = [told[name] for name in own.session.outputs]
    for done, (mine, theirs) in enumerate(_run_side_by_side(own, other, reporter, lost), 1):
        if done == 1:  # what cannot be is better said before thousands of pictures
            holds = [o.seen(np.shape(array)) for o, array in zip(holds, mine, strict=True)]
            vector = find_class_vector(holds)
            outputs = 0 if vector is None else mine[vector].shape[1]
            if labels_of(paths, root, classes, wishes.labelling, outputs) is None and other is None:
                raise _make_no_measure_error(root, vector)
            if wishes.table == ".csv" and vector is None:
                raise QconvError("No output of the model is one score a class.", "save all outputs in a .npz file.")
        if vector is not None:
            _require_finite(mine[vector], own.session, vector)
            seen.add(mine[vector])
        if other is not None:
            chosen = [theirs[other.session.outputs.index(name)] for name in own.session.outputs]
            if vector is not None:
                _require_finite(chosen[vector], other.session, vector)
                its.add(chosen[vector])
            _add_output_rows(rows, holds, chosen, mine)
        if wishes.table == ".npz":
            kept.append(mine)
        reporter.progress("evaluate", done + len(lost), len(paths))
    left = [path for path in paths if path not in lost]
    result = Evaluation(source.name, len(left), own.words, "", tuple(output.fact for output in holds))
    labels = labels_of(left, root, classes, wishes.labelling, seen.classes if vector is not None else 0)
    if labels is not None:
        assert classes is not None
        result.labels = classes.source + (f", {wishes.label_offset:+d}" if wishes.label_offset else "")
        result.top1, result.top5 = _measure_accuracy(seen, labels)
    if other is not None:
        result.other = other.session.name
        result.outputs = tuple(map(_compare_output, own.session.outputs, rows))
        if labels is not None:
            result.other_top1, result.other_top5 = _measure_accuracy(its, labels)
            right, wrong = seen.hits(labels, 1), its.hits(labels, 1)
            result.flips = Flips(int((right & ~wrong).sum()), int((wrong & ~right).sum()), len(labels))
    result.predictions = Predictions(
        left, labels, classes, wishes.label_offset, seen if vector is not None else None, its, own.session.outputs, kept
    )
    return result


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


def _add_output_rows(
    rows: list[list[list[float]]], outputs: Sequence[ModelOutput], refs: Outputs, gots: Outputs
) -> None:
    for table, output, ref, got in zip(rows, outputs, refs, gots, strict=True):
        name = output.name
        if not isinstance(ref, np.ndarray) or ref.dtype.kind not in "fiub":
            raise QconvError(f"Output {name} is no tensor of numbers.", "compare models that give tensors.")
        if ref.shape != got.shape:
            raise QconvError(
                f"Output {name} has another shape in the two models: {ref.shape} and {got.shape}.",
                "compare models before their outputs are selected by the data.",
            )
        table.append(_sum_output(output, ref, got))


def _make_no_measure_error(root: Path, vector: int | None) -> QconvError:
    """Build the error for neither labels nor another model. vector: the output with one score a class, or None."""
    why, fix = f"the pictures in {root} lie in no class folders", "a folder with one folder of pictures a class."
    if not root.is_dir():
        why = f"{root} lists pictures, but not the order of their class folders among the outputs"
        fix = "the classes in output order with --classes FILE."
    if vector is None:
        why = "no output is a class score"
    fact = f"There is nothing to measure: {why}, and there is no other model."
    return QconvError(fact, f"pass --against FLOAT, or {fix}")


def _measure_accuracy(
    seen: PredictionRecorder, labels: NDArray[np.int64]
) -> tuple[MeasuredShare, MeasuredShare | None]:
    shares = []
    for most in (1, TOP_K):
        hits = int(seen.hits(labels, most).sum())
        shares.append(MeasuredShare(hits / len(labels), comparison.share_interval(hits, len(labels))))
    return shares[0], shares[1] if seen.classes > TOP_K else None
