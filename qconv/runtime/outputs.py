"""Decides what each output of a model holds: class scores, a class map, an embedding, keypoints, numbers, or integers.

The decision is made once for an output, from its shape, its type, its name and the operators that compute it, and says
why. Whoever needs it asks `Session.model_outputs`: the centre crop of pictures, metrics, top-1, the loss of training.

    integer         no floats
    class scores    one number a class for a picture: (N, C), with or without axes of 1 behind
    class map       one number a class for every place: (N, C, H, W), or (N, H, W, C) where the input has that layout;
                    one channel says foreground or not
    class ids       the number of a class for every place, behind ArgMax: (N, H, W), with or without an axis of 1
    detections      read together with others by a decoder, as boxes, scores or what belongs to them
    embedding       (N, D) of one length, or of features that no layer makes classes of
    keypoints       places in the picture: (N, K, 2) or (N, K, 3), flat or not, or a heat map of each, (N, K, H, W)
    regression      everything else in floats: a picture, a depth, an angle

An embedding has length 1 (an L2 norm), ends in BatchNormalization or in pooling, or has a width such as 512 that is no
count of classes. A picture has one or three channels as the input does, its size or a multiple, and no classifier of
pixels (Softmax, a 1x1 Conv, a Resize of scores) at its end. One channel is a map of classes behind a sigmoid, or where
a 1x1 Conv makes it of a colour picture, in its size, or where its name says mask. No operator tells keypoints: the
output's name does, or the file's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.tasks import Tasks
from qconv.errors import QconvError, format_count, format_shape
from qconv.results.quantize import OutputFact
from qconv.runtime.output_origins import LAYER_OPS, NORMALIZING_OP, SOFTMAX_OPS, OutputOrigin

Shape = tuple[int | None, ...]

POOLING_OPS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax"})

SIGMOID_OPS = frozenset({"Sigmoid", "HardSigmoid"})

FEWEST_FEATURES = 64
"""Width from which on a power of two counts as a number of features, and any multiple of it behind a pooling."""

FEWEST_COORDINATES = 4
"""Of two points in the plane: what has fewer numbers is no set of keypoints."""

POINT_NAMES = re.compile(r"key_?point|land_?mark|(?<![a-z])(?:kpts?|kps|lmks?|ldmks?|joints?)(?![a-z])")
"""Names of outputs that hold keypoints, as coordinates or as heat maps."""

COORDINATE_NAMES = re.compile(r"contour|(?<![a-z])iris(?![a-z])")
"""Names that say so of coordinates alone: as maps, contours and irises are segmented."""

HEAT_MAP_NAMES = re.compile(r"heat_?map")

SCORE_NAMES = re.compile(r"score|conf|prob|visib|presen|class|label|logit")
"""Names of what says how sure a network is of its keypoints, and not where they are."""

MASK_NAMES = re.compile(r"mask|segm|salien|foreground|matte")

SURFACE_NAMES = re.compile(r"depth|disp|density")
"""Names of maps of one channel whose sigmoid is a measure, and says nothing of a foreground."""

POSE_TASKS = frozenset({"pose", "keypoints"})
"""What the metadata of files call a network that finds keypoints."""


class OutputKind(StrEnum):
    """What the numbers of an output are."""

    CLASS_SCORES = "class-scores"
    CLASS_MAP = "class-map"
    CLASS_IDS = "class-ids"
    DETECTIONS = "detections"
    EMBEDDING = "embedding"
    KEYPOINTS = "keypoints"
    REGRESSION = "regression"
    INTEGER = "integer"


KIND_OF_TASK = {
    "classify": OutputKind.CLASS_SCORES,
    "segment": OutputKind.CLASS_MAP,
    "regress": OutputKind.REGRESSION,
    "detect": OutputKind.DETECTIONS,
    "embed": OutputKind.EMBEDDING,
    "keypoints": OutputKind.KEYPOINTS,
}
"""What `--task` says of outputs."""

TASK_OF_KIND = {kind: task for task, kind in KIND_OF_TASK.items()} | {OutputKind.CLASS_IDS: "segment"}

MAP_KINDS = frozenset({OutputKind.CLASS_MAP, OutputKind.CLASS_IDS})
"""Outputs that say a class of every place."""

ANY_SHAPE = frozenset({OutputKind.REGRESSION, OutputKind.EMBEDDING, OutputKind.KEYPOINTS})
"""What an output of floats may be said to be, whatever its shape."""

Decision = tuple[OutputKind, str]
"""A kind, and why, in words."""


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """An output with what it holds.

    floating: whether it is a tensor of floats. shape: None for each axis that the model leaves open.
    image: shape of the model's first input, () where it is unknown. origin: None where it is unknown.
    task: what the user says of the output, "auto" for nothing. metadata_task: what the file's metadata call the
    network's task, empty for nothing. detected: why it is read as detections, by the decoder that does so; empty where
    none does.
    """

    name: str
    floating: bool
    shape: Shape
    image: Shape = ()
    origin: OutputOrigin | None = None
    task: str = "auto"
    metadata_task: str = ""
    detected: str = ""

    def seen(self, shape: Sequence[int]) -> ModelOutput:
        """The output with the shape of an array that was seen of it."""
        return replace(self, shape=tuple(shape))

    @property
    def kind(self) -> OutputKind:
        """What the output holds."""
        return self._decide()[0]

    @property
    def why(self) -> str:
        """What speaks for this kind, in words."""
        return self._decide()[1]

    @property
    def fact(self) -> OutputFact:
        """The output as reports hold it."""
        kind, why = self._decide()
        return OutputFact(self.name, kind, TASK_OF_KIND.get(kind), why)

    @property
    def axis(self) -> int:
        """The axis of classes: the last one of a map where the input has its channels last, else 1."""
        last = len(self.image) == 4 and self.image[3] in (1, 3) and self.image[1] not in (1, 3)
        return 3 if last and len(self.shape) == 4 and not self._is_vector else 1

    @property
    def classes(self) -> int:
        """How many classes it tells apart; 0 where it holds none, or the model leaves their number open."""
        kind = self.kind
        if kind is OutputKind.CLASS_MAP and self.shape[self.axis] == 1:
            return 2
        holds = kind in (OutputKind.CLASS_SCORES, OutputKind.CLASS_MAP)
        return (self.shape[self.axis] or 0) if holds and len(self.shape) > self.axis else 0

    @property
    def threshold(self) -> float:
        """Above which the number of a map of one channel says foreground: 0 for logits, 0.5 behind a sigmoid."""
        return 0.5 if (SIGMOID_OPS | {"Clip"}) & set(self._operators) else 0.0

    @property
    def size(self) -> Shape:
        """The axes of a map that are places."""
        return tuple(side for index, side in enumerate(self.shape) if index not in (0, self.axis))

    @property
    def input_channels(self) -> int | None:
        """The channels of the input; None where they are open, or it is no picture."""
        return _channels_and_size(self.image)[0]

    @property
    def input_size(self) -> Shape:
        """Height and width of the input; () where it is no picture."""
        return _channels_and_size(self.image)[1]

    def labels(self, array: NDArray[Any]) -> NDArray[np.int64]:
        """The class that an array of this output says, of each picture, (N, ...), or of each place, (N, H, W)."""
        found: NDArray[Any]
        if self.kind is OutputKind.CLASS_IDS:
            found = np.nan_to_num(array.squeeze(self.axis) if array.ndim == 4 else array)
        elif self.kind is OutputKind.CLASS_MAP and array.shape[self.axis] == 1:
            found = array.squeeze(self.axis) > self.threshold
        else:
            found = array.argmax(axis=self.axis)
        return found.astype(np.int64, copy=False)

    @property
    def _is_vector(self) -> bool:
        return len(self.shape) >= 2 and set(self.shape[2:]) <= {1}

    @property
    def _is_map(self) -> bool:
        """Whether it has an axis of channels, and more than one place."""
        return len(self.shape) == 4 and not self._is_vector

    @property
    def _is_plane(self) -> bool:
        """Whether it holds one number for every place."""
        if len(self.shape) == 4:
            return self._is_map and self.shape[self.axis] == 1
        return len(self.shape) == 3 and 1 not in self.shape[1:]

    @property
    def _operators(self) -> tuple[str, ...]:
        return () if self.origin is None else self.origin.operators

    def _decide(self) -> Decision:
        """The first rule that says something; what is left holds classes."""
        rules: tuple[Callable[[], Decision | None], ...] = (
            self._as_read,
            self._as_told,
            self._as_integers,
            self._as_keypoints,
            self._as_foreground,
            self._as_rows,
            self._as_numbers,
            self._as_features,
            self._as_picture,
        )
        return next((found for rule in rules if (found := rule()) is not None), None) or self._as_classes()

    def _as_read(self) -> Decision | None:
        return (OutputKind.DETECTIONS, self.detected) if self.detected else None

    def _as_told(self) -> Decision | None:
        told = KIND_OF_TASK.get(self.task)
        why = f"--task {self.task}"
        if told is OutputKind.CLASS_MAP and not self.floating and self._is_plane:
            return OutputKind.CLASS_IDS, why
        possible = {OutputKind.CLASS_SCORES: self._is_vector, OutputKind.CLASS_MAP: self._is_map}
        if self.floating and told is not None and (told in ANY_SHAPE or possible.get(told)):
            return told, why
        return None

    def _as_integers(self) -> Decision | None:
        if self._is_plane and next(iter(self._operators), "") == "ArgMax":
            return OutputKind.CLASS_IDS, "ArgMax gives a class for every place"
        return None if self.floating else (OutputKind.INTEGER, "it holds no floats")

    def _as_keypoints(self) -> Decision | None:
        name, wanted = self.name.lower(), self.metadata_task in POSE_TASKS
        if SCORE_NAMES.search(name) or SOFTMAX_OPS & set(self._operators):
            return None
        said = "the file's metadata say " + self.metadata_task if wanted else "its name says so"
        if self._is_map and self.shape[self.axis] != 1 and 1 not in self.shape[1:]:
            named = wanted or POINT_NAMES.search(name) or HEAT_MAP_NAMES.search(name)
            return (OutputKind.KEYPOINTS, f"heat maps of keypoints: {said}") if named else None
        if not (wanted or POINT_NAMES.search(name) or COORDINATE_NAMES.search(name)):
            return None
        sides = [side for side in self.shape[1:] if side != 1]
        if len(sides) == 2 and sides[1] in (2, 3):
            return OutputKind.KEYPOINTS, f"coordinates of points: {said}"
        width = sides[0] if len(sides) == 1 else None
        step = next((step for step in (2, 3) if width and width >= FEWEST_COORDINATES and width % step == 0), None)
        return (OutputKind.KEYPOINTS, f"{width} coordinates of points: {said}") if step else None

    def _as_foreground(self) -> Decision | None:
        """A map of one channel that says what is foreground."""
        if not (self._is_map and self._is_plane) or SURFACE_NAMES.search(self.name.lower()):
            return None
        if SIGMOID_OPS & set(self._operators):
            return OutputKind.CLASS_MAP, "a sigmoid gives one channel: foreground above 0.5"
        if MASK_NAMES.search(self.name.lower()):
            return OutputKind.CLASS_MAP, f"its name says so of one channel: foreground above {self.threshold:g}"
        channels, whole = self.input_channels, None not in self.size and self.size == self.input_size
        linear = set(self._operators) <= {"Resize", "Add", "Conv"} and self.origin is not None
        if channels == 3 and whole and linear and self.origin is not None and self.origin.kernel == 1:
            return OutputKind.CLASS_MAP, "a 1x1 Conv gives one channel of the input's size: foreground above 0"
        return None

    def _as_rows(self) -> Decision | None:
        """Rows that are picked by places which the network computes, as boxes behind NonMaxSuppression are."""
        if self._is_vector and self._operators[-1:] and self._operators[-1] in ("Gather", "GatherND", "Compress"):
            return OutputKind.REGRESSION, "the data select its rows, which are no pictures therefore"
        return None

    def _as_numbers(self) -> Decision | None:
        if self._is_vector or (self._is_map and self.shape[self.axis] != 1):
            return None
        return OutputKind.REGRESSION, f"the shape {format_shape(self.shape)} has no axis of classes"

    def _as_features(self) -> Decision | None:
        why = self._why_features()
        return (OutputKind.EMBEDDING if self._is_vector else OutputKind.REGRESSION, why) if why else None

    def _as_picture(self) -> Decision | None:
        why = "" if self._is_vector else self._why_picture()
        return (OutputKind.REGRESSION, why) if why else None

    def _as_classes(self) -> Decision:
        width = self.shape[self.axis]
        count = "one number a class" if width is None else format_count(width, "number")
        kind, each = (
            (OutputKind.CLASS_SCORES, "a picture") if self._is_vector else (OutputKind.CLASS_MAP, "for every place")
        )
        end = next((op for op in self._operators if op in SOFTMAX_OPS | LAYER_OPS), "")
        return kind, f"{count} {each}{f' behind {end}' if end else ''}"

    def _why_features(self) -> str:
        """Why numbers along the axis of classes are features and no classes; empty where nothing says so."""
        last, width = next(iter(self._operators), ""), self.shape[self.axis]
        if last == NORMALIZING_OP:
            return "an L2 norm gives it length 1, as embeddings have"
        if SOFTMAX_OPS & set(self._operators) or width is None:
            return ""
        if self._is_vector and last == "BatchNormalization":
            return "it ends in BatchNormalization, as embeddings do"
        if last == "Concat" and not self._is_vector:
            return "it joins tensors of several layers along its channels"
        layers = [op for op in self._operators if op in LAYER_OPS]
        pooled = last in POOLING_OPS and (not layers or layers[0] == "Conv")
        if self._is_vector and pooled and width >= FEWEST_FEATURES and width % FEWEST_FEATURES == 0:
            return f"{width} pooled channels are features: no layer makes classes of them"
        if self.origin is not None and width >= FEWEST_FEATURES and width & (width - 1) == 0:
            return f"a power of two, {width}, is a number of features rather than of classes, and no Softmax follows"
        return ""

    def _why_picture(self) -> str:
        """Why a map is a picture and no classes; empty where it is none."""
        if self.shape[self.axis] != 3:
            return ""
        if SOFTMAX_OPS & set(self._operators):
            return ""
        channels, size = self.input_channels, self.input_size
        if self.image and channels is not None and channels != 3:
            return ""
        if any(have is not None and had is not None and have % had for have, had in zip(self.size, size, strict=False)):
            return ""  # smaller than the input, or no multiple of it
        last = next(iter(self._operators), "")
        if last == "Resize" and LAYER_OPS & set(self._operators):
            return ""  # of scores; a picture that is resized is convolved again
        if last in LAYER_OPS and self.origin is not None and self.origin.kernel == 1:
            return ""
        return "three channels of the input's size are a picture, and no classifier of pixels is at its end"


def _channels_and_size(image: Shape) -> tuple[int | None, Shape]:
    """The channels and the size of an input of four axes, with channels first or last; None and () for others."""
    if len(image) != 4:
        return None, ()
    last = image[3] in (1, 3) and image[1] not in (1, 3)
    return (image[3], image[1:3]) if last else (image[1], image[2:])


def find_class_vector(outputs: Sequence[ModelOutput]) -> int | None:
    """Which output is one score a class, of two classes or more: the first one; None where none is."""
    found = (i for i, o in enumerate(outputs) if o.kind is OutputKind.CLASS_SCORES and o.shape[o.axis] != 1)
    return next(found, None)


def require_tasks(model: str, outputs: Sequence[ModelOutput], tasks: Tasks) -> None:
    """Raise QconvError where `--task` names what no output can hold; detections are looked for in outputs seen."""
    for entry in tasks.task.split(","):
        name, _, task = entry.rpartition("=")
        meant = [output for output in outputs if not name or output.name == name]
        if not meant:
            known = ", ".join(output.name for output in outputs)
            raise QconvError(f"--task {entry}: {model} has no output {name!r}, but {known}.", "name one of these.")
        wanted = KIND_OF_TASK.get(task, OutputKind.DETECTIONS)
        kinds = MAP_KINDS if wanted is OutputKind.CLASS_MAP else {wanted}
        if wanted is OutputKind.DETECTIONS or any(o.kind in kinds or not o.shape for o in meant):
            continue
        shapes = ", ".join(f"{output.name} is {format_shape(output.shape)}" for output in meant)
        needs = {
            OutputKind.CLASS_SCORES: "an output (N, C)",
            OutputKind.CLASS_MAP: "an output (N, C, H, W)",
        }.get(wanted, "an output of floats")
        raise QconvError(
            f"--task {entry} needs {needs}, but of {model} {shapes}.", "leave --task out, or name another."
        )
