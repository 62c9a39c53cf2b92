"""Defines `Judge`, which hears what one or two models say of each picture: how right they are, and how near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.analysis.evaluation import Evaluation, EvaluationOptions, Flips
from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.config.data_options import DataOptions
from qconv.data.dataset import Classes, labels_of, suffix_of
from qconv.data.images import read_size
from qconv.data.model_with_data import ModelWithData, Outputs
from qconv.decoding.boxes import Detections
from qconv.errors import QconvError
from qconv.metrics.classification import PredictionRecorder, Predictions, count_won_and_lost, score_classes
from qconv.metrics.comparison import EVALUATED, ComparisonAccumulator
from qconv.metrics.demands import check_gates, make_no_boxes_error, require_measures
from qconv.metrics.detection_table import DetectionTable
from qconv.metrics.labelled import (
    BoxMeasure,
    FittedLabels,
    MaskMeasure,
    OpenedLabels,
    place_detections,
    tell_of_misfit,
)
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.reporter import Reporter
from qconv.results.quantize import OutputScore
from qconv.runtime.outputs import MAP_KINDS, ModelOutput, find_class_vector
from qconv.runtime.session import Session


@dataclass(slots=True)
class Judge:
    """Adds up what models say of pictures.

    Attributes:
        request: What is to be measured.
        own, other: The models.
        classes: Of class folders, where pictures lie in such.
        opened: Labels of boxes or of masks, where they are given.
        network: What the outputs are, once the first picture was run.
        vector: The output with one score a class; None where there is none.
        labels: `opened` as they suit the network.
        measures: How right each of the models is by them.
        seen, its: Class scores of each picture, of both models.
        table: Boxes for a file of predictions.
        kept: All outputs, for such a file.
    """

    request: EvaluationOptions
    own: ModelWithData
    other: ModelWithData | None
    reporter: Reporter
    classes: Classes | None
    opened: OpenedLabels | None = None
    network: NetworkOutputs | None = None
    vector: int | None = None
    labels: FittedLabels | None = None
    measures: list[BoxMeasure | MaskMeasure] = field(default_factory=list)
    seen: PredictionRecorder = field(default_factory=PredictionRecorder)
    its: PredictionRecorder = field(default_factory=PredictionRecorder)
    compared: ComparisonAccumulator | None = None
    table: DetectionTable | None = None
    kept: list[Outputs] = field(default_factory=list)

    @property
    def reference(self) -> Session:
        """The model that says what the outputs hold."""
        return self.own.session if self.other is None else self.other.session

    def begin(self, feeds: Mapping[str, NDArray[Any]], mine: Outputs, its: Outputs) -> None:
        """Find out what can be measured. What cannot be is better said before thousands of pictures.

        feeds: the first batch of the reference. mine, its: what is said of its first picture, in the order of the first
        model's outputs; `its` is empty where there is no other model.
        """
        network = describe_outputs(self.reference, feeds, its or mine, self.own.session.outputs)
        self.network, self.vector = network, _find_class_row(network.outputs, mine)
        if self.opened is not None:
            self.labels = self.opened.suit(network, self.reference.metadata, self.reporter.warn)
            models = [self.own, *([self.other] if self.other is not None else [])]
            preps = [model.feed.preprocessing for model in models]
            self.measures = [self.labels.start(prep) for prep in preps if prep is not None]
        outputs = 0 if self.vector is None else mine[self.vector].shape[1]
        unlabelled = self.labels is None and self._class_labels(self.own.feed.listing.paths, outputs) is None
        if unlabelled and self.other is None:
            raise _make_no_measure_error(self.request.data, network, self.vector)
        self._require_gates(network, classes=self.labels is None and not unlabelled)
        if self.other is not None:
            self.compared = ComparisonAccumulator.of(network, EVALUATED)
        self._begin_table(network)

    def _require_gates(self, network: NetworkOutputs, *, classes: bool) -> None:
        """Raise QconvError for gates on what is not going to be measured. classes: whether class folders tell top-1."""
        request, labels = self.request, self.labels
        require_measures(request, network)
        if request.min_top1 is not None and not classes:
            fact = "--min-top1 needs class scores, and pictures in a folder for each class"
            raise QconvError(f"{fact}.", "leave it out, or pass --min-agreement with --against.")
        boxes = labels is not None and labels.boxes is not None
        for option, asked, told in (("map", request.min_map, boxes), ("miou", request.min_miou, not boxes)):
            if asked is not None and not told and self.other is None:
                kind = "masks" if labels is not None and labels.boxes is None else "boxes"
                raise QconvError(f"--min-{option} is not told by labels of {kind}.", "pass --against FLOAT as well.")

    def _begin_table(self, network: NetworkOutputs) -> None:
        kind, head = self.request.table, network.head
        if kind in (".csv", ".json") and head is not None:
            self.table = DetectionTable({}, head.names, None if self.labels is None else self.labels.boxes)
        elif kind == ".json":
            raise QconvError("No output of the model is read as boxes.", "save a .csv or a .npz file.")
        elif kind == ".csv" and self.vector is None:
            raise QconvError("No output of the model is one score a class.", "save all outputs in a .npz file.")

    def add(self, path: Path, mine: Outputs, its: Outputs) -> None:
        """Take in what the models say of one picture; its: as of `begin`."""
        assert self.network is not None
        if self.vector is not None and not all(len(found[self.vector]) == 1 for found in (mine, its) if found):
            self.vector = None  # rows that the data select, one of them on the pictures before
        for model, recorder, found in ((self.own, self.seen, mine), (self.other, self.its, its)):
            if self.vector is not None and model is not None:
                _require_finite(found[self.vector], model.session, self.vector)
                recorder.add(found[self.vector])
        own = self.network.hear(mine, reference=self.other is None)
        other = self.network.hear(its, reference=True)
        for measure, heard in zip(self.measures, (own, other), strict=False):
            measure.add(path, heard)
        if self.compared is not None:
            self.compared.add_heard(other, own)
        if self.table is not None:
            self.table.add(path, self._place(path, own.detections[0]))
        if self.request.table == ".npz":
            self.kept.append(mine)

    def _place(self, path: Path, found: Detections) -> Detections:
        """What is detected in a picture, in its own pixels; of a sample in those of the network's input."""
        prep = self.own.feed.preprocessing
        if prep is None or suffix_of(path) in SAMPLE_SUFFIXES:
            return found
        return place_detections(found, read_size(path), prep)

    def conclude(self, name: str, left: Sequence[Path]) -> Evaluation:
        """What was measured. name: of the model. left: the pictures that could be read, in order."""
        assert self.network is not None
        facts = tuple(output.fact for output in self.network.outputs)
        result = Evaluation(name, len(left), self.own.words, "", facts)
        numbers = None
        if self.labels is None:
            numbers = self._class_labels(left, self.seen.classes if self.vector is not None else 0)
        if numbers is None and self.labels is None and self.other is None:
            raise _make_no_measure_error(self.request.data, self.network, self.vector)
        if self.other is not None:
            result.other = self.other.session.name
            if self.compared is not None:
                result.outputs, result.heads = self.compared.scores(spans=True), self.compared.heads(spans=True)
            alone = numbers is None and self.labels is None and not result.heads
            _tell_of_remarks(result.outputs, self.reporter, needed=alone)
        if numbers is not None:
            self._judge_classes(result, numbers)
        if self.labels is not None:
            self._judge_labels(result, self.labels)
        result.gates = check_gates(result.as_verification, self.request)
        self._require_boxes_of_float(result)
        classified = None if self.vector is None else self.seen
        outputs, offset = self.own.session.outputs, self.request.label_offset
        result.predictions = Predictions(
            left, numbers, self.classes, offset, classified, self.its, outputs, self.kept, self.table
        )
        return result

    def _require_boxes_of_float(self, result: Evaluation) -> None:
        """Raise QconvError for a gate beside boxes of which the float model has none, as quantize does."""
        beside = {"min-boxes", *(() if self.labels is not None else ("min-map",))}
        unmet = next((gate.name for gate in result.gates if gate.name in beside and gate.got is None), None)
        head = None if self.network is None else self.network.head
        if unmet is not None and head is not None:
            raise make_no_boxes_error(f"--{unmet}", head)

    def _class_labels(self, paths: Sequence[Path], outputs: int) -> NDArray[np.int64] | None:
        return labels_of(paths, self.request.data, self.classes, self.request.labelling, outputs)

    def _judge_classes(self, result: Evaluation, numbers: NDArray[np.int64]) -> None:
        assert self.classes is not None
        offset = self.request.label_offset
        result.labels = self.classes.source + (f", {offset:+d}" if offset else "")
        result.labelled = score_classes(self.seen, numbers)
        if self.other is not None:
            result.other_labelled = score_classes(self.its, numbers)
            result.flips = Flips(*count_won_and_lost(self.seen, self.its, numbers), len(numbers))

    def _judge_labels(self, result: Evaluation, labels: FittedLabels) -> None:
        labels.finish(self.reporter.warn)
        result.labels = labels.words
        result.labelled = self.measures[0].scores()
        if self.other is not None:
            result.other_labelled = self.measures[1].scores()
            result.differences = self.measures[0].differences(self.measures[1])  # type: ignore[arg-type]
        tell_of_misfit(result.other_labelled or result.labelled, labels.words, self.reporter.warn)


