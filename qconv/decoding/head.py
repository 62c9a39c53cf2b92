"""Defines `Head`: outputs of a network that are read together as detections, by which rule, and why.

A decoder is a function from `NetworkFacts` to a `Head`, or None where the outputs are none of its family. It goes by
metadata, shapes, names and, where these leave a doubt, by the numbers of one run of the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections, sigmoid
from qconv.runtime.output_origins import OutputOrigin

Arrays = Mapping[str, NDArray[Any]]

NO_TENSORS: Arrays = {}


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Rows of an output, or of what outputs are selected from, that mean one thing.

    Attributes:
        name: What, as "boxes" or "scores".
        axis: Along which the rows lie.
        start: The first row.
        stop: The row behind the last one; None for all that follow.
        step: 3 for every third of these rows.
        rows: These, where they do not follow each other.
        times: Rows that these are multiplied by before they say anything, as scores are by objectness.
        sure: The scores of the same places, of which the largest says how much a place counts: a cell without an
            object has a box, too, and nobody reads it. Where any is below -1 or above 1, they are logits.
        tensor: Which tensor holds the rows; empty for the one at hand. Only scores are looked up elsewhere.
        places: The axis of places, where scores are laid out in another way than the rows that they belong to: with
            one of each place, or with an axis of classes, too, or all classes of all places in one row.
        classes_first: Whether such a row holds class by class, and not place by place; None where that is not known.
    """

    name: str
    axis: int = -1
    start: int = 0
    stop: int | None = None
    step: int = 1
    rows: tuple[int, ...] = ()
    times: OutputPart | None = None
    sure: OutputPart | None = None
    tensor: str = ""
    places: int | None = None
    classes_first: bool | None = None

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """These rows of an array."""
        if self.rows:
            return array.take(self.rows, axis=self.axis)
        index: list[slice] = [slice(None)] * array.ndim
        index[self.axis] = slice(self.start, self.stop, self.step)
        return array[tuple(index)]

    def compared(
        self, reference: NDArray[Any], got: NDArray[Any], counts: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """What the squares of two arrays are summed of: these rows of both, as far as they count (`count`)."""
        pair = self._product(reference), self._product(got)
        return pair if counts is None else (pair[0] * counts, pair[1] * counts)

    def count(self, reference: NDArray[Any], tensors: Arrays = NO_TENSORS) -> NDArray[Any] | None:
        """As what each place counts in the reference, to be multiplied with these rows; None where all count alike.

        tensors: all that the reference says, by name; rows whose scores are not among them count alike.
        """
        source = None if self.sure is None else tensors.get(self.sure.tensor) if self.sure.tensor else reference
        if self.sure is None or source is None or not source.size:
            return None
        scores = self.sure._product(source)
        if not np.isfinite(scores).all():
            scores = np.nan_to_num(scores)
        if np.abs(scores).max() > 1:  # -1 may stand where there is nothing
            scores = sigmoid(scores)
        if self.sure.places is None:
            counts = scores.max(axis=self.sure.axis, keepdims=True)
        else:
            counts = _spread_over(scores, reference.shape, self.sure.places, self.sure.classes_first)
        return np.asarray(np.sqrt(np.maximum(counts, 0.0)))

    def _product(self, array: NDArray[Any]) -> NDArray[Any]:
        found = self.of(array)
        if self.times is not None:
            found = np.asarray(found * self.times.of(array))
        return found


def _spread_over(scores: NDArray[Any], shape: Sequence[int], axis: int, classes_first: bool | None) -> NDArray[Any]:
    """The best score of each place, to be multiplied with an array of this shape.

    1 where it is not known how scores belong to places. axis: of the places. classes_first: as in OutputPart.
    """
    places, nothing = shape[axis], np.ones((1,) * len(shape))
    batch = shape[0] if axis else 1
    rows = scores if axis else scores[None] if scores.ndim == 1 or scores.shape[0] != 1 else scores
    if len(rows) != batch or rows.ndim not in (2, 3):
        return nothing
    if rows.ndim == 2 and rows.shape[1] != places:
        if classes_first is None or not places or rows.shape[1] % places:
            return nothing
        rows = rows.reshape((batch, -1, places) if classes_first else (batch, places, -1))
    if rows.ndim == 3:
        by_class = rows.shape[2] == places and (classes_first is not False or rows.shape[1] != places)
        if not by_class and rows.shape[1] != places:
            return nothing
        rows = rows.max(axis=1 if by_class else 2)
    return rows.reshape([batch if at == 0 and axis else places if at == axis else 1 for at in range(len(shape))])


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What is known of a network that may be a detector.

    Attributes:
        outputs: What the float model says of one batch, by name, in the model's order; axis 0 is the batch.
        size: Height and width of its input, in pixels.
        metadata: Of its file.
        origins: What computes each output, where that is known.
    """

    outputs: Arrays
    size: tuple[int, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, OutputOrigin] = field(default_factory=dict)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of an output."""
        return tuple(self.outputs[name].shape)

    def is_float(self, name: str) -> bool:
        """Whether an output holds floats."""
        return self.outputs[name].dtype.kind == "f"


@dataclass(frozen=True, slots=True)
class Head:
    """Outputs that are detections.

    Attributes:
        family: Whose form they have, as "YOLOX".
        why: What tells so, in words.
        outputs: Names of those that are read, in the order in which `decode` takes them.
        decode: Makes of their arrays, axis 0 the batch, and of a least score the detections of each image, in pixels of
            the network's input, after the family's own suppression.
        size: Height and width of the network's input, in pixels.
        usual_score: From which on boxes are shown, as the family's own programs do.
        names: Of classes, where the file tells them.
        parts: Of outputs that hold more than one thing, what they hold.
        decode_reference: In place of `decode` for what the reference says, raises QconvError for what no detection is;
            None where `decode` is sure of itself.
    """

    family: str
    why: str
    outputs: tuple[str, ...]
    decode: Callable[[Sequence[NDArray[Any]], float], list[Detections]]
    size: tuple[int, int]
    usual_score: float = 0.25
    names: Mapping[int, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[OutputPart, ...]] = field(default_factory=dict)
    decode_reference: Callable[[Sequence[NDArray[Any]], float], list[Detections]] | None = None

    def read(self, arrays: Arrays, least: float, *, reference: bool = False) -> list[Detections]:
        """The detections of each image of a batch.

        Args:
            arrays: Outputs by name.
            least: Score that must be exceeded.
            reference: Whether the model that says what outputs hold has put them out, and not another one.
        """
        decode = self.decode_reference if reference and self.decode_reference is not None else self.decode
        with np.errstate(all="ignore"):  # numbers of a poor file may be anything
            return decode([arrays[name] for name in self.outputs], least)


def read_class_names(metadata: Mapping[str, str]) -> dict[int, str]:
    """Names of classes as Ultralytics writes them: `{0: 'person', 1: 'bicycle'}`; empty where there are none."""
    import ast

    try:
        found = ast.literal_eval(metadata.get("names", ""))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {}
    if isinstance(found, list | tuple):
        found = dict(enumerate(found))
    if not isinstance(found, dict):
        return {}
    return {key: str(name) for key, name in found.items() if isinstance(key, int)}
