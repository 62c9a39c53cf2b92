"""Reads labels of boxes in any form, as boxes in pixels of the upright picture with classes of the model.

Boxes are (x1, y1, x2, y2) with the left upper corner of the picture at (0, 0). A crowd may be found any number of
times, and an ignored box once, without counting. `data.coco_labels`, `data.yolo_labels` and `data.voc_labels` read the
forms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qconv.data.fitting import Size
from qconv.data.label_classes import LabelKeys, number_classes
from qconv.data.label_files import Key, LabelRequest, ModelClasses
from qconv.errors import QconvError, format_count

Float64 = NDArray[np.float64]

TOLERANCE = 1.0
"""Pixels by which a box may reach beyond its picture, and a size differ from it, as rounded numbers do."""


@dataclass(frozen=True, slots=True)
class BoxLabels:
    """The objects of one picture.

    Attributes:
        boxes: By their edges in pixels, (N, 4).
        classes: Numbers of the model's classes, (N,).
        crowd: Groups, of which any part may be found, (N,).
        ignored: Boxes that do not count, found or not; crowds among them, (N,).
    """

    boxes: Float64
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    ignored: NDArray[np.bool_]

    @classmethod
    def of(
        cls, boxes: ArrayLike, classes: ArrayLike, crowd: ArrayLike | None = None, ignored: ArrayLike | None = None
    ) -> BoxLabels:
        """Labels of lists. crowd, ignored: None for none of them."""
        numbers = np.asarray(classes, np.int64).reshape(-1)
        none = np.zeros(len(numbers), bool)
        crowds = none if crowd is None else np.asarray(crowd, bool).reshape(-1)
        left_out = none if ignored is None else np.asarray(ignored, bool).reshape(-1)
        return cls(np.asarray(boxes, np.float64).reshape(-1, 4), numbers, crowds, left_out | crowds)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.classes)


@dataclass(slots=True)
class WrittenBoxes:
    """The objects of one picture as its labels write them.

    boxes: by their edges in pixels. size: width and height of the picture that they are of; None where it is not told.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    size: tuple[float, float] | None = None

    def add(self, box: Sequence[float], key: Key, *, crowd: bool = False, ignored: bool = False) -> None:
        """Take in one object."""
        left, top, right, bottom = box
        self.boxes.append((left, top, right, bottom))
        self.keys.append(key)
        self.crowd.append(crowd)
        self.ignored.append(ignored)


@dataclass(frozen=True, slots=True)
class WrittenLabels:
    """What labels say of pictures.

    Attributes:
        pictures: The objects of each picture that is labelled.
        names: Of classes, by what labels call them.
        ids: Of all classes, in their order, where the order alone tells the model's class.
        numbered: Whether an id is the number of the model's class.
        picture_ids: What the labels call a picture, where that is no file name.
        strangers: Labelled pictures that are not among those given.
        remarks: Sentences on what is left out.
    """

    pictures: Mapping[Path, WrittenBoxes]
    names: Mapping[Key, str] = field(default_factory=dict)
    ids: tuple[Key, ...] = ()
    numbered: bool = False
    picture_ids: Mapping[Path, int | str] = field(default_factory=dict)
    strangers: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def keys(self) -> LabelKeys:
        """The classes that occur in them."""
        counts = Counter(key for written in self.pictures.values() for key in written.keys)
        return LabelKeys(counts, self.names, self.ids, self.numbered)


@dataclass(frozen=True, slots=True)
class BoxLabelSet:
    """Labels of boxes of all pictures that have some.

    Attributes:
        pictures: By path.
        category_ids: What the labels call a class of the model, where that is another number.
        picture_ids: What the labels call a picture, where that is no file name.
    """

    pictures: Mapping[Path, BoxLabels]
    category_ids: Mapping[int, int] = field(default_factory=dict)
    picture_ids: Mapping[Path, int | str] = field(default_factory=dict)


def settle_classes(
    written: WrittenLabels, request: LabelRequest, model: ModelClasses, warn: Callable[[str], None]
) -> BoxLabelSet:
    """Labels with classes of the model; boxes of other classes are left out.

    warn: hears of these.

    Raises:
        QconvError: It is not known which class of the model a label is.
    """
    numbers = number_classes(written.keys, request, model, warn)
    pictures = {path: _settle(boxes, numbers) for path, boxes in written.pictures.items()}
    ids = {number: key for key, number in numbers.items() if isinstance(key, int) and not written.numbered}
    return BoxLabelSet(pictures, ids, written.picture_ids)


def _settle(written: WrittenBoxes, numbers: Mapping[Key, int]) -> BoxLabels:
    kept = [index for index, key in enumerate(written.keys) if key in numbers]
    return BoxLabels.of(
        [written.boxes[index] for index in kept],
        [numbers[written.keys[index]] for index in kept],
        [written.crowd[index] for index in kept],
        [written.ignored[index] for index in kept],
    )


def take_stated_size(width: Any, height: Any) -> tuple[float, float] | None:
    """Width and height as labels state them; None where one is missing, or 0 as tools write that do not know it."""
    sides = [float(side) for side in (width, height) if isinstance(side, int | float) and 0 < side < math.inf]
    return (sides[0], sides[1]) if len(sides) == 2 else None


def require_stated_sizes(written: WrittenLabels, sizes: Mapping[Path, Size], source: Path) -> None:
    """Raise QconvError where boxes are of a picture of another size: their pixels are not those of this one.

    sizes: width and height of the pictures, upright. source: of the labels.
    """
    stated = {path: found.size for path, found in written.pictures.items() if found.boxes and path in sizes}
    known = {path: size for path, size in stated.items() if size is not None}
    odd = [p for p, size in known.items() if max(abs(a - b) for a, b in zip(size, sizes[p], strict=True)) > TOLERANCE]
    if not odd:
        return
    (width, height), (own_width, own_height) = known[odd[0]], sizes[odd[0]]
    more = f", and so with {len(odd) - 1} of {len(known) - 1} others" if len(odd) > 1 else ""
    fact = f"{source}: the boxes of {odd[0]} are in pixels of a picture of {width:g}x{height:g}, but it is"
    turned = (own_width, own_height) == (height, width)
    seen = " as it is seen upright" if turned else ""
    fix = (
        "where EXIF turns pictures, label them as they are seen, and else mend the sizes"
        if turned
        else "scale boxes as their pictures were scaled"
    )
    raise QconvError(
        f"{fact} {own_width}x{own_height}{seen}{more}.", f"{fix}; if boxes are right, take the sizes out of the labels."
    )


def describe_boxes_outside(written: WrittenLabels, sizes: Mapping[Path, Size]) -> str:
    """A sentence on boxes that reach beyond their pictures; empty where there are none. sizes: width and height."""
    beyond: list[Path] = []
    for path, found in written.pictures.items():
        if path in sizes and found.boxes:
            boxes, (width, height) = np.array(found.boxes), sizes[path]
            low, high = boxes[:, :2].min(axis=1), (boxes[:, 2:] - (width, height)).max(axis=1)
            beyond += [path] * int(np.sum((low < -TOLERANCE) | (high > TOLERANCE)))
    if not beyond:
        return ""
    width, height = sizes[beyond[0]]
    whole = sum(len(found.boxes) for found in written.pictures.values())
    return (
        f"{len(beyond)} of {format_count(whole, 'box')} reach beyond their pictures, as in {beyond[0]}, which is "
        f"{width}x{height}: check that the labels are of these files, and not of turned or scaled ones."
    )
