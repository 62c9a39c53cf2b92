"""This module chooses the pictures on which a file differs most from its float model, and draws what both say of them.

    boxes    of detectors; first the pictures in which most boxes of the float model are lost, as `metrics.detection`
             counts them
    masks    of segmenters; first the pictures in which the fewest pixels have the float model's class

Pictures are shown as the float network gets them, cropped, and without the borders of a letterbox. Ready-made samples
are no pictures: of them nothing is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Preprocessing
from qconv.data.images import encode_photo, encode_png, find_placement
from qconv.data.loader import count_images
from qconv.data.model_with_data import ModelWithData, iter_paired_batches
from qconv.decoding.boxes import LEAST_SCORE, Detections
from qconv.decoding.head import Head, read_class_names
from qconv.errors import format_count
from qconv.metrics.detection import match_boxes
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.report.contact_sheet import undo_preprocessing
from qconv.report.html import ComparedPicture, DrawnBox, PictureComparison, PictureSide
from qconv.reporter import Reporter
from qconv.runtime.outputs import ModelOutput, OutputKind

MOST_SHOWN = 8
"""Pictures of a kind on a page."""

PHOTO_SIDE = 320
"""Pixels of the longer side of a picture, and of a mask at most."""

MASK_OPACITY = 150
"""Of 255."""

MOST_CLASSES = 16
"""Classes in the legend of masks."""

HUE_STEP = 137.508
"""Degrees between the hues of a class and the next, the golden angle: no two of few classes look alike."""

CLASS_KINDS = (OutputKind.CLASS_MAP, OutputKind.CLASS_IDS)

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What both models say of one picture.

    rank: the lower, the worse. place: of the picture among those that can be read. values: what the network was fed.
    """

    rank: tuple[float, ...]
    place: int
    values: NDArray[Any]
    sides: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture to draw. pixels: (H, W, C). shown: left, top, width and height of the part that is no border."""

    name: str
    pixels: NDArray[np.uint8]
    shown: tuple[float, float, float, float]
    seen: _Seen

    @classmethod
    def of(cls, path: Path, prep: Preprocessing, seen: _Seen) -> _Picture:
        pixels = undo_preprocessing(seen.values, prep)
        most = np.array(pixels.shape[1::-1])
        placed = find_placement(path, prep)
        ends = np.array([np.zeros(2), placed.size])
        (left, top), (right, bottom) = np.clip((ends - placed.offset) / placed.scale, 0, most).tolist()
        return cls(path.name, pixels, (left, top, right - left, bottom - top), seen)

    def compare(self, caption: str, own: PictureSide, other: PictureSide) -> ComparedPicture:
        """With what both models say of it."""
        height, width = self.pixels.shape[:2]
        photo = encode_photo(self.pixels, PHOTO_SIDE)
        return ComparedPicture(self.name, (width, height), self.shown, photo, caption, own, other)


class _View(Protocol):
    """What is drawn of the outputs."""

    def read(self, reference: Arrays, got: Arrays) -> Iterable[tuple[tuple[float, ...] | None, tuple[Any, Any]]]:
        """Of each picture of a batch its rank and both sides; no rank where there is nothing to show."""

    def draw(self, pictures: list[_Picture]) -> PictureComparison:
        """Draw them in this order."""


def compare_pictures(own: ModelWithData, other: ModelWithData, most: int = MOST_SHOWN) -> tuple[PictureComparison, ...]:
    """Draw the boxes and the maps of classes of two models, side by side.

    Args:
        own: The float model.
        other: The file made of it, which has its outputs.
        most: Pictures of a kind.

    Returns:
        One entry a kind; none where the model finds neither boxes nor classes of places, or was fed no pictures.
    """
    prep = own.feed.preprocessing
    if prep is None:
        return ()
    lost: set[Path] = set()
    views: list[tuple[_View, list[_Seen]]] | None = None
    network, done = NetworkOutputs(()), 0
    for its, mine in iter_paired_batches(other, own, Reporter(), lost.add):
        expected = own.session.run_all(mine)
        if views is None:
            network = describe_outputs(own.session, mine, expected)
            views = [(view, []) for view in _find_views(network, own.session.metadata)]
        if not views:
            return ()
        arrays = [network.by_name(x) for x in (expected, other.session.run(own.session.outputs, its))]
        pixels = mine[own.feed.inputs[0].name]
        for view, seen in views:
            for index, (rank, sides) in enumerate(view.read(*arrays)):
                if rank is not None and index < len(pixels):
                    seen.append(_Seen(rank, done + index, pixels[index], sides))
            # those that fill a last batch up are told only when all have been read
            seen[:] = _worst_first(seen)[: most + len(pixels)]
        done += count_images(mine)
    paths = [path for path in own.feed.listing.paths if path not in lost]
    found = ((view, [x for x in seen if x.place < len(paths)][:most]) for view, seen in views or ())
    return tuple(view.draw([_Picture.of(paths[x.place], prep, x) for x in seen]) for view, seen in found if seen)


def _worst_first(seen: list[_Seen]) -> list[_Seen]:
    return sorted(seen, key=lambda x: (*x.rank, x.place))


def _find_views(network: NetworkOutputs, metadata: Mapping[str, str]) -> list[_View]:
    views: list[_View] = []
    if network.head is not None:
        views.append(_BoxView(network.head))
    output = next((output for output in network.outputs if output.kind in CLASS_KINDS), None)
    if output is not None:
        views.append(_MaskView(output, read_class_names(metadata)))
    return views


# -- boxes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _BoxView:
    head: Head

    def read(self, reference: Arrays, got: Arrays) -> Iterable[tuple[tuple[float, ...] | None, tuple[Any, Any]]]:
        sides = ([x.above(self.head.usual_score) for x in self.head.read(a, LEAST_SCORE)] for a in (reference, got))
        for own, other in zip(*sides, strict=True):
            found = int((match_boxes(own, other) >= 0).sum())
            rank = (found - len(own), found / max(1, len(own)))
            yield (rank if len(own) or len(other) else None), (own, other)

    def draw(self, pictures: list[_Picture]) -> PictureComparison:
        return PictureComparison(
            "boxes",
            f"Boxes with a score above {self.head.usual_score:g}, of {format_count(len(pictures), 'picture')}; first "
            "those in which most boxes of the float model are lost: the file has none of their class that overlaps "
            "them by half.",
            tuple(map(self._draw_picture, pictures)),
        )

    def _draw_picture(self, picture: _Picture) -> ComparedPicture:
        own, other = picture.seen.sides
        partners = match_boxes(own, other)
        found, extra = int((partners >= 0).sum()), len(other) - int((partners >= 0).sum())
        caption = f"{found} of {format_count(len(own), 'box')} found" if len(own) else "no box in the float model"
        return picture.compare(
            f"{caption}, {extra} in the file alone" if extra else caption,
            PictureSide(self._draw_boxes(own, partners < 0)),
            PictureSide(self._draw_boxes(other, np.zeros(len(other), bool))),
        )

    def _draw_boxes(self, found: Detections, lost: NDArray[np.bool_]) -> tuple[DrawnBox, ...]:
        left, top, right, bottom = found.boxes.T
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]]).transpose(2, 0, 1)
        if found.corners is not None:
            corners = found.corners
        rows = zip(corners.tolist(), found.classes.tolist(), found.scores.tolist(), lost.tolist(), strict=True)
        return tuple(
            DrawnBox(tuple((x, y) for x, y in points), f"{_name_class(self.head.names, number)} {score:.2f}", gone)
            for points, number, score, gone in rows
        )


def _name_class(names: Mapping[int, str], number: int) -> str:
    return names.get(number, f"class {number}")


# -- masks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _MaskView:
    output: ModelOutput
    names: Mapping[int, str] = field(default_factory=dict)

    def read(self, reference: Arrays, got: Arrays) -> Iterable[tuple[tuple[float, ...] | None, tuple[Any, Any]]]:
        sides = [self.output.labels(arrays[self.output.name]) for arrays in (reference, got)]
        for own, other in zip(*sides, strict=True):
            yield (float((own == other).mean()),), (own, other)

    def draw(self, pictures: list[_Picture]) -> PictureComparison:
        labels = np.concatenate([x.ravel() for picture in pictures for x in picture.seen.sides])
        ids, counts = np.unique(labels, return_counts=True)
        most = [int(number) for number in ids[np.argsort(-counts, kind="stable")] if number][:MOST_CLASSES]
        colors = color_classes(np.array(most, np.int64)).tolist()
        return PictureComparison(
            "masks",
            f"The class of each place, of {format_count(len(pictures), 'picture')}; first those in which most pixels "
            "have another class than in the float model. Class 0 has no colour.",
            tuple(map(self._draw_picture, pictures)),
            tuple((f"rgb({r},{g},{b})", _name_class(self.names, x)) for x, (r, g, b) in zip(most, colors, strict=True)),
        )

    @staticmethod
    def _draw_picture(picture: _Picture) -> ComparedPicture:
        own, other = (PictureSide(overlay=encode_png(paint_classes(labels))) for labels in picture.seen.sides)
        return picture.compare(f"{picture.seen.rank[0]:.1%} of pixels agree", own, other)


def color_classes(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The colours of classes, (..., 3): hues a golden angle apart, at full saturation and medium lightness.

    channel = 255 * clip(|h / 60 - 3| - 1, 0, 1)    red; the others a third of the circle on
    """
    turned = (ids[..., None] * HUE_STEP - np.array([0.0, 120.0, 240.0])) % 360
    found: NDArray[np.uint8] = np.rint(255 * np.clip(np.abs(turned / 60 - 3) - 1, 0, 1)).astype(np.uint8)
    return found


def paint_classes(labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A map of classes (H, W) as translucent colours (h, w, 4), no side longer than PHOTO_SIDE; none for class 0."""
    step = -(-max(labels.shape) // PHOTO_SIDE)
    labels = labels[step // 2 :: step, step // 2 :: step]
    opacity = np.where(labels == 0, 0, MASK_OPACITY).astype(np.uint8)
    return np.concatenate([color_classes(labels), opacity[..., None]], axis=-1)
