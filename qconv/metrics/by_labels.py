"""Measures a model and its float model by the labels of the pictures that they are compared on.

opened = open_data_labels(data, paths, warn, hint)      before the work
labels = opened.fit(network, metadata, prep, warn)      once it is known what the outputs are
pair = LabelledPair.of(labels)
pair.add(paths, size, expected, got)                    batch by batch
pair.scores()

Labels are boxes or masks where the user names some (`metrics.labelled`), else the class folders of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from qconv.config.data_options import DataOptions, Preprocessing
from qconv.data.dataset import LabelOptions, find_classes, labels_of
from qconv.data.label_files import USE_EVALUATE, LabelRequest
from qconv.errors import QconvError
from qconv.metrics.classification import ClassMeasure
from qconv.metrics.labelled import BoxMeasure, MaskMeasure, OpenedLabels, Warn, open_labels
from qconv.metrics.network_outputs import BatchOutputs, NetworkOutputs
from qconv.results.scores import LabelledScores
from qconv.runtime.outputs import find_class_vector

Measure = BoxMeasure | MaskMeasure | ClassMeasure


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels as they suit a network.

    words: where they come from. start: makes a measure of one model by them. finish: says what has turned out
    meanwhile. labelled: pictures that have some. elsewhere: what to do where they are of none of the pictures.
    """

    words: str
    start: Callable[[], Measure]
    labelled: Collection[Path]
    finish: Callable[[Warn], None] = lambda warn: None
    elsewhere: str = USE_EVALUATE

    def require_some(self, paths: Collection[Path]) -> None:
        """Raise QconvError where none of the pictures on which models are measured has labels."""
        if not any(path in self.labelled for path in paths):
            fact = f"{self.words}: none of the {len(paths)} pictures that results are checked on has labels."
            fix = f"label more pictures, as those that are held back are drawn (--seed), or {self.elsewhere}"
            raise QconvError(fact, fix)


@dataclass(frozen=True, slots=True)
class DataLabels:
    """Labels of the pictures of some data, not yet of a network's classes. opened: of boxes or masks, None of classes.

    paths: the pictures. elsewhere: what to do where labels are of none of them.
    """

    data: DataOptions
    paths: tuple[Path, ...]
    opened: OpenedLabels | None
    elsewhere: str

    @property
    def tell_boxes(self) -> bool:
        """Whether they are of boxes."""
        return self.opened is not None and self.opened.written is not None

    def fit(
        self, network: NetworkOutputs, metadata: Mapping[str, str], prep: Preprocessing | None, warn: Warn
    ) -> Labels:
        """The same with classes of the model.

        Args:
            network: What its outputs are.
            metadata: Of its file.
            prep: How it is fed; None for samples, which have class folders at most.
            warn: Hears of labels and pictures that are left out.

        Raises:
            QconvError: The network says nothing of the kind, or classes are not known.
        """
        if self.opened is not None and prep is not None:
            fitted = self.opened.suit(network, metadata, warn)
            start = partial(fitted.start, prep)
            return Labels(fitted.words, start, fitted.labelled, fitted.finish, self.elsewhere)
        vector = find_class_vector(network.outputs)
        outputs = 0 if vector is None else network.outputs[vector].classes
        classes = find_classes(self.data, self.data.classes)
        numbers = labels_of(self.paths, self.data, classes, LabelOptions(asked=True), outputs)
        assert vector is not None
        assert classes is not None
        assert numbers is not None
        known = dict(zip(self.paths, numbers.tolist(), strict=True))
        begin = partial(ClassMeasure, network.outputs[vector].name, known)
        return Labels(classes.source, begin, known.keys(), elsewhere=self.elsewhere)


def open_data_labels(data: DataOptions, paths: Sequence[Path], warn: Warn, elsewhere: str) -> DataLabels:
    """Read what is said of pictures, before any is run. Arguments and errors are those of `open_labels`."""
    opened = None
    if data.labels is not None:
        request = LabelRequest(data.labels, data.label_map, data.classes)
        opened = open_labels(request, data, paths, warn, elsewhere)
    return DataLabels(data, tuple(paths), opened, elsewhere)


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Measures of a model and of its float model by the same labels."""

    words: str
    reference: Measure
    own: Measure

    @classmethod
    def of(cls, labels: Labels, reference: Measure | None = None) -> LabelledPair:
        """Nothing measured yet. reference: that of the float model, where it was measured before."""
        return cls(labels.words, reference or labels.start(), labels.start())

    def add(self, paths: Sequence[Path], size: int, expected: BatchOutputs, got: BatchOutputs) -> None:
        """Take in what both say of a batch, see `add_batch`."""
        add_batch(self.reference, paths, size, expected)
        add_batch(self.own, paths, size, got)

    def scores(self) -> LabelledScores | None:
        """What was measured; None where no picture has labels."""
        if not self.own.pictures:
            return None
        differences = self.own.differences(self.reference)  # type: ignore[arg-type]
        return LabelledScores(
            self.words, self.own.pictures, self.own.scores(), self.reference.scores(), tuple(differences)
        )


def add_batch(measure: Measure, paths: Sequence[Path], size: int, outputs: BatchOutputs) -> None:
    """Take a batch into a measure.

    Args:
        measure: Of one model.
        paths: The pictures in the batch; one that is filled up has more rows.
        size: How many rows it has.
        outputs: What the model says of it.

    Raises:
        QconvError: An output of a batch of several has no part for each picture.
    """
    if size == 1:
        measure.add(paths[0], outputs)
        return
    odd = next((name for name, array in outputs.by_name.items() if np.shape(array)[:1] != (size,)), None)
    if odd is not None:
        fact = f"Labels are of single pictures, and output {odd} has no part for each picture of a batch."
        raise QconvError(fact, "pass --batch 1.")
    for index, path in enumerate(paths):
        measure.add(path, outputs.of_picture(index))