def _find_class_row(holds: Sequence[ModelOutput], found: Outputs) -> int | None:
    """The output with one score a class for the picture at hand; None where that is several rows or none."""
    vector = find_class_vector(holds)
    return vector if vector is not None and len(found[vector]) == 1 else None


def _require_finite(scores: NDArray[Any], session: Session, index: int) -> None:
    if not np.isfinite(scores).all():
        fact = (
            f"Output {session.outputs[index]} of {session.name} holds NaN or infinity, so that no class is the highest."
        )
        raise QconvError(fact, "check the preprocessing options, and the model on one picture.")


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


def _make_no_measure_error(data: DataOptions, network: NetworkOutputs, vector: int | None) -> QconvError:
    """Build the error for neither labels nor another model. vector: the output with one score a class, or None."""
    where = " and ".join(data.paths)
    why, fix = f"the pictures in {where} lie in no class folders", "a folder with one folder of pictures a class."
    if not any(Path(path).is_dir() for path in data.paths) and data.arrays is None:
        why = f"{where} lists pictures, but not the order of their class folders among the outputs"
        fix = "the classes in output order with --classes FILE."
    if vector is None:
        why, fix = "no output is a class score", "--task classify where one is."
    if network.head is not None or any(output.kind in MAP_KINDS for output in network.outputs):
        what = "masks" if network.head is None else "boxes"
        why, fix = f"there are no labels of {what}", f"labels of {what} with --labels."
    fact = f"There is nothing to measure: {why}, and there is no other model."
    return QconvError(fact, f"pass --against FLOAT, or {fix}")
