"""Records a classifier's predictions for every image, and writes them as CSV or NPZ.

It also computes top-1 accuracy and

    agreement        = share of places whose best class is the reference's; of equal elements, for integers
    class agreement  = mean over the classes c that the reference says of that share among the places where it says c
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.data.dataset import Classes
from qconv.errors import QconvError
from qconv.metrics.detection_table import DetectionTable
from qconv.metrics.network_outputs import BatchOutputs
from qconv.metrics.similarity import bootstrap_interval, difference_interval, share_interval
from qconv.results.scores import AGREEMENT, SHARE, TOP1, TOP5, Metric, Score
from qconv.runtime.outputs import ModelOutput, OutputKind

TOP_K = 5

LABELLED: Mapping[Metric, int] = {TOP1: 1, TOP5: 5}
"""What labels measure: how many of the best classes may hold the label."""

CLASS_KINDS = frozenset({OutputKind.CLASS_SCORES, OutputKind.CLASS_MAP})
"""Outputs of which the highest score says a class."""


@dataclass(slots=True)
class Agreement:
    """Share of places where two outputs say the same class. rows: equal places and all places of each batch."""

    output: ModelOutput
    rows: list[tuple[int, int]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        if self.output.kind in (OutputKind.INTEGER, OutputKind.CLASS_IDS):
            same = reference == got
        elif self.output.kind is OutputKind.CLASS_SCORES and reference.shape[1] == 1:
            return  # a single score tells no classes
        else:
            same = self.output.labels(reference) == self.output.labels(got)
        self.rows.append((int(same.sum()), same.size))

    def score(self, *, spans: bool) -> Score | None:
        """The interval is Wilson's where each batch is one place, else the bootstrap's."""
        equal, places = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0, 0)
        if not places:
            return None
        span = None
        if spans and all(of == 1 for _, of in self.rows):
            span = share_interval(equal, places)
        elif spans:
            span = bootstrap_interval(np.array(self.rows, np.float64), lambda sums: sums[:, 0] / sums[:, 1])
        return Score(AGREEMENT, equal / places, span)


CLASS_AGREEMENT = Metric("class_agreement", "class", SHARE, equal=1.0, has_interval=False)


@dataclass(slots=True)
class ClassAgreement:
    """Agreement class by class, and the mean over the classes: a rare class that is lost counts like a frequent one.

    equal, places: by the class that the reference says, (C,).
    """

    output: ModelOutput
    equal: NDArray[np.int64] | None = None
    places: NDArray[np.int64] | None = None

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        classes = self.output.classes
        said = self.output.labels(reference).reshape(-1)
        same = said == self.output.labels(got).reshape(-1)
        counts = np.bincount(said[same], minlength=classes), np.bincount(said, minlength=classes)
        self.equal = counts[0] if self.equal is None else self.equal + counts[0]
        self.places = counts[1] if self.places is None else self.places + counts[1]

    def score(self, *, spans: bool) -> Score | None:
        """None where there is a single class. Classes that the reference never says do not count."""
        if self.equal is None or self.places is None or len(self.places) < 2:
            return None
        said = self.places > 0
        return Score(CLASS_AGREEMENT, float((self.equal[said] / self.places[said]).mean()))


@dataclass(slots=True)
class PredictionRecorder:
    """What is remembered of the pictures, in their order.

    best: the classes with the highest scores, (pictures, 5), and their scores. rows: of each output a row a picture:
    sums of ref^2, noise, ref * got, got^2, equal positions, positions.
    """

    best: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    classes: int = 0

    def add(self, output: NDArray[Any]) -> None:
        """Take in one picture's class scores, (1, C) or (1, C, 1, 1)."""
        scores = output.reshape(-1).astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:TOP_K]
        self.classes = scores.size
        self.best.append(order)
        self.scores.append(scores[order])

    def hits(self, labels: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
        """Whether the label is among the `most` best, by picture."""
        found: NDArray[np.bool_] = (np.stack(self.best)[:, :most] == labels[:, None]).any(axis=1)
        return found


def count_won_and_lost(
    seen: PredictionRecorder, other: PredictionRecorder, labels: NDArray[np.int64]
) -> tuple[int, int]:
    """How many pictures only the first one gets right, and only the other."""
    right, its = seen.hits(labels, 1), other.hits(labels, 1)
    return int((right & ~its).sum()), int((its & ~right).sum())


def score_classes(seen: PredictionRecorder, labels: NDArray[np.int64]) -> tuple[Score, ...]:
    """What labels of pictures measure; the best of several classes where there are more than these."""
    found = []
    for metric, most in LABELLED.items():
        if most == 1 or seen.classes > most:
            hits = int(seen.hits(labels, most).sum())
            found.append(Score(metric, hits / len(labels), share_interval(hits, len(labels))))
    return tuple(found)


@dataclass(slots=True)
class ClassMeasure:
    """Adds up how often a classifier is right, see `metrics.labelled`. output: its name. labels: of all pictures."""

    output: str
    labels: Mapping[Path, int]
    seen: PredictionRecorder = field(default_factory=PredictionRecorder)
    expected: list[int] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        """How many were taken in."""
        return len(self.expected)

    def add(self, path: Path, outputs: BatchOutputs) -> None:
        """Take in what the model says of a picture."""
        self.seen.add(outputs.by_name[self.output])
        self.expected.append(self.labels[path])

    def scores(self) -> tuple[Score, ...]:
        """top-1 and top-5."""
        return score_classes(self.seen, np.array(self.expected, np.int64))

    def differences(self, other: ClassMeasure) -> tuple[Score, ...]:
        """By how much top-1 is above another model's on the same pictures."""
        won, lost = count_won_and_lost(self.seen, other.seen, np.array(self.expected, np.int64))
        span = difference_interval(won, lost, self.pictures)
        return (Score(TOP1, (won - lost) / self.pictures, span),)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model said of every picture."""

    paths: Sequence[Path]
    labels: NDArray[np.int64] | None
    classes: Classes | None
    offset: int
    seen: PredictionRecorder | None
    other: PredictionRecorder
    names: Sequence[str]
    outputs: Sequence[list[NDArray[Any]]]
    boxes: DetectionTable | None = None

    def as_table(self, suffix: str) -> bytes:
        """The content of a file with this suffix. Raises QconvError where it cannot hold what was said."""
        if suffix == ".npz":
            return self.as_npz()
        if self.boxes is not None:
            return self.boxes.as_csv() if suffix == ".csv" else self.boxes.as_json()
        return self.as_csv()

    def as_csv(self) -> bytes:
        """A line a picture: path, label, the best five classes with their scores, the other model's best class.

        Raises QconvError where no output is one score a class.
        """
        if self.seen is None:
            raise QconvError("No output of the model is one score a class.", "save all outputs in a .npz file.")
        count = min(TOP_K, self.seen.classes)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["path", "label", "label_name", "correct", "top1_name"]
        head += [f"{what}{n}" for n in range(1, count + 1) for what in ("top", "score")]
        writer.writerow([*head, *(["against_top1"] if self.other.best else [])])
        for index in sorted(range(len(self.paths)), key=lambda i: self.paths[i].as_posix()):
            best, scores = self.seen.best[index], self.seen.scores[index]
            label = None if self.labels is None else int(self.labels[index])
            row: list[Any] = [self.paths[index].as_posix(), "" if label is None else label, self._name(label)]
            row += ["" if label is None else int(best[0] == label), self._name(int(best[0]))]
            for number, score in zip(best, scores, strict=True):
                row += [int(number), repr(float(np.float32(score)))]
            row += [int(self.other.best[index][0])] if self.other.best else []
            writer.writerow(row)
        return text.getvalue().encode("utf-8", "surrogateescape")

    def _name(self, label: int | None) -> str:
        if label is None or self.classes is None:
            return ""
        return self.classes.names.get(label - self.offset, "")

    def as_npz(self) -> bytes:
        """All outputs, (pictures, ...) each under its name, with `paths`, and `labels` where they are known.

        Raises QconvError for outputs whose shapes differ from picture to picture.
        """
        order = sorted(range(len(self.paths)), key=lambda i: self.paths[i].as_posix())
        arrays: dict[str, NDArray[Any]] = {"paths": np.array([self.paths[i].as_posix() for i in order])}
        if self.labels is not None:
            arrays["labels"] = self.labels[order]
        for index, name in enumerate(self.names):
            found = [self.outputs[i][index] for i in order]
            if not all(isinstance(array, np.ndarray) and array.dtype.kind in "fiub" for array in found):
                raise QconvError(f"Output {name} is no tensor of numbers.", "save a .csv instead.")
            if len({array.shape for array in found}) > 1:
                raise QconvError(f"Output {name} differs in shape from picture to picture.", "save a .csv instead.")
            arrays[f"{name}_output" if name in ("paths", "labels") else name] = (
                np.concatenate(found) if found[0].ndim else np.stack(found)
            )
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:  # np.savez would take some names for options of its own
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
        return stream.getvalue()
