"""Decodes and preprocesses images, or reads .npy/.npz samples, into batches: the only module that reads with Pillow.

    value = (pixel * scale - mean) / std          in float32, pixels 0 to 255, after resizing

An image is decoded, turned upright as its EXIF says, brought to 8-bit RGB or grey, resized, cropped or padded, and
normalized. Resizing follows torchvision on PIL images (Resize, then CenterCrop) and, for letterboxes, YOLO.
- Transparency is dropped, not composited: the colours under it count, as with `Image.convert("RGB")` in torchvision.
- 16-bit grey is divided by 257, so that 65535 is white. `convert` alone would clip all above 255 to white.
- The first frame of an animation and the first page of a document count. Colour profiles are not applied.

It will not mend truncated files, nor open anything larger than Pillow's limit against decompression bombs.
`resolve_preprocessing` joins the user's options, the model's input and the preset into a complete `Preprocessing`.
"""

from __future__ import annotations

import io
import math
import threading
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qconv import storage
from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.config.data_options import (
    AUTO,
    CROP_SHARE,
    PRESETS,
    Color,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    Preset,
)
from qconv.data.dataset import Listing, suffix_of
from qconv.errors import QconvError, format_count, format_shape
from qconv.reporter import Reporter
from qconv.storage import prefetch

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


