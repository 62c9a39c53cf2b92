"""Finds what a model file itself says about its preprocessing: facts, and statistics that training left behind.

Facts, in the order in which they are believed: metadata that names the preprocessing, an input of bytes, a
normalisation at the head of the graph. Each leaves few preprocessings possible. Where none is found, the running mean
and variance that a BatchNormalization has stored say what its input looked like in training: pictures that are fed
the same way must show the same (Ioffe and Szegedy 2015, section 3.1).

    y = gain * x + shift        what leading nodes make of the input, a channel each

Nothing is run here, and no picture is looked at. A normalisation that is computed in another way than by constants
(Sub, Div, Mul, Add, BatchNormalization, behind Cast and Transpose) is not recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Color, Layout, PreprocessingOptions
from qconv.ir.metadata import PREPROCESSING_KEY, read_preprocessing
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, rank

MOST_REFERENCES = 3
"""BatchNorms that are compared: the first ones depend most on pixels, and are soon reached."""
WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose"})
MOST_LEADING_LAYERS = 12
"""Layers with weights before a BatchNorm from which on it is too far from the pixels, and too slow to run."""


@dataclass(frozen=True, slots=True)
class PreprocessingFact:
    """A certain fact: options that no evidence may change (None where it is silent), and why, in words."""

    options: PreprocessingOptions
    why: str


@dataclass(frozen=True, slots=True)
class ReferenceStatistics:
    """The mean and variance that each channel of a tensor (N, C, H, W) should have, (C,) both.

    stored: read off a BatchNormalization; else the guess that a layer's outputs are neither huge nor tiny.
    """

    name: str
    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    stored: bool


def find_fact(model: Model, dtype: np.dtype[Any], layout: Layout) -> PreprocessingFact | None:
    """The strongest fact about the preprocessing in the file. dtype, layout: of the network's input."""
    found = find_metadata_fact(model.inner.metadata_props)
    if found is not None:
        return found
    if dtype.kind in "iu":
        what = "bytes" if dtype == np.uint8 else "whole numbers"
        return PreprocessingFact(PreprocessingOptions(preset="raw"), f"the input takes {what}")
    return _fact_in_leading_nodes(model, layout)


def find_metadata_fact(carried: Mapping[str, str]) -> PreprocessingFact | None:
    """The strongest fact about the preprocessing in a file's metadata, whoever wrote them."""
    facts = (_fact_in_own_metadata, _fact_in_ultralytics_metadata, _fact_in_windows_ml_metadata)
    return next((found for read in facts if (found := read(carried)) is not None), None)


# -- metadata ----------------------------------------------------------------------------------------------------------

PIXEL_RANGES = {"nominalrange_0_255": "raw", "normalized_0_1": "unit", "normalized_1_1": "tf"}
"""Presets by the pixel range of Windows ML (Image.NominalPixelRange), in lower case."""
PIXEL_FORMATS = {"rgb8": Color.RGB, "rgba8": Color.RGB, "bgr8": Color.BGR, "bgra8": Color.BGR}
"""Colour orders by the pixel format of Windows ML (Image.BitmapPixelFormat), in lower case."""


def _fact_in_own_metadata(carried: Mapping[str, str]) -> PreprocessingFact | None:
    options = read_preprocessing(carried)
    return None if options is None else PreprocessingFact(options, f"the file's metadata {PREPROCESSING_KEY}")


def _fact_in_ultralytics_metadata(carried: Mapping[str, str]) -> PreprocessingFact | None:
    """YOLO exports: `stride`, `task` and `names`, and who made them. They classify what was cropped, not padded."""
    if not {"stride", "task", "names"} <= carried.keys() or "ultralytics" not in carried.get("author", "").lower():
        return None
    resize = "auto" if carried["task"] == "classify" else "letterbox"
    return PreprocessingFact(
        PreprocessingOptions("unit", color=Color.RGB, resize=resize), "the file's metadata by Ultralytics"
    )


