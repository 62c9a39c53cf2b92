"""Decides how a picture is resized and where it then lies in a network's input, and undoes that for places.

    x in the picture = x in the input * scale + offset        for each axis

    exact       both sides become the input's
    N, auto     both sides are scaled alike so that they cover a size, rounded down as torchvision does; centre crop
    letterbox   both sides are scaled alike so that they fit; what is left of the input is padded

Letterboxes are those of their families, and so is the way back. In the centre, as of YOLOv5 and its successors: sides
are rounded to the nearest, of an odd padding the larger half lies below and to the right, and boxes are cut off at the
edges of the picture. To the top left, as of YOLOX: sides are rounded down, and the way back goes by the ratio that they
were to have, so that places are off by up to a pixel of the input, as in published figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qconv.config.data_options import CROP_SHARE, LETTERBOX, LetterboxAlign, Preprocessing

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True, slots=True)
class PicturePlacement:
    """Where the pixels of a network's input lie in a picture.

    Attributes:
        scale, offset: x * scale + offset is a place in the picture, of a place in the input, for x and for y.
        size: Width and height of the picture, upright.
        cuts_off: Whether boxes end at the edges of the picture.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    size: Size
    cuts_off: bool = False


def choose_scaled_size(size: Size, prep: Preprocessing) -> Size:
    """The size to resize a picture to, before it is cropped or padded to the input's."""
    if isinstance(prep.resize, int):
        return _covering_size(size, (prep.resize, prep.resize))
    return _SIZE_OF_MODE[prep.resize](size, prep)


def find_corner(scaled: Size, prep: Preprocessing) -> tuple[int, int]:
    """Where the input's left upper corner lies in the resized picture, in its pixels; negative where it is padded."""
    height, width = prep.size
    if prep.resize == LETTERBOX:
        if prep.letterbox_align is LetterboxAlign.TOP_LEFT:
            return 0, 0
        return -((width - scaled[0]) // 2), -((height - scaled[1]) // 2)
    return round((scaled[0] - width) / 2.0), round((scaled[1] - height) / 2.0)


def place_picture(size: Size, prep: Preprocessing) -> PicturePlacement:
    """Where the pixels of the input lie in a picture of this size."""
    letterboxed = prep.resize == LETTERBOX
    if letterboxed and prep.letterbox_align is LetterboxAlign.TOP_LEFT:
        ratio = _fitting_ratio(size, prep)
        return PicturePlacement((1 / ratio, 1 / ratio), (0.0, 0.0), size)
    scaled = choose_scaled_size(size, prep)
    left, top = find_corner(scaled, prep)
    scale = size[0] / scaled[0], size[1] / scaled[1]
    return PicturePlacement(scale, (left * scale[0], top * scale[1]), size, letterboxed)


def _exact_size(_: Size, prep: Preprocessing) -> Size:
    height, width = prep.size
    return width, height


def _fitting_ratio(size: Size, prep: Preprocessing) -> float:
    height, width = prep.size
    return min(width / size[0], height / size[1])


def _letterbox_size(size: Size, prep: Preprocessing) -> Size:
    ratio = _fitting_ratio(size, prep)
    rounded: Callable[[float], int] = int if prep.letterbox_align is LetterboxAlign.TOP_LEFT else round
    return max(1, rounded(size[0] * ratio)), max(1, rounded(size[1] * ratio))


def _auto_size(size: Size, prep: Preprocessing) -> Size:
    height, width = prep.size
    if not prep.class_vector or size == (width, height):
        return width, height
    return _covering_size(size, (round(width / CROP_SHARE), round(height / CROP_SHARE)))


def _covering_size(size: Size, least: Size) -> Size:
    """Scale `size` so that both sides reach `least`; the free side is rounded down, as torchvision does."""
    (width, height), (least_width, least_height) = size, least
    if least_width * height >= least_height * width:  # the width binds
        return least_width, height * least_width // width
    return width * least_height // height, least_height


_SIZE_OF_MODE: Mapping[str, Callable[[Size, Preprocessing], Size]] = {
    "auto": _auto_size,
    "exact": _exact_size,
    LETTERBOX: _letterbox_size,
}
