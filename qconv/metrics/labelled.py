"""Measures models by labels of boxes or of masks: mAP of detectors, mIoU and pixel accuracy of segmenters.

opened = open_labels(request, data, paths, warn, hint)       before any picture is run
labels = opened.suit(network, warn)                     once the first one was
measure = labels.start(preprocessing)                   for each model
measure.add(path, outputs)                              picture by picture
measure.scores()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import numpy as np

from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.config.data_options import DataOptions, Preprocessing
from qconv.data.box_labels import (
    BoxLabelSet,
    WrittenLabels,
    describe_boxes_outside,
    require_stated_sizes,
    settle_classes,
)
from qconv.data.dataset import suffix_of
from qconv.data.fitting import Size, place_picture
from qconv.data.images import UnreadableImage, read_size
from qconv.data.label_files import LabelForm, LabelledPictures, LabelRequest, ModelClasses, find_label_form
from qconv.data.mask_labels import NO_CLASS, MaskLabels, read_mask_labels, tell_of_unmapped
from qconv.decoding.boxes import MOST_BOXES, Detections
from qconv.decoding.head import Head, read_class_names
from qconv.errors import QconvError, format_count
from qconv.metrics.average_precision import AveragePrecision, require_detect_extra
from qconv.metrics.network_outputs import NO_DECODER_HINT, BatchOutputs, NetworkOutputs
from qconv.metrics.segmentation import LabelledMiou
from qconv.results.scores import MAP, MIOU, Score
from qconv.runtime.outputs import MAP_KINDS, ModelOutput

Warn = Callable[[str], None]


class LabelMeasure(Protocol):
    """Adds up how right one model is, picture by picture."""

    @property
    def pictures(self) -> int:
        """How many were taken in that have labels."""

    def add(self, path: Path, outputs: BatchOutputs) -> None:
        """Take in what the model says of a picture, a batch of one; a picture without labels counts nothing."""

    def scores(self) -> tuple[Score, ...]:
        """What was measured, with intervals at 95 %."""

    def differences(self, other: Self) -> tuple[Score, ...]:
        """By how much it is above another model's measure of the same pictures, with paired intervals."""


def place_detections(found: Detections, size: Size, prep: Preprocessing) -> Detections:
    """What a detector finds in one picture, in pixels of that. size: width and height of the picture."""
    found = found.select(np.arange(min(len(found), MOST_BOXES)))
    placed = place_picture(size, prep)
    moved = found.moved(placed.scale, placed.offset)
    return moved.clipped(*size) if placed.cuts_off else moved


@dataclass(slots=True)
class BoxMeasure:
    """Adds up what a detector finds in labelled pictures. labels: of boxes. sizes: of pictures. prep: of the model."""

    labels: BoxLabelSet
    sizes: Mapping[Path, Size]
    prep: Preprocessing
    precision: AveragePrecision = field(default_factory=AveragePrecision)

    @property
    def pictures(self) -> int:
        """How many were taken in that have labels."""
        return len(self.precision.labels)

    def add(self, path: Path, outputs: BatchOutputs) -> None:
        """Take in a picture."""
        if path in self.labels.pictures:
            found = place_detections(outputs.detections[0], self.sizes[path], self.prep)
            self.precision.add(found, self.labels.pictures[path])

    def scores(self) -> tuple[Score, ...]:
        """mAP and mAP50."""
        return self.precision.scores()

    def differences(self, other: BoxMeasure) -> tuple[Score, ...]:
        """Of both."""
        return self.precision.differences(other.precision)


@dataclass(slots=True)
class MaskMeasure:
    """Adds up how right a segmenter's map is. output: the map. labels, sizes, prep: as of `BoxMeasure`."""

    output: ModelOutput
    labels: MaskLabels
    sizes: Mapping[Path, Size]
    prep: Preprocessing
    totals: LabelledMiou = field(default_factory=LabelledMiou)

    @property
    def pictures(self) -> int:
        """How many were taken in that have labels."""
        return len(self.totals.rows)

    def add(self, path: Path, outputs: BatchOutputs) -> None:
        """Take in a picture."""
        if path in self.labels.files and path in self.sizes:
            (said,) = self.output.labels(outputs.by_name[self.output.name])
            height, width = said.shape
            expected = self.labels.on_grid(path, self.sizes[path], self.prep, (height, width))
            self.totals.add(expected, said, self.labels.classes or 0, NO_CLASS)

    def scores(self) -> tuple[Score, ...]:
        """mIoU and pixel accuracy."""
        return self.totals.scores()

    def differences(self, other: MaskMeasure) -> tuple[Score, ...]:
        """Of both."""
        return self.totals.differences(other.totals)


