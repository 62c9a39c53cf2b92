"""Joins the user's options, the model's input and a preset into a complete preprocessing, and applies it to pixels.

value = (pixel * scale - mean) / std          in float32, pixels 0 to 255, after resizing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import (
    AUTO,
    LETTERBOX_GREY,
    PRESETS,
    Color,
    Layout,
    LetterboxAlign,
    Preprocessing,
    PreprocessingOptions,
    Preset,
    ResizeFilter,
)
from qconv.errors import QconvError, format_count, format_shape

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
        filter=options.filter or ResizeFilter.BILINEAR,
        size=_resolve_size(options.size, spec, layout),
        class_vector=class_vector,
        letterbox_align=options.letterbox_align or LetterboxAlign.CENTER,
        letterbox_fill=LETTERBOX_GREY if options.letterbox_fill is None else options.letterbox_fill,
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
    kept: dict[str, set[float]] = {"scale": {1.0}, "mean": {0.0}, "std": {1.0}}
    for part, neutral in kept.items():
        value = getattr(options, part)
        if value is not None and {*(value if isinstance(value, tuple) else (value,))} != neutral:
            found.append(f"--{part}")
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
    if options.preset not in (None, AUTO):
        return options.preset, options.name_beside(f"--preprocess {options.preset}")
    if spec.dtype in WHOLE_PIXEL_TYPES:
        name, reason = "raw", f"{spec.dtype} inputs"
    else:
        name, reason = ("imagenet" if channels == 3 else "unit"), format_count(channels, "channel")
    return name, f"{options.name_beside(f'the default for {reason}')}; name another with --preprocess"


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


def cast_pixels(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Cast normalised pixels to the type that an input takes."""
    if dtype in WHOLE_PIXEL_TYPES:
        bounds = np.iinfo(dtype)
        values = np.clip(np.rint(values), max(bounds.min, -MOST_WHOLE), min(bounds.max, MOST_WHOLE))
    return values.astype(dtype, copy=False)
