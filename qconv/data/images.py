"""The door to Pillow: folders of pictures, or of ready-made .npy/.npz samples, become batches for the network.

    value = (pixel * scale - mean) / std          in float32, pixels 0 to 255, after resizing

A picture is decoded, turned upright as its EXIF says, brought to 8-bit RGB or grey, resized, cropped or padded, and
normalised. Resizing follows torchvision on PIL pictures (Resize, then CenterCrop) and, for letterboxes, YOLO.

Decisions a reader may trip over:
- transparency is dropped, not composited: the colours under it count, as with `Image.convert("RGB")` in torchvision.
- 16-bit grey is divided by 257, so that 65535 is white. `convert` alone would clip all above 255 to white.
- the first frame of an animation and the first page of a document stand for the file. Colour profiles are not applied.

It will not mend truncated files, nor open anything larger than Pillow's limit against decompression bombs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.preprocessing import CROP_SHARE, Color, Layout, Preprocessing
from qconv.data.listing import SAMPLE_SUFFIXES, Listing, suffix_of
from qconv.data.preprocess import InputSpec, agrees
from qconv.errors import QconvError, format_count, format_shape
from qconv.storage import prefetch

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Naming them keeps the rest of Pillow out of reach: an EPS file called x.jpg would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
# Modes that convert() reads wrongly unless they pass through another one first, and the value of white in wide modes.
_BY_WAY_OF = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_WHITE = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}
_LETTERBOX_GREY = 114  # the padding of YOLO


class UnreadablePicture(QconvError):
    """A file with a picture's or a sample's suffix that cannot be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be decoded ({reason}).", "remove it, or leave it out with --glob.")
        self.path = path
        self.reason = reason


# ---- one picture


def load_picture(path: Path, prep: Preprocessing) -> NDArray[np.float32]:
    """Decode and preprocess one picture: (C, H, W) for NCHW, (H, W, C) for NHWC, contiguous.

    Raises UnreadablePicture, and QconvError where --resize N leaves less than the crop needs.
    """
    return normalised(_pixels(path, prep), prep)