def tell_of_misfit(of_float: Sequence[Score], words: str, warn: Warn) -> None:
    """Warn where the float model itself finds next to nothing of what is labelled. words: on the labels."""
    score = next(iter(of_float), None)
    if score is None or score.metric not in MISFITS or score.value is None:
        return
    if score.value < MISFITS[score.metric]:
        told = f"the float model has {score.metric.label} {score.metric.format(score.value)} by {words}"
        warn(f"{told}: they, the order of their classes or the preprocessing may not be the model's.")


MISFITS = {MAP: 0.02, MIOU: 0.02}
"""Below which labels hardly suit a trained network. Boxes at random have less, a map of one class by chance more."""


@dataclass(frozen=True, slots=True)
class FittedLabels:
    """Labels as they suit a network.

    words: where they come from. labelled: pictures that have some. boxes: those of boxes, where they are such.
    """

    words: str
    start: Callable[[Preprocessing], BoxMeasure | MaskMeasure]
    labelled: Collection[Path]
    boxes: BoxLabelSet | None = None
    finish: Callable[[Warn], None] = lambda warn: None
    """Says what has turned out while pictures were measured."""


@dataclass(frozen=True, slots=True)
class OpenedLabels:
    """Labels as they are written.

    Attributes:
        request: What the user says of them.
        form: How they are written.
        pictures: For which they are looked for.
        sizes: Width and height of those that can be read.
        written: What labels of boxes say; None for masks.
    """

    request: LabelRequest
    form: LabelForm
    pictures: LabelledPictures
    sizes: Mapping[Path, Size]
    written: WrittenLabels | None

    def suit(self, network: NetworkOutputs, metadata: Mapping[str, str], warn: Warn) -> FittedLabels:
        """The same with classes of the model.

        Args:
            network: What its outputs are.
            metadata: Of its file.
            warn: Hears of labels and pictures that are left out.

        Raises:
            QconvError: The network says nothing of the kind, or classes are not known.
        """
        words = f"{self.request.path} ({self.form})"
        if self.written is not None:
            head = self._require_head(network)
            boxes = settle_classes(self.written, self.request, find_model_classes(network, head), warn)
            if all(own.ignored.all() for path, own in boxes.pictures.items() if path in self.sizes):
                fact = f"{self.request.path} holds no box that counts in these pictures."
                raise QconvError(fact, "label boxes of the model's classes; crowds and difficult ones do not count.")
            self._tell_of_unlabelled(boxes.pictures, warn)
            return FittedLabels(words, lambda prep: BoxMeasure(boxes, self.sizes, prep), boxes.pictures.keys(), boxes)
        output = next((output for output in network.outputs if output.kind in MAP_KINDS), None)
        if output is None:
            raise self._make_misfit_error("masks", "no output is a map of classes", network, "--task segment")
        known = ModelClasses(read_class_names(metadata), output.classes or None)
        masks = read_mask_labels(self.request, self.pictures, known)
        if not masks.count_any(self.sizes):
            fact = f"{self.request.path} holds no mask with a place that counts."
            raise QconvError(fact, "give masks with ids of the model's classes; 255 and ignored ids do not count.")
        self._tell_of_unlabelled(masks.files, warn)
        return FittedLabels(
            words,
            lambda prep: MaskMeasure(output, masks, self.sizes, prep),
            masks.files.keys() & self.sizes.keys(),
            finish=lambda tell: tell_of_unmapped(masks, tell),
        )

    def _require_head(self, network: NetworkOutputs) -> Head:
        if network.head is None:
            raise self._make_misfit_error("boxes", "no output is read as detections", network, NO_DECODER_HINT)
        return network.head

    def _make_misfit_error(self, what: str, lack: str, network: NetworkOutputs, fix: str) -> QconvError:
        holds = ", ".join(output.fact.in_words for output in network.outputs)
        hint = fix if fix.endswith(".") else f"pass {fix} where one is."
        return QconvError(f"{self.request.path} holds {what} as labels, but {lack}: {holds}.", hint)

    def _tell_of_unlabelled(self, labelled: Collection[Path], warn: Warn) -> None:
        missing = sum(path not in labelled for path in self.sizes)
        if missing:
            warn(f"{format_count(missing, 'picture')} of {len(self.sizes)} have no labels, and do not count.")