FLOAT_PIXEL_TYPES = frozenset(map(np.dtype, ("float16", "float32", "float64")))
WHOLE_PIXEL_TYPES = frozenset(map(np.dtype, ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")))
"""Types that hold the pixels themselves, 0 to 255."""
MOST_WHOLE = 2.0**24
"""Whole numbers up to here are float32 numbers."""

LAYOUT_AXES = {Layout.NCHW: (1, 2, 3), Layout.NHWC: (3, 1, 2)}  # channel, height, width


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One graph input of the network; axis 0 is the batch. A dimension is None where the model leaves it open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


def resolve_preprocessing(options: PreprocessingOptions, spec: InputSpec, *, class_vector: bool) -> Preprocessing:
    """Join the user's options, what the model's input fixes, and the preset's numbers into a complete preprocessing.

    Where --color swaps red and blue, the preset's mean and std move with their colours; --mean and --std are taken in
    the final channel order. An input of whole numbers gets pixels as they are, whatever normalisation is said (see
    `find_vain_normalization`), unless that leaves whole numbers of its type. Raises QconvError where options and input
    contradict each other, where the size stays open, and where the input is not a picture (rank other than 4, neither
    1 nor 3 channels, an odd type).
    """
    _require_image_input(options, spec)
    layout = options.layout or _deduce_layout(spec.shape)
    channels = _count_channels(options.color, spec, layout)
    name, source = _choose_preset(options, spec, channels)
    color = Color.GREY if channels == 1 else options.color or PRESETS[name].color
    preset = _swap_preset_colors(PRESETS[name], color)
    found = Preprocessing(
        preset=name,
        source=source,
        color=color,
        scale=preset.scale if options.scale is None else options.scale,
        mean=_check_per_channel("--mean", options.mean, preset.mean, spec, channels),
        std=_check_per_channel("--std", options.std, preset.std, spec, channels),
        layout=layout,
        resize=options.resize,
        filter=options.filter,
        size=_resolve_size(options.size, spec, layout),
        class_vector=class_vector,
    )
    return found if _suits(found, spec.dtype) else _keep_pixels(found, spec, options)


def _suits(prep: Preprocessing, dtype: np.dtype[Any]) -> bool:
    """Whether a type holds all that becomes of pixels: of whole numbers, a shift or a factor that leaves them so."""
    if dtype in FLOAT_PIXEL_TYPES:
        return True
    numbers = (prep.scale, *prep.mean)
    ends = [level * prep.scale - mean for level in (0, 255) for mean in prep.mean]
    bounds = np.iinfo(dtype)
    whole = all(number == round(number) for number in numbers) and set(prep.std) == {1.0}
    return whole and bounds.min <= min(ends) and max(ends) <= bounds.max


def _keep_pixels(prep: Preprocessing, spec: InputSpec, options: PreprocessingOptions) -> Preprocessing:
    source = f"the default for {spec.dtype} inputs"
    if options.preset not in (None, AUTO):
        source += f", in which --preprocess {options.preset} leaves no pictures"
    color = prep.color if prep.color is Color.GREY else options.color or PRESETS["raw"].color
    return replace(prep, preset="raw", source=source, color=color, scale=1.0, mean=(0.0,), std=(1.0,))


def find_vain_normalization(options: PreprocessingOptions, spec: InputSpec) -> str:
    """The options that are not used as pixels stay whole numbers, in words; empty where all count."""
    found = [f"--preprocess {options.preset}"] if options.preset not in (None, AUTO, "raw") else []
    found += [f"--{part}" for part in ("scale", "mean", "std") if getattr(options, part) is not None]
    return " and ".join(found)


def _require_image_input(options: PreprocessingOptions, spec: InputSpec) -> None:
    samples = "pass one .npy or .npz sample a file instead of pictures."
    if not spec.shape:
        raise QconvError(f"input '{spec.name}' is a scalar, or the model does not state its shape.", samples)
    if len(spec.shape) != 4:
        raise QconvError(f"input '{spec.name}' has shape {format_shape(spec.shape)}, which is no picture's.", samples)
    if spec.dtype not in FLOAT_PIXEL_TYPES | WHOLE_PIXEL_TYPES:
        raise QconvError(f"input '{spec.name}' takes {spec.dtype}, which pictures are not.", samples)


def _deduce_layout(shape: tuple[int | None, ...]) -> Layout:
    if shape[1] in (1, 3):
        return Layout.NCHW
    # (N, 224, 224, open): 224 are no channels, so that only the last axis can be theirs
    return Layout.NHWC if shape[3] in (1, 3) or (shape[1] is not None and shape[3] is None) else Layout.NCHW


def _count_channels(color: Color | None, spec: InputSpec, layout: Layout) -> int:
    said = None if color is None else 1 if color is Color.GREY else 3
    channels = spec.shape[LAYOUT_AXES[layout][0]]
    if channels is None:
        return said or 3
    if channels not in (1, 3):
        shape = f"{format_shape(spec.shape)}, {layout.upper()}"
        fact = f"input '{spec.name}' ({shape}) has {channels} channels; pictures have 1 or 3."
        raise QconvError(fact, "pass --layout if the axes are meant otherwise, or .npy samples instead of pictures.")
    if said not in (None, channels):
        fact = f"--color {color} contradicts input '{spec.name}', which has {format_count(channels, 'channel')}."
        raise QconvError(fact, "leave --color out.")
    return channels


def _choose_preset(options: PreprocessingOptions, spec: InputSpec, channels: int) -> tuple[str, str]:
    """Return the preset's name, and in words where it came from and what replaces parts of it."""
    own = [f"--{part}" for part in ("scale", "mean", "std", "color") if getattr(options, part) is not None]
    changed = f", with {' and '.join(own)}" if own else ""
    if options.preset not in (None, AUTO):
        return options.preset, f"--preprocess {options.preset}{changed}"
    if spec.dtype in WHOLE_PIXEL_TYPES:
        name, reason = "raw", f"{spec.dtype} inputs"
    else:
        name, reason = ("imagenet" if channels == 3 else "unit"), format_count(channels, "channel")
    return name, f"the default for {reason}{changed}; name another with --preprocess"


def _swap_preset_colors(preset: Preset, color: Color) -> Preset:
    if color in (preset.color, Color.GREY):
        return preset
    return replace(preset, color=color, mean=preset.mean[::-1], std=preset.std[::-1])


def _check_per_channel(
    option: str, own: tuple[float, ...] | None, preset: tuple[float, ...], spec: InputSpec, channels: int
) -> tuple[float, ...]:
    values = preset if own is None else own
    if len(values) in (1, channels):
        return values
    has = f"input '{spec.name}' has {format_count(channels, 'channel')}"
    if own is None:
        hint = "pass --mean and --std with one value each, or --preprocess unit."
        raise QconvError(f"the preset has {len(values)} values for {option} but {has}.", hint)
    fix = "give one value." if channels == 1 else f"give one value, or {channels}."
    raise QconvError(f"{option} has {format_count(len(values), 'value')} but {has}.", fix)


def _resolve_size(wanted: tuple[int, int] | None, spec: InputSpec, layout: Layout) -> tuple[int, int]:
    _, *axes = LAYOUT_AXES[layout]
    fixed = tuple(spec.shape[axis] for axis in axes)
    if wanted is None:
        height, width = fixed
        if height is None or width is None:
            hint = "pass --size HxW, for example --size 224x224."
            raise QconvError(f"input '{spec.name}' has no fixed height and width.", hint)
        return height, width
    if not shape_matches(wanted, fixed):
        fact = (
            f"--size {format_shape(wanted)} contradicts input '{spec.name}', which is fixed at {format_shape(fixed)}."
        )
        raise QconvError(fact, "leave --size out.")
    return wanted


def layout_order(source: Layout, target: Layout) -> tuple[int, ...]:
    """The axes of a batch in `source`, in the order in which `target` has them."""
    order = [0, 0, 0, 0]
    for here, there in zip(LAYOUT_AXES[source], LAYOUT_AXES[target], strict=True):
        order[there] = here
    return tuple(order)


def shape_matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape has all wanted dimensions that are not open."""
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


# Naming them keeps the rest of Pillow out of reach: an EPS file called x.jpg would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")

# Modes that convert() reads wrongly unless they pass through another one first, and the value of white in wide modes.
_INTERMEDIATE_MODES = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}

_WHITE_LEVELS = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "I;16N": 65535, "I": 65535, "F": 1}

_LETTERBOX_GREY = 114  # the padding of YOLO


class UnreadableImage(QconvError):
    """A file with a picture's or a sample's suffix that cannot be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be decoded ({reason}).", "remove it, or leave it out with --glob.")
        self.path = path
        self.reason = reason


# ---- one picture


def load_image(path: Path, prep: Preprocessing) -> NDArray[np.float32]:
    """Decode and preprocess one picture: (C, H, W) for NCHW, (H, W, C) for NHWC, contiguous.

    Raises UnreadableImage, and QconvError where --resize N leaves less than the crop needs.
    """
    return normalize_pixels(_load_and_fit(path, prep), prep)


def load_pixels(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    """Decode, resize and crop one image without normalisation, in uint8; see `load_image`."""
    return np.ascontiguousarray(_load_and_fit(path, prep))


def _decode_image(path: Path, prep: Preprocessing) -> Picture:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():  # also keeps a named pipe from blocking for ever
        raise UnreadableImage(path, "no such file")
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            # Pillow only warns up to twice its limit. The header is all that was read so far.
            if math.prod(picture.size) > _pixel_limit():
                raise ValueError(f"{format_shape(picture.size)} pixels, refused as a possible decompression bomb")
            ImageOps.exif_transpose(picture, in_place=True)
            return _to_eight_bits(picture).convert("L" if prep.color is Color.GREY else "RGB")
    except UnidentifiedImageError:
        raise UnreadableImage(path, "not an image") from None
    except Exception as error:  # decoders fed with a stranger's bytes raise nearly every type, SyntaxError included
        raise UnreadableImage(path, _error_reason(error)) from error


def _error_reason(error: Exception) -> str:
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


# The size (width, height) to resize a picture to, before it is cropped or padded to the input's.


def _exact_size(_: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    return width, height


def _letterbox_size(size: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    ratio = min(width / size[0], height / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def _auto_size(size: tuple[int, int], prep: Preprocessing) -> tuple[int, int]:
    height, width = prep.size
    if not prep.class_vector or size == (width, height):
        return width, height
    return _covering_size(size, (round(width / CROP_SHARE), round(height / CROP_SHARE)))


def _covering_size(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Scale `size` so that both sides reach `least`; the free side is rounded down, as torchvision does."""
    (width, height), (least_width, least_height) = size, least
    if least_width * height >= least_height * width:  # the width binds
        return least_width, height * least_width // width
    return width * least_height // height, least_height


_SIZE_OF_MODE: Mapping[str, Callable[[tuple[int, int], Preprocessing], tuple[int, int]]] = {
    "auto": _auto_size,
    "exact": _exact_size,
    "letterbox": _letterbox_size,
}


def _fit_image(picture: Picture, path: Path, prep: Preprocessing) -> Picture:
    """Resize, then crop or pad the centre to prep.size."""
    from PIL import Image

    height, width = prep.size
    if isinstance(prep.resize, int):
        size = _covering_size(picture.size, (prep.resize, prep.resize))
    else:
        size = _SIZE_OF_MODE[prep.resize](picture.size, prep)
    if math.prod(size) > max(_pixel_limit(), width * height):  # a few pixels by thousands: small file, huge picture
        raise UnreadableImage(
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


def _load_and_fit(path: Path, prep: Preprocessing) -> NDArray[np.uint8]:
    picture = _fit_image(_decode_image(path, prep), path, prep)
    return arrange_pixels(np.atleast_3d(np.asarray(picture)), prep)


def arrange_pixels(pixels: NDArray[np.uint8], prep: Preprocessing) -> NDArray[np.uint8]:
    """Pixels (H, W, C), RGB or grey, in the axes and the channel order of the network: (C, H, W) or (H, W, C)."""
    if prep.color is Color.BGR:
        pixels = pixels[:, :, ::-1]
    return pixels.transpose(2, 0, 1) if prep.layout is Layout.NCHW else pixels


def normalize_pixels(pixels: NDArray[np.uint8], prep: Preprocessing) -> NDArray[np.float32]:
    """(pixel * scale - mean) / std of one picture or of a batch, in the axes of prep.layout, contiguous."""
    along = (-1, 1, 1) if prep.layout is Layout.NCHW else (-1,)
    values = pixels.astype(np.float32, order="C")
    values *= np.float32(prep.scale)
    values -= np.asarray(prep.mean, np.float32).reshape(along)
    values /= np.asarray(prep.std, np.float32).reshape(along)
    return values


# ---- one ready-made sample


def _load_sample(path: Path, inputs: Sequence[InputSpec], listing: Listing) -> dict[str, NDArray[Any]]:
    """Read one .npy or .npz file: {input name: array without the batch axis, of the wanted type}.

    listing: of which it is; it may give what would be in the file.
    """
    arrays = _read_arrays(path, inputs) if listing.read is None else listing.read(path)
    names = {spec.name for spec in inputs}
    for fact, wrong in (("lacks", names - arrays.keys()), ("holds unknown", arrays.keys() - names)):
        if wrong:
            hint = f"name its arrays after the network's inputs: {', '.join(sorted(names))}."
            raise QconvError(f"{listing.in_words(path)} {fact} {', '.join(sorted(wrong))}.", hint)
    hint = SAMPLE_FILE_HINT if listing.read is None else GIVEN_SAMPLE_HINT
    return {spec.name: _check_array(arrays[spec.name], spec, listing.in_words(path), hint) for spec in inputs}


SAMPLE_FILE_HINT = "store one sample a file, with or without the leading batch axis of 1."

GIVEN_SAMPLE_HINT = "give arrays with the batch as axis 0, or one sample without it."


MOST_SAMPLE_BYTES = 1 << 30
"""Of one .npz sample, unpacked: a picture of 8,000 by 8,000 pixels in float32 takes less."""

_HEADER_LOCK = threading.Lock()
"""Headers are Python literals, and parsing two of them at the same time may fail (CPython issue 106905)."""


def _read_arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UnreadableImage(path, "no such file")
    try:
        with _HEADER_LOCK, path.open("rb") as file:
            magic = file.read(len(storage.ZIP_MAGICS[0]))
            file.seek(0)
            if magic in storage.ZIP_MAGICS:
                with zipfile.ZipFile(file) as archive:
                    storage.check_unpacked_size(archive, MOST_SAMPLE_BYTES)
                    names = archive.namelist()
                    return {name.removesuffix(".npy"): storage.read_member(archive, name) for name in names}
            loaded = storage.read_npy(file, path.stat().st_size)
    except MemoryError:
        raise QconvError(f"{path} needs more memory than there is.", "free some memory.") from None
    except Exception as error:  # a stranger's bytes again: ValueError, EOFError, BadZipFile, zlib.error
        raise UnreadableImage(path, _error_reason(error)) from error
    if len(inputs) != 1:
        raise QconvError(f"{path} holds one array but the network has {len(inputs)} inputs.", _describe_npz(inputs))
    return {inputs[0].name: loaded}


def split_whole_batches(listing: Listing, inputs: Sequence[InputSpec], most: int | None) -> Listing:
    """List the rows of files that hold a whole batch of a network whose batch is fixed, each as a sample of its own.

    A row is called `FILE/INDEX.npy`. Files of one sample stay as they are. most: samples in all, None for no limit.
    """
    sizes = {spec.shape[0] if spec.shape else None for spec in inputs}
    size = sizes.pop()
    if listing.read is not None or size is None or size == 1 or sizes:
        return listing
    samples = [path for path in listing.paths if suffix_of(path) in SAMPLE_SUFFIXES]
    whole = {path for path in samples if _holds_batch(path, inputs)}
    if not whole:
        return listing
    rows = ([path / f"{row}.npy" for row in range(size)] if path in whole else [path] for path in listing.paths)
    paths = tuple(path for part in rows for path in part)[:most]
    return replace(listing, paths=paths, found=listing.found + (size - 1) * len(whole), read=partial(_read_row, inputs))


def _holds_batch(path: Path, inputs: Sequence[InputSpec]) -> bool:
    """Whether each array has exactly the shape of its input. A file that is none is told of when it is read."""
    try:
        with _HEADER_LOCK, path.open("rb") as file:
            if suffix_of(path) == ".npy":
                shapes = {inputs[0].name: storage.read_npy_shape(file)}
            else:
                with zipfile.ZipFile(file) as archive:
                    shapes = {}
                    for name in archive.namelist():
                        with archive.open(name) as member:
                            shapes[name.removesuffix(".npy")] = storage.read_npy_shape(member)
    except Exception:  # a stranger's bytes
        return False
    return shapes.keys() == {spec.name for spec in inputs} and all(
        shape_matches(shapes[spec.name], spec.shape) for spec in inputs
    )


def _read_row(inputs: Sequence[InputSpec], path: Path) -> dict[str, NDArray[Any]]:
    if not path.parent.is_file():
        return _read_arrays(path, inputs)
    return {name: array[int(path.stem)] for name, array in _read_arrays(path.parent, inputs).items()}


def _describe_npz(inputs: Sequence[InputSpec]) -> str:
    keywords = ", ".join(f"'{spec.name}': ..." for spec in inputs)
    return f"write one .npz file a sample: np.savez('0.npz', **{{{keywords}}})."


def _check_array(array: NDArray[Any], spec: InputSpec, told: str, hint: str) -> NDArray[Any]:
    """The sample without the batch axis, of the wanted type. told: what an error calls it; hint: of another shape."""
    batched = array.ndim == len(spec.shape) and array.shape[:1] == (1,)
    sample = array[0] if batched else array
    if not spec.shape or not shape_matches((1, *sample.shape), (None, *spec.shape[1:])):
        if spec.shape and array.shape == spec.shape:
            fact = f"{told} is no sample of input '{spec.name}': the inputs have no batch in common."
            raise QconvError(fact, "export the model with the batch as axis 0 of all inputs, or with one input.")
        takes = format_shape(spec.shape) if spec.shape else "a number without a batch axis"
        raise QconvError(
            f"{told} has shape {format_shape(array.shape)} for input '{spec.name}', which takes {takes}.", hint
        )
    # Any float may become the wanted float. Integers into a float network are most likely pixels not yet normalised.
    same_kind = array.dtype.kind == spec.dtype.kind
    floats = same_kind and spec.dtype.kind == "f"
    if not floats and not (same_kind and np.can_cast(array.dtype, spec.dtype)):
        fact = f"{told} holds {array.dtype} for input '{spec.name}', which takes {spec.dtype}."
        raise QconvError(fact, f"store it as {spec.dtype}, preprocessed as the network wants it.")
    with np.errstate(over="ignore"):  # becomes infinite and is told below
        sample = np.ascontiguousarray(sample, dtype=spec.dtype).reshape(sample.shape)
    if floats and not np.isfinite(sample).all():
        raise QconvError(f"{told} holds NaN or infinity for input '{spec.name}'.", "mend the sample, or remove it.")
    return sample


# ---- all of them


def iter_batches(
    listing: Listing,
    inputs: Sequence[InputSpec],
    prep: Preprocessing | None,
    *,
    batch: int,
    workers: int,
    reporter: Reporter,
    progress: Callable[[int], None] | None = None,
    lost: Callable[[Path], None] = lambda path: None,
) -> Generator[dict[str, NDArray[Any]], None, None]:
    """Yield {input name: (n, ...) array of the wanted type} in the listing's order; n is `batch`, the last may be less.

    Up to 2 * workers + batch files are decoded ahead, so that reading overlaps the caller's work. progress receives
    how many files are done so far. `reporter` and `lost` hear of an undecodable file, which is left out; more than a
    tenth of them, and a sample of the wrong shape, raise QconvError. prep may be None where all files are .npy or .npz.
    Closing the generator stops the threads.
    """
    first = next((path for path in listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES), None)
    if first is not None and len(inputs) != 1:
        raise QconvError(f"{first} is one picture but the network has {len(inputs)} inputs.", _describe_npz(inputs))
    if first is not None and prep is None:
        raise QconvError(f"{first} is a picture but the network takes none.", "pass .npy or .npz samples.")
    load = partial(_load_inputs, inputs=inputs, prep=prep, listing=listing)
    _import_decoders()
    pending = prefetch(load, listing.paths, workers=workers, depth=2 * workers + batch)
    return _batch_inputs(
        _skip_unreadable(pending, max(len(listing.paths), listing.whole), reporter, progress, lost), inputs, batch
    )


def _load_inputs(
    path: Path, inputs: Sequence[InputSpec], prep: Preprocessing | None, listing: Listing
) -> dict[str, NDArray[Any]]:
    if prep is None or suffix_of(path) in SAMPLE_SUFFIXES:
        return _load_sample(path, inputs, listing)
    if prep.keeps_pixels and inputs[0].dtype in WHOLE_PIXEL_TYPES:
        return {inputs[0].name: load_pixels(path, prep).astype(inputs[0].dtype, copy=False)}
    return {inputs[0].name: cast_pixels(load_image(path, prep), inputs[0].dtype)}


def cast_pixels(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Cast normalised pixels to the type that an input takes."""
    if dtype in WHOLE_PIXEL_TYPES:
        bounds = np.iinfo(dtype)
        values = np.clip(np.rint(values), max(bounds.min, -MOST_WHOLE), min(bounds.max, MOST_WHOLE))
    return values.astype(dtype, copy=False)


_Sample = dict[str, NDArray[Any]]

_SampleIterator = Generator[_Sample, None, None]

_SampleFutures = Generator[Future[_Sample], None, None]


def _import_decoders() -> None:
    """Import what _FORMATS needs, once: left to itself Pillow imports all its decoders, in every thread at once."""
    for name in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP"):
        import_module(f"PIL.{name}ImagePlugin")


def _skip_unreadable(
    pending: _SampleFutures,
    total: int,
    reporter: Reporter,
    progress: Callable[[int], None] | None,
    lost: Callable[[Path], None],
) -> _SampleIterator:
    """Yield what could be decoded; raise QconvError as soon as more than a tenth of all files could not."""
    bad: list[UnreadableImage] = []
    with closing(pending):
        for done, future in enumerate(pending, 1):
            row = None
            try:
                row = future.result()
            except UnreadableImage as error:
                bad.append(error)
                lost(error.path)
                reporter.warn(f"skipped {error.path}: cannot be decoded ({error.reason})")
                if 10 * len(bad) > total:
                    raise _too_many_unreadable_error(bad, done, total) from error
            if progress is not None:
                progress(done)
            if row is not None:
                yield row


def _too_many_unreadable_error(bad: Sequence[UnreadableImage], done: int, total: int) -> QconvError:
    so_far = "" if done == total else f" among the first {done}"
    fact = f"{len(bad)} of {format_count(total, 'picture')} cannot be decoded{so_far}, which is more than a tenth"
    hint = "remove what is broken, or leave it out with --glob."
    return QconvError(f"{fact}; the first is {bad[0].path} ({bad[0].reason}).", hint)


def _batch_inputs(rows: _SampleIterator, inputs: Sequence[InputSpec], batch: int) -> _SampleIterator:
    """Join rows into batches along a new axis 0."""
    waiting: list[_Sample] = []
    with closing(rows):
        for row in rows:
            waiting.append(row)
            if len(waiting) == batch:
                yield _stack_inputs(waiting, inputs)
    if waiting:
        yield _stack_inputs(waiting, inputs)


def _stack_inputs(rows: list[_Sample], inputs: Sequence[InputSpec]) -> _Sample:
    """Stack the rows and empty the list, so that they are not held while the caller works on the batch."""
    for spec in inputs:
        shapes = sorted({row[spec.name].shape for row in rows})
        if len(shapes) > 1:
            fact = (
                f"samples for input '{spec.name}' differ in shape: {format_shape(shapes[0])} and "
                f"{format_shape(shapes[1])}."
            )
            raise QconvError(fact, "pass --batch 1, or bring them to one shape.")
    joined = {spec.name: np.stack([row[spec.name] for row in rows]) for spec in inputs}
    rows.clear()
    return joined


THUMBNAIL = 160


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The file of a picture (H, W, 3) or (H, W, 1), every pixel as it is."""
    return encode_thumbnail(pixels, max(pixels.shape))


def encode_thumbnail(pixels: NDArray[np.uint8], side: int = THUMBNAIL) -> bytes:
    """The file of a picture (H, W, 3) or (H, W, 1), no side longer than `side`."""
    from PIL import Image  # slow to import, and not needed by samples

    small = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    small.thumbnail((side, side))
    return png_bytes(small)


def png_bytes(picture: Picture) -> bytes:
    """The PNG file of an image."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