def load_pixels(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    """The same without normalisation, in uint8."""
    return np.ascontiguousarray(_pixels(path, prep))


def _decoded(path: Path, prep: Preprocessing) -> Picture:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():  # also keeps a named pipe from blocking for ever
        raise UnreadablePicture(path, "no such file")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            # Pillow only warns up to twice its limit. The header is all that was read so far.
            if math.prod(picture.size) > _pixel_limit():
                raise ValueError(f"{format_shape(picture.size)} pixels, refused as a possible decompression bomb")
            ImageOps.exif_transpose(picture, in_place=True)
            return _eight_bit(picture).convert("L" if prep.color is Color.GREY else "RGB")
    except UnidentifiedImageError:
        raise UnreadablePicture(path, "not an image") from None
    except Exception as error:  # decoders fed with a stranger's bytes raise nearly every type, SyntaxError included
        raise UnreadablePicture(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _pixel_limit() -> float:
    from PIL import Image

    return Image.MAX_IMAGE_PIXELS or math.inf


def _eight_bit(picture: Picture) -> Picture:
    """Bring wide grey pixels to 0..255 and palettes to colours; the rest is left for convert()."""
    from PIL import Image

    white = _WHITE.get(picture.mode)
    if white is None:
        through = _BY_WAY_OF.get(picture.mode)
        return picture.convert(through) if through else picture
    values = np.asarray(picture).astype(np.float32)  # (H, W)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise ValueError(f"values from {low:g} to {high:g} in mode {picture.mode}, where white is {white}")
    return Image.fromarray(np.rint(values * np.float32(255) / np.float32(white)).astype(np.uint8))


# The size (width, height) to resize a picture to, before it is cropped or padded to the input's.


def _stretched(_: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    return width, height


def _letterboxed(size: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    ratio = min(width / size[0], height / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def _auto(size: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    if not prep.class_vector or size == (width, height):
        return width, height
    return _covering(size, (round(width / CROP_SHARE), round(height / CROP_SHARE)))


def _covering(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Scale `size` so that both sides reach `least`; the free side is rounded down, as torchvision does."""
    (width, height), (least_width, least_height) = size, least
    if least_width * height >= least_height * width:  # the width binds
        return least_width, height * least_width // width
    return width * least_height // height, least_height


_RESIZED: Mapping[str, Callable[[tuple[int, int], Preprocessing], tuple[int, int]]] = {
    "auto": _auto,
    "exact": _stretched,
    "letterbox": _letterboxed,
}


def _fitted(picture: Picture, path: Path, prep: Preprocessing) -> Picture:
    """Resize, then crop or pad the centre to prep.size."""
    from PIL import Image

    height, width = prep.size
    if isinstance(prep.resize, int):
        size = _covering(picture.size, (prep.resize, prep.resize))
    else:
        size = _RESIZED[prep.resize](picture.size, prep)
    if math.prod(size) > max(_pixel_limit(), width * height):  # a few pixels by thousands: small file, huge picture
        raise UnreadablePicture(
            path, f"{format_shape(picture.size)} pixels are too thin to be resized: {format_shape(size)}"
        )
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling[prep.filter.name])
    if size == (width, height):
        return picture
    if prep.resize == "letterbox":
        canvas = Image.new(picture.mode, (width, height), (_LETTERBOX_GREY,) * len(picture.getbands()))
        canvas.paste(picture, ((width - size[0]) // 2, (height - size[1]) // 2))
        return canvas
    if size[0] < width or size[1] < height:
        fact = f"{path} is {format_shape(size)} after --resize {prep.resize}, less than the input's {width}x{height}."
        raise QconvError(fact, f"pass --resize {max(width, height)} or more, or --resize exact.")
    left, top = round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)
    return picture.crop((left, top, left + width, top + height))


def _pixels(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    picture = _fitted(_decoded(path, prep), path, prep)
    return arranged(np.atleast_3d(np.asarray(picture)), prep)


def arranged(pixels: NDArray[np.uint8], prep: Preprocessing) -> NDArray[np.uint8]:
    """Pixels (H, W, C), RGB or grey, in the axes and the channel order of the network: (C, H, W) or (H, W, C)."""
    if prep.color is Color.BGR:
        pixels = pixels[:, :, ::-1]
    return pixels.transpose(2, 0, 1) if prep.layout is Layout.NCHW else pixels


def normalised(pixels: NDArray[np.uint8], prep: Preprocessing) -> NDArray[np.float32]:
    """(pixel * scale - mean) / std of one picture or of a batch, in the axes of prep.layout, contiguous."""
    along = (-1, 1, 1) if prep.layout is Layout.NCHW else (-1,)
    values = pixels.astype(np.float32, order="C")
    values *= np.float32(prep.scale)
    values -= np.asarray(prep.mean, np.float32).reshape(along)
    values /= np.asarray(prep.std, np.float32).reshape(along)
    return values


# ---- one ready-made sample


def _load_sample(path: Path, inputs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    """Read one .npy or .npz file: {input name: array without the batch axis, of the wanted type}."""
    arrays = _arrays(path, inputs)
    names = {spec.name for spec in inputs}
    for fact, wrong in (("lacks", names - arrays.keys()), ("holds unknown", arrays.keys() - names)):
        if wrong:
            hint = f"name its arrays after the network's inputs: {', '.join(sorted(names))}."
            raise QconvError(f"{path} {fact} {', '.join(sorted(wrong))}.", hint)
    return {spec.name: _checked(arrays[spec.name], spec, path) for spec in inputs}


_ONE_HEADER = threading.Lock()
"""Headers are Python literals, and parsing two of them at the same time may fail (CPython issue 106905)."""


def _arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UnreadablePicture(path, "no such file")
    try:
        # np.load leaves a file that it opened itself open when the zip is broken
        with _ONE_HEADER, path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # a stranger's bytes again: ValueError, EOFError, BadZipFile, zlib.error, MemoryError
        raise UnreadablePicture(path, _reason(error)) from error
    if len(inputs) != 1:
        raise QconvError(f"{path} holds one array but the network has {len(inputs)} inputs.", _npz_hint(inputs))
    return {inputs[0].name: loaded}


def _npz_hint(inputs: Sequence[InputSpec]) -> str:
    keywords = ", ".join(f"'{spec.name}': ..." for spec in inputs)
    return f"write one .npz file a sample: np.savez('0.npz', **{{{keywords}}})."


def _checked(array: NDArray[Any], spec: InputSpec, path: Path) -> NDArray[Any]:
    batched = array.ndim == len(spec.shape) and array.shape[:1] == (1,)
    sample = array[0] if batched else array
    if not spec.shape or not agrees((1, *sample.shape), (None, *spec.shape[1:])):
        fact = f"{path} has shape {format_shape(array.shape)} for input '{spec.name}', which takes {format_shape(spec.shape)}."
        raise QconvError(fact, "store one sample a file, with or without the leading batch axis of 1.")
    # Any float may become the wanted float. Integers into a float network are most likely pixels not yet normalised.
    same_kind = array.dtype.kind == spec.dtype.kind
    floats = same_kind and spec.dtype.kind == "f"
    if not floats and not (same_kind and np.can_cast(array.dtype, spec.dtype)):
        fact = f"{path} holds {array.dtype} for input '{spec.name}', which takes {spec.dtype}."
        raise QconvError(fact, f"store it as {spec.dtype}, preprocessed as the network wants it.")
    with np.errstate(over="ignore"):  # becomes infinite and is told below
        sample = np.ascontiguousarray(sample, dtype=spec.dtype).reshape(sample.shape)
    if floats and not np.isfinite(sample).all():
        raise QconvError(f"{path} holds NaN or infinity for input '{spec.name}'.", "mend the sample, or remove it.")
    return sample


# ---- all of them


def batches(
    listing: Listing,
    inputs: Sequence[InputSpec],
    prep: Preprocessing | None,
    *,
    batch: int,
    workers: int,
    warn: Callable[[str], None],
    progress: Callable[[int], None] | None = None,
    lost: Callable[[Path], None] = lambda path: None,
) -> Generator[dict[str, NDArray[Any]], None, None]:
    """Yield {input name: (n, ...) array of the wanted type} in the listing's order; n is `batch`, the last may be less.

    Up to 2 * workers + batch files are decoded ahead, so that reading overlaps the caller's work. progress receives
    how many files are done so far. An undecodable file is told to `warn` and `lost`, and left out; more than a tenth of
    them, and a sample of the wrong shape, raise QconvError. prep may be None where all files are .npy or .npz. Closing
    the generator stops the threads.
    """
    first = next((path for path in listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES), None)
    if first is not None and len(inputs) != 1:
        raise QconvError(f"{first} is one picture but the network has {len(inputs)} inputs.", _npz_hint(inputs))
    if first is not None and prep is None:
        raise QconvError(f"{first} is a picture but the network takes none.", "pass .npy or .npz samples.")
    load = partial(_load, inputs=inputs, prep=prep)
    _import_decoders()
    pending = prefetch(load, listing.paths, workers=workers, depth=2 * workers + batch)
    return _stacked(_survivors(pending, max(len(listing.paths), listing.whole), warn, progress, lost), inputs, batch)


def _load(path: Path, inputs: Sequence[InputSpec], prep: Preprocessing | None) -> dict[str, NDArray[Any]]:
    if prep is None or suffix_of(path) in SAMPLE_SUFFIXES:
        return _load_sample(path, inputs)
    if prep.keeps_pixels and inputs[0].dtype == np.uint8:
        return {inputs[0].name: load_pixels(path, prep)}
    return {inputs[0].name: as_type(load_picture(path, prep), inputs[0].dtype)}


def as_type(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Normalised pixels in the type that an input takes."""
    if dtype == np.uint8:
        values = np.clip(np.rint(values), 0, 255)
    return values.astype(dtype, copy=False)


_Row = dict[str, NDArray[Any]]
_Rows = Generator[_Row, None, None]
_Futures = Generator[Future[_Row], None, None]


def _import_decoders() -> None:
    """Import what _FORMATS needs, once: left to itself Pillow imports all its decoders, in every thread at once."""
    for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP"):
        import_module(f"PIL.{name}ImagePlugin")


def _survivors(
    pending: _Futures,
    total: int,
    warn: Callable[[str], None],
    progress: Callable[[int], None] | None,
    lost: Callable[[Path], None],
) -> _Rows:
    """Yield what could be decoded; raise QconvError as soon as more than a tenth of all files could not."""
    bad: list[UnreadablePicture] = []
    with closing(pending):
        for done, future in enumerate(pending, 1):
            row = None
            try:
                row = future.result()
            except UnreadablePicture as error:
                bad.append(error)
                lost(error.path)
                warn(f"skipped {error.path}: cannot be decoded ({error.reason})")
                if 10 * len(bad) > total:
                    raise _too_many(bad, done, total) from error
            if progress is not None:
                progress(done)
            if row is not None:
                yield row


def _too_many(bad: Sequence[UnreadablePicture], done: int, total: int) -> QconvError:
    so_far = "" if done == total else f" among the first {done}"
    fact = f"{len(bad)} of {format_count(total, 'picture')} cannot be decoded{so_far}, which is more than a tenth"
    hint = "remove what is broken, or leave it out with --glob."
    return QconvError(f"{fact}; the first is {bad[0].path} ({bad[0].reason}).", hint)


def _stacked(rows: _Rows, inputs: Sequence[InputSpec], batch: int) -> _Rows:
    """Join rows into batches along a new axis 0."""
    waiting: list[_Row] = []
    with closing(rows):
        for row in rows:
            waiting.append(row)
            if len(waiting) == batch:
                yield _joined(waiting, inputs)
    if waiting:
        yield _joined(waiting, inputs)


def _joined(rows: list[_Row], inputs: Sequence[InputSpec]) -> _Row:
    """Stack the rows and empty the list, so that they are not held while the caller works on the batch."""
    for spec in inputs:
        shapes = sorted({row[spec.name].shape for row in rows})
        if len(shapes) > 1:
            fact = f"samples for input '{spec.name}' differ in shape: {format_shape(shapes[0])} and {format_shape(shapes[1])}."
            raise QconvError(fact, "pass --batch 1, or bring them to one shape.")
    joined = {spec.name: np.stack([row[spec.name] for row in rows]) for spec in inputs}
    rows.clear()
    return joined
