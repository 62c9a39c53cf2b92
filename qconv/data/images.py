"""Decodes images and brings them to a network's size, and encodes them: the only module that reads with Pillow.

An image is decoded, turned upright as its EXIF says, brought to 8-bit RGB or grey, resized, cropped or padded.
Sizes and crops are those of `data.fitting`; pixels are interpolated as torchvision does on PIL images.
- Transparency is dropped, not composited: the colours under it count, as with `Image.convert("RGB")` in torchvision.
- 16-bit grey is divided by 257, so that 65535 is white. `convert` alone would clip all above 255 to white.
- The first frame of an animation and the first page of a document count. Colour profiles are not applied.

It will not mend truncated files, nor open anything larger than Pillow's limit against decompression bombs.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import LETTERBOX, Color, Preprocessing
from qconv.data.fitting import PicturePlacement, Size, choose_scaled_size, find_corner, place_picture
from qconv.data.preprocessing import arrange_pixels
from qconv.errors import QconvError, format_shape

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


# Naming them keeps the rest of Pillow out of reach: an EPS file called x.jpg would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")

_ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B")

_SPREAD_LEVELS = {"L;2": 85, "L;4": 17}  # Pillow makes 0..255 of grey of fewer bits

# Modes that convert() reads wrongly unless they pass through another one first, and the value of white in wide modes.
_INTERMEDIATE_MODES = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}

_WHITE_LEVELS = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}


class UnreadableImage(QconvError):
    """A file with a picture's or a sample's suffix that cannot be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be decoded ({reason}).", "remove it, or leave it out with --glob.")
        self.path = path
        self.reason = reason