def _fact_in_windows_ml_metadata(carried: Mapping[str, str]) -> PreprocessingFact | None:
    preset = PIXEL_RANGES.get(carried.get("Image.NominalPixelRange", "").lower())
    if preset is None:
        return None
    color = PIXEL_FORMATS.get(carried.get("Image.BitmapPixelFormat", "").lower())
    return PreprocessingFact(
        PreprocessingOptions(preset=preset, color=color), "the file's metadata Image.NominalPixelRange"
    )


# -- a normalisation at the head of the graph --------------------------------------------------------------------------

PASSING_OPS = frozenset({"Cast", "Identity", "Dropout"})
ARITHMETIC_OPS = frozenset({"Sub", "Div", "Mul", "Add", "BatchNormalization"})
LARGEST_PIXEL_MEAN = 256.0
SMALL_GAIN = 1 / 50
"""Gains up to here divide pixels from 0 to 255; those that divide by a standard deviation of 0.2 multiply by 5."""
LARGE_GAIN = 50.0
LEAST_MEAN_GAP = 0.03
"""Mean colours that fall, or rise, by this share from channel to channel tell their order; those published do by
more."""


@dataclass(slots=True)
class _Affine:
    """y = gain * x + shift of each channel, (C,) or (1,) both."""

    gain: NDArray[np.float64]
    shift: NDArray[np.float64]

    def then(self, gain: Any, shift: Any) -> _Affine:
        return _Affine(self.gain * gain, self.shift * gain + shift)


def _fact_in_leading_nodes(model: Model, layout: Layout) -> PreprocessingFact | None:
    found = _compose_leading_nodes(model, 1 if layout is Layout.NCHW else 3)
    if found is None or not np.isfinite(found.gain).all() or not found.gain.all():
        return None
    mean = -found.shift / found.gain  # the pixel value that becomes zero
    preset = _preset_by_range(float(np.mean(mean)), float(np.abs(found.gain).mean()))
    if preset is None:
        return None
    return PreprocessingFact(
        PreprocessingOptions(preset=preset, color=_color_by_mean(mean)), "the graph normalises its input itself"
    )


def _preset_by_range(mean: float, gain: float) -> str | None:
    """The preset that suits a mean and a gain. Pixels either reach 255 or 1."""
    if 2 <= mean <= LARGEST_PIXEL_MEAN or (-1 <= mean < 2 and gain <= SMALL_GAIN):
        return "raw"
    if 0.05 <= mean <= 1 or (abs(mean) < 0.05 and gain >= LARGE_GAIN):
        return "unit"
    return None


def _color_by_mean(mean: NDArray[np.float64]) -> Color | None:
    """Photographs are warm: red is the brightest channel on average, blue the darkest."""
    if mean.size != 3:
        return None
    for color, falling in ((Color.RGB, mean), (Color.BGR, mean[::-1])):
        if falling[0] > falling[1] * (1 + LEAST_MEAN_GAP) and falling[1] > falling[2] * (1 + LEAST_MEAN_GAP):
            return color
    return None


def _compose_leading_nodes(model: Model, axis: int) -> _Affine | None:
    """The composed gain and shift of the nodes behind the input; None where these do no such arithmetic."""
    value: Value = model.graph.inputs[0]
    seen: _Affine | None = None
    while (node := model.sole_reader(value)) is not None:
        if node.op_type == "Transpose":
            order = attribute(node, "perm")
            if order is None or axis not in order:
                break
            axis = order.index(axis)
        elif node.op_type in ARITHMETIC_OPS:
            step = _affine_of_node(node, value, axis)
            if step is None:
                break
            seen = (seen or _Affine(np.ones(1), np.zeros(1))).then(*step)
        elif node.op_type not in PASSING_OPS:
            break
        value = node.outputs[0]
    return seen