def open_labels(
    request: LabelRequest, data: DataOptions, paths: Sequence[Path], warn: Warn, elsewhere: str
) -> OpenedLabels:
    """Read what labels say of pictures, before any is run.

    Args:
        request: What the user says of labels.
        data: Of which pictures these are.
        paths: The pictures.
        warn: Hears of labels that are left out, and of boxes outside.
        elsewhere: What to do where they are of none of these pictures.

    Raises:
        QconvError: Labels cannot be read, are of none of these pictures, of pictures of other sizes, or need what is
            not installed.
    """
    sample = next((path for path in paths if suffix_of(path) in SAMPLE_SUFFIXES), None)
    if sample is not None or data.arrays is not None:
        told = sample if data.arrays is None else data.arrays.name
        fact = f"{told}: what is preprocessed already does not tell where in a picture its labels lie."
        raise QconvError(fact, "pass pictures with --labels.")
    pictures = LabelledPictures.of(paths, data)
    form = find_label_form(request.path, pictures, elsewhere)
    if form is not LabelForm.MASKS:
        require_detect_extra()
    sizes = _read_sizes(paths)
    all_used = data.samples is None and data.glob is None
    if form is LabelForm.MASKS:
        files = pictures.files_in(request.path, ".png")
        strangers = {*request.path.rglob("*.png")} - {*files.values(), *paths}
        _tell_of_strangers(len(strangers) if all_used else 0, warn)
        return OpenedLabels(request, form, pictures, sizes, None)
    written = _read_boxes(form, request.path, pictures, sizes)
    if not any(path in sizes for path in written.pictures):
        fact = f"{request.path} has labels of none of the pictures, as {paths[0].name}"
        raise QconvError(f"{fact}, but of {written.strangers} others.", elsewhere)
    require_stated_sizes(written, sizes, request.path)
    _tell_of_strangers(written.strangers if all_used else 0, warn)
    for text in filter(None, (*written.remarks, describe_boxes_outside(written, sizes))):
        warn(text)
    return OpenedLabels(request, form, pictures, sizes, written)


def _read_boxes(form: LabelForm, path: Path, pictures: LabelledPictures, sizes: Mapping[Path, Size]) -> WrittenLabels:
    """The boxes of a file or folder. Only the reader of their form is imported: most runs have no labels at all."""
    if form is LabelForm.COCO:
        from qconv.data.coco_labels import read_coco_labels

        return read_coco_labels(path, pictures)
    if form is LabelForm.VOC:
        from qconv.data.voc_labels import read_voc_labels

        return read_voc_labels(path, pictures)
    from qconv.data.yolo_labels import read_yolo_labels

    return read_yolo_labels(path, pictures, sizes)


def _tell_of_strangers(count: int, warn: Warn) -> None:
    if count:
        warn(f"labels of {format_count(count, 'picture')} are not used: no picture is called so.")


def _read_sizes(paths: Sequence[Path]) -> dict[Path, Size]:
    """Those that cannot be read are told of, and counted, where pictures are loaded."""
    found = {}
    for path in paths:
        try:
            found[path] = read_size(path)
        except UnreadableImage:
            continue
    return found


def find_model_classes(network: NetworkOutputs, head: Head) -> ModelClasses:
    """Names of a detector's classes, and how many it has, as far as these are known."""
    if head.names:
        return ModelClasses(head.names, max(head.names) + 1)
    shapes = {output.name: [side or 0 for side in output.shape] for output in network.outputs}
    if any(output.name in head.outputs and not output.floating for output in network.outputs):
        return ModelClasses({})  # numbers of classes, beside one score a box
    for name, parts in head.parts.items():
        scores = next((part for part in parts if part.name == "scores"), None)
        if scores is not None and not any(part.name == "classes" for part in parts):
            return ModelClasses({}, scores.of(np.broadcast_to(np.int8(0), shapes[name])).shape[scores.axis])
    return ModelClasses({})
