"""Reads masks: a PNG a picture, whose pixels are ids of classes; and brings them onto the grid of a map of classes.

A place of the map is asked for at its centre: what the mask says there is its label. A picture that was stretched is
thereby compared as published evaluations do that stretch pictures and masks to one size, masks by nearest neighbour;
what a crop has cut off, or a letterbox has padded, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Preprocessing
from qconv.data.fitting import Size, place_picture
from qconv.data.images import load_ids
from qconv.data.label_files import LabelledPictures, LabelRequest, ModelClasses, read_label_map
from qconv.errors import QconvError, format_some

UNLABELLED = 255
"""The id of pixels that do not count."""

NO_CLASS = -1
"""What stands in their places."""

Int64 = NDArray[np.int64]


@dataclass(slots=True)
class MaskLabels:
    """The masks of pictures.

    Attributes:
        files: By picture.
        classes: How many the model has; None where that is not known.
        numbers: The class of each id that counts; None where ids are classes.
        unmapped: Ids that were seen and are not in the map.
    """

    files: Mapping[Path, Path]
    classes: int | None
    numbers: Mapping[int, int] | None = None
    unmapped: set[int] = field(default_factory=set)

    def on_grid(self, picture: Path, size: Size, prep: Preprocessing, grid: tuple[int, int]) -> Int64:
        """The class of each place of a map over the network's input, NO_CLASS where none counts, (h, w).

        size: width and height of the picture. grid: height and width of the map. Raises QconvError for a mask of
        another size, and for ids that are no class.
        """
        file = self.files[picture]
        ids = load_ids(file)
        if ids.shape != size[::-1]:
            shape = f"{ids.shape[1]}x{ids.shape[0]}"
            fact = f"{file} is {shape} pixels, but {picture} {size[0]}x{size[1]}."
            raise QconvError(fact, "give masks the size of their pictures, as these are seen upright.")
        placed = place_picture(size, prep)
        columns, rows = (
            ((np.arange(grid[1 - axis]) + 0.5) * (prep.size[1 - axis] / grid[1 - axis])) * placed.scale[axis]
            + placed.offset[axis]
            for axis in (0, 1)
        )
        found = self._to_classes(ids[np.ix_(_clip(rows, size[1]), _clip(columns, size[0]))], file)
        found[(rows < 0) | (rows >= size[1])] = NO_CLASS
        found[:, (columns < 0) | (columns >= size[0])] = NO_CLASS
        return found

    def count_any(self, pictures: Collection[Path]) -> bool:
        """Whether any place of the masks of these pictures counts; reads as far as the first one that does."""
        return any(
            (self._to_classes(load_ids(self.files[p]), self.files[p]) >= 0).any() for p in pictures if p in self.files
        )

    def _to_classes(self, ids: NDArray[np.int32], file: Path) -> Int64:
        table = np.arange(int(ids.max(initial=0)) + 1)
        if self.numbers is None:
            table[UNLABELLED : UNLABELLED + 1] = NO_CLASS
        else:
            seen = {*map(int, np.unique(ids))}
            self.unmapped |= seen - {*self.numbers, UNLABELLED}
            table[:] = NO_CLASS
            for number in seen & self.numbers.keys():
                table[number] = self.numbers[number]
        found: Int64 = table[ids]
        odd = found.max(initial=NO_CLASS)
        if self.classes is not None and odd >= self.classes:
            said = next((key for key, number in (self.numbers or {}).items() if number == odd), None)
            what = f"the id {odd}" if said is None else f"the id {said}, which --label-map calls class {odd}"
            fact = f"{file} holds {what}, but the model has {self.classes} classes."
            raise QconvError(fact, "say which class each id is: --label-map FILE.")
        return found


def _clip(places: NDArray[Any], count: int) -> NDArray[np.intp]:
    found: NDArray[np.intp] = np.clip(np.floor(places), 0, count - 1).astype(np.intp)
    return found


def read_mask_labels(request: LabelRequest, pictures: LabelledPictures, model: ModelClasses) -> MaskLabels:
    """The masks of pictures, which are opened when they are needed. Raises QconvError for options that cannot be."""
    if request.offset and (request.classes is None or request.label_map is None):
        raise QconvError("--label-offset is not used for masks.", "say which class each id is: --label-map FILE.")
    if request.classes is not None and request.label_map is None:
        fact = "--classes is not used for masks, which hold the numbers of classes."
        raise QconvError(fact, "leave it out, or use its names in --label-map FILE.")
    files = pictures.files_in(request.path, ".png")
    if request.label_map is None:
        return MaskLabels(files, model.count)
    told = read_label_map(request.label_map, model.named_by(request))
    named = [label for label in told if not label.isdecimal()]
    if named:
        fact = f"{request.label_map} names {format_some(named)}, but masks hold ids."
        raise QconvError(fact, 'write the id on the left: 7 = "road".')
    numbers = {int(label): number for label, number in told.items() if number is not None}
    return MaskLabels(files, model.count, numbers | _ignored(told))


def _ignored(told: Mapping[str, int | None]) -> dict[int, int]:
    return {int(label): NO_CLASS for label, number in told.items() if number is None}


def tell_of_unmapped(labels: MaskLabels, warn: Callable[[str], None]) -> None:
    """Say which ids were seen that the map of labels does not have."""
    if labels.unmapped:
        ids = format_some([*map(str, sorted(labels.unmapped))], 8)
        warn(f"ids of masks that --label-map does not have do not count: {ids}.")