def _affine_of_node(node: Node, value: Value, axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """gain and shift of one node on the path of pictures (N, C, H, W) or (N, H, W, C)."""
    if node.op_type == "BatchNormalization":
        stored = batchnorm_statistics(node)
        # its own gain and shift come after the normalisation, and only blur what the input was
        if stored is None or axis != 1 or not stored[1].all():
            return None
        return stored[1] ** -0.5, -stored[0] * stored[1] ** -0.5
    first, second = node.inputs[0], input_of(node, 1)
    other = second if first is value else first
    numbers = _constant_per_channel(other, axis, rank(value) or 4)
    if numbers is None or (node.op_type in ("Sub", "Div") and first is not value):
        return None
    one, zero = np.ones(1), np.zeros(1)
    with np.errstate(divide="ignore"):
        return {
            "Sub": (one, -numbers),
            "Add": (one, numbers),
            "Mul": (numbers, zero),
            "Div": (1 / numbers, zero),
        }[node.op_type]


def _constant_per_channel(value: Value | None, axis: int, axes: int) -> NDArray[np.float64] | None:
    """A constant as (1,) or (C,) if it has no more than one number a channel."""
    numbers = constant_array(value)
    if numbers is None or numbers.dtype.kind not in "fiu":
        return None
    shape = (1,) * (axes - numbers.ndim) + numbers.shape
    if len(shape) > axes or numbers.size != shape[axis]:
        return None
    return numbers.reshape(-1).astype(np.float64)


# -- what training left behind -----------------------------------------------------------------------------------------


def find_references(model: Model) -> list[ReferenceStatistics]:
    """The statistics that the first layers should see: stored ones, or guesses at the first layers with weights."""
    return _take_first(_stored_references(model)) or _take_first(_guessed_references(model))


def _take_first(found: Iterator[ReferenceStatistics]) -> list[ReferenceStatistics]:
    return [reference for reference, _ in zip(found, range(MOST_REFERENCES), strict=False)]


def _stored_references(model: Model) -> Iterator[ReferenceStatistics]:
    seen: set[str] = set()
    layers = 0
    for node in model.nodes():
        layers += node.op_type in WEIGHTED_OPS
        if layers > MOST_LEADING_LAYERS:
            return
        read = input_of(node, 0)
        if node.op_type != "BatchNormalization" or read is None or not read.name or read.name in seen:
            continue
        statistics = batchnorm_statistics(node)
        if statistics is not None and rank(read) in (None, 4) and is_measured(*statistics):
            seen.add(read.name)
            yield ReferenceStatistics(read.name, *statistics, stored=True)


def batchnorm_statistics(node: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Running mean and variance of a BatchNormalization, (C,) both; None where they are no finite constants."""
    mean, var = (constant_array(input_of(node, index)) for index in (3, 4))
    if (
        mean is None
        or var is None
        or not var.size
        or not np.isfinite(mean).all()
        or not np.isfinite(var).all()
        or var.min() < 0
    ):
        return None
    return mean.reshape(-1).astype(np.float64), var.reshape(-1).astype(np.float64)


def is_measured(mean: NDArray[np.float64], var: NDArray[np.float64]) -> bool:
    """Whether statistics were measured: those that are equal for all channels are where training starts, 0 and 1."""
    return bool(np.ptp(mean) or np.ptp(var))


def _guessed_references(model: Model) -> Iterator[ReferenceStatistics]:
    """Yield guesses for layers into which a BatchNorm was folded: its gain and shift are near 1 and 0 on average."""
    for node in model.nodes():
        weight = constant_array(input_of(node, 1))
        if node.op_type not in WEIGHTED_OPS or weight is None or not node.outputs[0].name:
            continue
        sizes = dims(node.outputs[0])
        channels = sizes[1] if sizes is not None and len(sizes) == 4 else None
        if channels is not None:
            yield ReferenceStatistics(node.outputs[0].name, np.zeros(channels), np.ones(channels), stored=False)