def load_pixels(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    """Decode one image and bring it to size: (C, H, W) for NCHW, (H, W, C) for NHWC, contiguous, not normalized.

    Raises UnreadableImage, and QconvError where --resize N leaves less than the crop needs.
    """
    return np.ascontiguousarray(_load_and_fit(path, prep))


def find_placement(path: Path, prep: Preprocessing) -> PicturePlacement:
    """Where the pixels of the network's input lie in a picture. Raises UnreadableImage for what has no header."""
    return place_picture(read_size(path), prep)


def read_size(path: Path) -> Size:
    """Width and height of a picture that is turned upright, from its header. Raises UnreadableImage."""
    with _open_picture(path) as picture:
        if picture.format == "TIFF":  # some versions of Pillow turn its size already, some its pixels alone
            from PIL import ImageOps

            return ImageOps.exif_transpose(picture).size
        width, height = picture.size
        return (height, width) if picture.getexif().get(_ORIENTATION) in _LYING else (width, height)


def load_ids(path: Path) -> NDArray[np.int32]:
    """The ids of a mask, (H, W): the numbers that are stored, of a palette or of grey.

    Raises UnreadableImage, and QconvError for colours.
    """
    with _open_picture(path) as picture:
        mode, stored = picture.mode, _stored_form(picture)
        found = np.asarray(picture).astype(np.int32)
    if mode not in _ID_MODES:
        hint = "store the number of the class of each pixel: as grey levels, or with a palette."
        raise QconvError(f"{path} holds colours ({mode}), where a mask holds ids.", hint)
    return found // _SPREAD_LEVELS.get(stored, 1)


def _stored_form(picture: Picture) -> str:
    """How Pillow calls the pixels of a file, as "L;4"; known until they are read."""
    tiles = getattr(picture, "tile", [])
    return str(tiles[0][3]) if tiles else ""


_ORIENTATION = 0x0112

_LYING = (5, 6, 7, 8)
"""Values of this EXIF tag that swap width and height."""


def _decode_image(path: Path, prep: Preprocessing) -> Picture:
    from PIL import ImageOps

    with _open_picture(path) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        return _to_eight_bits(picture).convert("L" if prep.color is Color.GREY else "RGB")


@contextlib.contextmanager
def _open_picture(path: Path) -> Iterator[Picture]:
    """Open a picture of which nothing but the header is read; what fails in the block is an UnreadableImage, too."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():  # also keeps a named pipe from blocking for ever
        raise UnreadableImage(path, "no such file")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            # Pillow only warns up to twice its limit. The header is all that was read so far.
            if math.prod(picture.size) > _pixel_limit():
                raise ValueError(f"{format_shape(picture.size)} pixels, refused as a possible decompression bomb")
            yield picture
    except UnidentifiedImageError:
        raise UnreadableImage(path, "not an image") from None
    except Exception as error:  # decoders fed with a stranger's bytes raise nearly every type, SyntaxError included
        raise UnreadableImage(path, error_reason(error)) from error


def error_reason(error: Exception) -> str:
    """What a decoder said, in words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _pixel_limit() -> float:
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS or math.inf


def _to_eight_bits(picture: Picture) -> Picture:
    """Bring wide grey pixels to 0..255 and palettes to colours; the rest is left for convert()."""
    from PIL import Image

    white = _WHITE_LEVELS.get(picture.mode)
    if white is None:
        through = _INTERMEDIATE_MODES.get(picture.mode)
        return picture.convert(through) if through else picture
    values = np.asarray(picture).astype(np.float32)  # (H, W)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise ValueError(f"values from {low:g} to {high:g} in mode {picture.mode}, where white is {white}")
    return Image.fromarray(np.rint(values * np.float32(255) / np.float32(white)).astype(np.uint8))


def _fit_image(picture: Picture, path: Path, prep: Preprocessing) -> Picture:
    """Resize, then crop or pad to prep.size."""
    from PIL import Image

    height, width = prep.size
    size = choose_scaled_size(picture.size, prep)
    if math.prod(size) > max(_pixel_limit(), width * height):  # a few pixels by thousands: small file, huge picture
        raise UnreadableImage(
            path, f"{format_shape(picture.size)} pixels are too thin to be resized: {format_shape(size)}"
        )
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling[prep.filter.name])
    if size == (width, height):
        return picture
    left, top = find_corner(size, prep)
    if prep.resize == LETTERBOX:
        canvas = Image.new(picture.mode, (width, height), (prep.letterbox_fill,) * len(picture.getbands()))
        canvas.paste(picture, (-left, -top))
        return canvas
    if size[0] < width or size[1] < height:
        fact = f"{path} is {format_shape(size)} after --resize {prep.resize}, less than the input's {width}x{height}."
        raise QconvError(fact, f"pass --resize {max(width, height)} or more, or --resize exact.")
    return picture.crop((left, top, left + width, top + height))


def _load_and_fit(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    picture = _fit_image(_decode_image(path, prep), path, prep)
    return arrange_pixels(np.atleast_3d(np.asarray(picture)), prep)


def import_decoders() -> None:
    """Import what _FORMATS needs, once: left to itself Pillow imports all its decoders, in every thread at once."""
    for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP"):
        import_module(f"PIL.{name}ImagePlugin")


THUMBNAIL = 160


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG file of a picture (H, W, C) of one, three or four channels, every pixel as it is."""
    return encode_thumbnail(pixels, max(pixels.shape))


def encode_thumbnail(pixels: NDArray[np.uint8], side: int = THUMBNAIL) -> bytes:
    """The file of a picture (H, W, 3) or (H, W, 1), no side longer than `side`."""
    from PIL import Image  # slow to import, and not needed by samples

    small = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    small.thumbnail((side, side))
    return png_bytes(small)


PHOTO_QUALITY = 80


def encode_photo(pixels: NDArray[np.uint8], side: int) -> bytes:
    """The JPEG file of a picture (H, W, 3) or (H, W, 1), no side longer than `side`."""
    from PIL import Image

    small = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=PHOTO_QUALITY, optimize=True)
    return buffer.getvalue()


def png_bytes(picture: Picture) -> bytes:
    """The PNG file of an image."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
