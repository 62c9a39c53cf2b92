"""What is done to a picture, in full: the user's options, the model's input and a preset's numbers joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qconv.config.preprocessing import AUTO, PRESETS, Color, Layout, Preprocessing, PreprocessingOptions, Preset
from qconv.errors import QconvError, format_count, format_shape

PIXEL_TYPES = frozenset(map(np.dtype, ("float16", "float32", "float64", "uint8")))
AXES = {Layout.NCHW: (1, 2, 3), Layout.NHWC: (3, 1, 2)}  # channel, height, width
RESIZED = ("auto", "exact", "letterbox")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One graph input of the network; axis 0 is the batch. A dimension is None where the model leaves it open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


def resolve(options: PreprocessingOptions, spec: InputSpec, *, class_vector: bool) -> Preprocessing:
    """Join what the user said, what the model's input fixes and the preset's own numbers.

    Where --color swaps red and blue, the preset's mean and std move with their colours; --mean and --std are taken in
    the final channel order. Raises QconvError where options and input contradict each other, where the size stays
    open, and where the input is not a picture (rank other than 4, neither 1 nor 3 channels, an odd type).
    """
    _require_picture(options, spec)
    layout = options.layout or _deduced_layout(spec.shape)
    channels = _channels(options.color, spec, layout)
    name, source = _chosen_preset(options, spec, channels)
    color = Color.GREY if channels == 1 else options.color or PRESETS[name].color
    preset = _with_color(PRESETS[name], color)
    return Preprocessing(
        preset=name,
        source=source,
        color=color,
        scale=preset.scale if options.scale is None else options.scale,
        mean=_a_channel("--mean", options.mean, preset.mean, spec, channels),
        std=_a_channel("--std", options.std, preset.std, spec, channels),
        layout=layout,
        resize=options.resize,
        filter=options.filter,
        size=_size(options.size, spec, layout),
        class_vector=class_vector,
    )


def _require_picture(options: PreprocessingOptions, spec: InputSpec) -> None:
    samples = "pass one .npy or .npz sample a file instead of pictures."
    if not spec.shape:
        raise QconvError(f"input '{spec.name}' is a scalar, or the model does not state its shape.", samples)
    if len(spec.shape) != 4:
        raise QconvError(f"input '{spec.name}' has shape {format_shape(spec.shape)}, which is no picture's.", samples)
    if spec.dtype not in PIXEL_TYPES:
        raise QconvError(f"input '{spec.name}' takes {spec.dtype}, which pictures are not.", samples)
    if isinstance(options.resize, str) and options.resize not in RESIZED:
        raise QconvError(f"--resize {options.resize} is unknown.", f"use {', '.join(RESIZED)} or a number of pixels.")


def _deduced_layout(shape: tuple[int | None, ...]) -> Layout:
    if shape[1] in (1, 3):
        return Layout.NCHW
    # (N, 224, 224, open): 224 are no channels, so that only the last axis can be theirs
    return Layout.NHWC if shape[3] in (1, 3) or (shape[1] is not None and shape[3] is None) else Layout.NCHW


def _channels(color: Color | None, spec: InputSpec, layout: Layout) -> int:
    said = None if color is None else 1 if color is Color.GREY else 3
    channels = spec.shape[AXES[layout][0]]
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


def _chosen_preset(options: PreprocessingOptions, spec: InputSpec, channels: int) -> tuple[str, str]:
    """Return the preset's name, and in words where it came from and what replaces parts of it."""
    own = [f"--{part}" for part in ("scale", "mean", "std", "color") if getattr(options, part) is not None]
    changed = f", with {' and '.join(own)}" if own else ""
    if options.preset not in (None, AUTO):
        if options.preset not in PRESETS:
            raise QconvError(f"--preprocess {options.preset} is unknown.", f"use one of {', '.join((AUTO, *PRESETS))}.")
        return options.preset, f"--preprocess {options.preset}{changed}"
    if spec.dtype == np.uint8:
        name, reason = "raw", "uint8 inputs"
    else:
        name, reason = ("imagenet" if channels == 3 else "unit"), format_count(channels, "channel")
    return name, f"the default for {reason}{changed}; name another with --preprocess"


def _with_color(preset: Preset, color: Color) -> Preset:
    if color in (preset.color, Color.GREY):
        return preset
    return replace(preset, color=color, mean=preset.mean[::-1], std=preset.std[::-1])


def _a_channel(
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


def _size(wanted: tuple[int, int] | None, spec: InputSpec, layout: Layout) -> tuple[int, int]:
    _, *axes = AXES[layout]
    fixed = tuple(spec.shape[axis] for axis in axes)
    if wanted is None:
        height, width = fixed
        if height is None or width is None:
            hint = "pass --size HxW, for example --size 224x224."
            raise QconvError(f"input '{spec.name}' has no fixed height and width.", hint)
        return height, width
    if min(wanted) < 1:
        raise QconvError(f"--size {format_shape(wanted)} is not possible.", "use at least 1x1.")
    if not agrees(wanted, fixed):
        fact = (
            f"--size {format_shape(wanted)} contradicts input '{spec.name}', which is fixed at {format_shape(fixed)}."
        )
        raise QconvError(fact, "leave --size out.")
    return wanted


def layout_order(source: Layout, target: Layout) -> tuple[int, ...]:
    """The axes of a batch in `source`, in the order in which `target` has them."""
    order = [0, 0, 0, 0]
    for here, there in zip(AXES[source], AXES[target], strict=True):
        order[there] = here
    return tuple(order)


def agrees(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether a shape has the dimensions that are not left open."""
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))
