"""This module quantizes the weights and the bias of a layer, or of layers that share weights, and corrects the bias.

The bias is stored as int32 with the exact scale s_x * s_w, and the accumulator starts from it. Where it would overflow,
the weight scale of that channel is widened until it fits: weights lose precision there, the bias keeps its value.
Rounding the weights W to Q moves the mean of each output; bias correction takes that back:

    b' = b + sum over inputs i and kernel positions k of (W - Q)[o, i, k] * E[x_i]

E[x_i] is the input mean in the float network, measured on calibration data or derived from BatchNormalization
(analytic, see `data_free.propagation`). It is exact inside and a little too large at padded borders. An output of a
ConvTranspose sees one of sH * sW kernel positions.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.config.targets import Target
from qconv.errors import Change, Finding, QconvError, Skipped
from qconv.ir.layers import input_means_of
from qconv.ir.model import attribute, constant_array, input_of
from qconv.planning.plan import LayerPlan
from qconv.quantization import saturation, weight_ranges
from qconv.quantization.weight_ranges import WEIGHT_RANGE_ESTIMATORS
from qconv.quantizer import SMALLEST_SCALE, PerChannel, QuantParams, bias_params, group_extremes


def compute_bias_correction(
    error: NDArray[np.float32], mean: NDArray[np.float64], *, groups: int, output_axis: int
) -> NDArray[np.float64]:
    """The correction to add to the bias, (O,).

    Args:
        error: W - Q as the layer stores it: (O, I/g, kH, kW), (I, O/g, kH, kW) where `output_axis` is 1, or a matrix
            with its outputs along `output_axis`.
        mean: mean of each input channel, (I,).
        groups: of the convolution.
        output_axis: the axis of output channels.
    """
    if error.ndim == 2:
        by_output = error if output_axis == 0 else error.T
        moved: NDArray[np.float64] = np.einsum("oi,i->o", by_output, mean)
        return moved
    if output_axis == 1:
        inputs, per_group = error.shape[:2]
        by_group = error.reshape(groups, inputs // groups, per_group, -1).sum(axis=3, dtype=np.float64)  # (G, I/G, O/G)
        summed: NDArray[np.float64] = np.einsum("gio,gi->go", by_group, mean.reshape(groups, -1)).reshape(-1)
        return summed
    outputs, per_group = error.shape[:2]
    by_input = error.reshape(groups, outputs // groups, per_group, -1).sum(axis=3, dtype=np.float64)  # (G, O/G, I/G)
    shift: NDArray[np.float64] = np.einsum("goi,gi->go", by_input, mean.reshape(groups, per_group)).reshape(-1)
    return shift


# Leaves half of int32 to the sum of products: 2^30 / (255 * 127) inputs a channel is more than any layer has.
LARGEST_BIAS_CODE = 2.0**30

WIDENED_FOR_BIAS = "weight scales widened, so that the bias fits into int32"
"""Kind of the finding for a layer whose bias is too large for its scales."""

CORRECTED_BY_BATCH_NORM = "bias corrected by the means that BatchNormalization says"


@dataclass(slots=True)
class LayerParams:
    """Codes and parameters of a layer.

    bias: the float bias, (O,); None where the layer adds nothing.
    bias_params: how the bias is quantized; None where it stays float.
    """

    layer: LayerPlan
    weight: QuantParams
    codes: NDArray[np.integer]
    bias: NDArray[np.floating] | None = None
    bias_params: QuantParams | None = None

    @property
    def stored(self) -> tuple[QuantParams, NDArray[np.integer]]:
        """Parameters and codes as the file stores them: shifted so that zero is code 0 where `moves_zero` is set."""
        if not self.layer.moves_zero:
            return self.weight, self.codes
        _, zero = self.weight.broadcast(self.codes.shape)
        return replace(self.weight, zero_point=np.zeros_like(self.weight.zero_point)), np.asarray(
            self.codes - zero, self.codes.dtype
        )


@dataclass(frozen=True, slots=True)
class LayerInput:
    """The quantized input of a layer. sketch: of the tensor itself; None where it was not observed."""

    params: QuantParams
    sketch: Sketch | None

    def channel_codes(self, channels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The least and the largest code of each of `channels` channels on the calibration pictures."""
        found = self.of(channels)
        if found is None:
            return self.all_codes(channels)
        zero = self.params.zero_point.astype(np.int64)  # what padding feeds in
        low, high = (self.params.quantize(ends).astype(np.int64) for ends in (found.lows, found.highs))
        return np.minimum(low, zero), np.maximum(high, zero)

    def all_codes(self, channels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The least and the largest code possible, for each of `channels` channels."""
        spec = self.params.spec
        return np.full(channels, spec.qmin), np.full(channels, spec.qmax)

    def of(self, channels: int) -> Sketch | None:
        """The sketch, if it has this many channels; else None."""
        return self.sketch if self.sketch is not None and _has_channels(self.sketch, channels) else None


def _has_channels(sketch: Sketch, channels: int) -> bool:
    return bool(sketch.count) and sketch.lows.size == channels


@dataclass(frozen=True, slots=True)
class WeightReader:
    """A layer that reads a weight. source: its quantized input; None where that stays float."""

    layer: LayerPlan
    source: LayerInput | None


def quantize_layer(
    layer: LayerPlan,
    source: LayerInput | None,
    calibrator: str,
    target: Target,
    *,
    seen: Sketch | None = None,
    saturation_safe: bool | None = None,
    correction: str = "measured",
) -> tuple[LayerParams, list[Finding]]:
    """Quantize the weights and the bias of one layer; see `quantize_readers`. seen: of its float input."""
    (found,) = quantize_readers(
        [WeightReader(layer, source)],
        calibrator,
        target,
        seen=[seen],
        saturation_safe=saturation_safe,
        correction=correction,
    )
    return found


def quantize_readers(
    readers: Sequence[WeightReader],
    calibrator: str,
    target: Target,
    *,
    seen: Sequence[Sketch | None],
    saturation_safe: bool | None = None,
    correction: str = "measured",
) -> list[tuple[LayerParams, list[Finding]]]:
    """Quantize the weights that some layers share to the nearest codes, and the bias of each layer.

    Args:
        readers: the layers, alike by the plan (`Plan.layers_by_weight`).
        calibrator: range estimator of the weights.
        target: the runtime.
        seen: sketch of each layer's float input, where that was observed.
        saturation_safe: whether no pair of products overflows 16 bits on any image (True) or on the calibration images
            (None); False ignores overflow.
        correction: the bias correction, see `Recipe`.
    """
    layer = readers[0].layer
    weight = read_float_weight(layer)
    notes: list[Finding] = []
    if layer.own_bits:
        params = weight_ranges.make_weight_channel_params(weight, layer.weight, calibrator)
        notes.append(weight_ranges.describe_channel_bits(layer.node.name or "", "weights", params))
    else:
        params = layer.weight.from_range(*WEIGHT_RANGE_ESTIMATORS[calibrator](weight, layer.weight))
    params, found = fit_scales(readers, params, weight, target, saturation_safe=saturation_safe)
    codes = params.quantize(weight)
    rounded = params.dequantize(codes)
    every = []
    for reader, sketch in zip(readers, seen, strict=True):
        shift, more = _choose_bias_shift(reader.layer, weight, rounded, sketch, correction)
        chosen = attach_bias(reader.layer, params, codes, shift_bias(reader.layer, shift), reader.source, target)
        every.append((chosen, [*notes, *found, *more]))
        notes, found = [], []  # said of the first alone
    return every


def _choose_bias_shift(
    layer: LayerPlan, weight: NDArray[np.float32], rounded: NDArray[np.float32], seen: Sketch | None, correction: str
) -> tuple[NDArray[np.float64] | None, list[Finding]]:
    """The shift of the bias that the correction asks for, (O,); None where none is possible or wanted."""
    if correction in ("measured", "sequential") and seen is not None:
        return _measured_bias_shift(layer, weight, rounded, seen), []
    if correction != "analytic":
        return None, []
    name, known = layer.node.name or "", analytic_bias_shift(layer, weight, rounded)
    if isinstance(known, str):
        return None, [Skipped("bias", name, known)]
    return known, [Change("bias", name, CORRECTED_BY_BATCH_NORM, CORRECTED_BY_BATCH_NORM)]


def read_float_weight(layer: LayerPlan) -> NDArray[np.float32]:
    """The layer's weights as its spec sees them. Raises QconvError where they are not finite."""
    stored = constant_array(layer.node.inputs[1])
    assert stored is not None
    weight = layer.arranged(stored.astype(np.float32, copy=False))
    if not np.isfinite(weight).all():
        name = layer.node.name
        raise QconvError(f"The weights of {name} hold NaN or infinity.", "export the model again, or --keep-float it.")
    return weight


def fit_scales(
    readers: Sequence[WeightReader],
    params: QuantParams,
    weight: NDArray[np.float32],
    target: Target,
    *,
    saturation_safe: bool | None = None,
) -> tuple[QuantParams, list[Finding]]:
    """Parameters with scales as wide as the integer kernels of all readers demand; see `quantize_readers`."""
    params = _scale_dead_channels(params, weight)
    if all(reader.source is None for reader in readers):
        return params, []
    findings: list[Finding] = []
    layer = readers[0].layer
    widened = params.with_scale(np.maximum(params.scale, find_least_scale(readers, target, params)))
    count = int(np.count_nonzero(widened.scale > params.scale))
    if count:
        what = f"weight scale of {count} channels widened, so that the bias fits into int32"
        findings.append(Change("params", layer.node.name or "", what, WIDENED_FOR_BIAS))
        params = widened
    limits = find_pair_limits(readers, target, widest=params.widest, saturation_safe=saturation_safe)
    if limits is not None:
        axis, inputs = layer.rule.output_axis, layer.padded
        params = saturation.widen_scales(params, weight, *limits, output_axis=axis, inputs=inputs)
    return params, findings


def find_pair_limits(
    readers: Sequence[WeightReader], target: Target, *, widest: int, saturation_safe: bool | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The least and the largest code of each input channel, where pairs of products must fit into 16 bits in any layer.

    widest: the most bits that a weight has.
    """
    if saturation_safe is False or widest != 8 or not target.saturates_int16_pairs:
        return None
    found = [_pair_limits_of(reader.layer, reader.source, saturation_safe) for reader in readers]
    known = [limits for limits in found if limits is not None]
    if not known:
        return None
    lows, highs = zip(*known, strict=True)
    return np.minimum.reduce(lows), np.maximum.reduce(highs)


def _pair_limits_of(
    layer: LayerPlan, source: LayerInput | None, saturation_safe: bool | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    if source is None or source.params.spec.bits != 8 or not _is_accumulated_in_pairs(layer):
        return None
    channels = count_input_channels(layer)
    return source.channel_codes(channels) if saturation_safe is None else source.all_codes(channels)


def attach_bias(
    layer: LayerPlan,
    params: QuantParams,
    codes: NDArray[np.integer],
    bias: NDArray[np.floating] | None,
    source: LayerInput | None,
    target: Target,
) -> LayerParams:
    """Put codes, parameters and a bias (O,) together, the bias stored as the target wants it."""
    if source is None or bias is None or not _has_integer_bias(layer, source, target):
        return LayerParams(layer, params, codes, bias)
    with np.errstate(over="ignore"):
        product = np.multiply(source.params.scale, params.scale, dtype=np.float32)
    return LayerParams(layer, params, codes, bias, bias_params(product))


def _has_integer_bias(layer: LayerPlan, source: LayerInput, target: Target) -> bool:
    """Whether the bias is stored as int32.

    A blocked layer has no single s_w for its bias, and one whose data has a scale for each channel no single s_x.
    Layers of 16 bits run in float as well, but there ONNX Runtime would quantize a float bias by itself, and let it
    overflow.
    """
    return target.integer_bias and not layer.blocked and source.params.scale.ndim == 0


def shift_bias(layer: LayerPlan, shift: NDArray[np.float64] | None) -> NDArray[np.floating] | None:
    """The layer's bias plus a shift (O,); None where it has neither."""
    bias = constant_array(input_of(layer.node, 2))
    if shift is None:
        return bias
    return (shift if bias is None else bias + shift).astype(np.float32)


def analytic_bias_shift(
    layer: LayerPlan, weight: NDArray[np.float32], rounded: NDArray[np.float32]
) -> NDArray[np.float64] | str:
    """The bias correction from the input means that BatchNormalization gives, (O,); or why they are not known."""
    means = input_means_of(layer.node)
    if layer.node.op_type == "MatMul":
        return "a MatMul has no bias"
    return means if isinstance(means, str) else _mean_output(layer, weight - rounded, means)


def _measured_bias_shift(
    layer: LayerPlan, weight: NDArray[np.float32], rounded: NDArray[np.float32], seen: Sketch
) -> NDArray[np.float64] | None:
    """The bias correction from the measured input means, (O,); None where the channels were not observed.

    The shift of the inputs' means by clipping is not corrected: few places are clipped, and to raise all others for
    them only loses.
    """
    watched = _has_channels(seen, count_input_channels(layer))
    return _mean_output(layer, weight - rounded, seen.means) if watched else None


def _mean_output(layer: LayerPlan, weight: NDArray[np.float32], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean outputs, (O,). weight: in the layer's own shape. means: of its input channels, (I,)."""
    stored = constant_array(layer.node.inputs[1])
    assert stored is not None
    groups, axis = attribute(layer.node, "group", 1), layer.rule.output_axis
    seen = 1 / np.prod(attribute(layer.node, "strides", [1])) if layer.node.op_type == "ConvTranspose" else 1.0
    found = compute_bias_correction(weight.reshape(stored.shape), means, groups=groups, output_axis=axis)
    return np.asarray(seen * found)


def _scale_dead_channels(params: QuantParams, weight: NDArray[np.float32]) -> QuantParams:
    """Give all-zero channels the largest scale of the others: their bias is stored in steps of s_x * s_w."""
    low, high = group_extremes(weight, params.spec.granularity)
    dead = (low == 0) & (high == 0)
    if params.scale.ndim == 0 or not dead.any() or dead.all():
        return params
    return params.with_scale(np.where(dead, params.scale[~dead].max(), params.scale))


def count_input_channels(layer: LayerPlan) -> int:
    """How many channels the layer reads."""
    weight = constant_array(layer.node.inputs[1])
    assert weight is not None
    if layer.node.op_type == "ConvTranspose":  # its weights have all input channels, but only a group's outputs
        return int(weight.shape[0])
    return int(weight.shape[layer.rule.input_axis] * attribute(layer.node, "group", 1))


def is_depthwise(layer: LayerPlan) -> bool:
    """Whether ONNX Runtime treats the layer as depthwise: a Conv with one channel in and one out in each group."""
    stored = constant_array(layer.node.inputs[1])
    groups = attribute(layer.node, "group", 1)
    return layer.node.op_type == "Conv" and groups > 1 and stored is not None and stored.shape[:2] == (groups, 1)


def _is_accumulated_in_pairs(layer: LayerPlan) -> bool:
    """Whether a kernel that adds products in pairs of 16 bits may run it: any but depthwise and transposed layers."""
    return not layer.blocked and not is_depthwise(layer) and layer.node.op_type != "ConvTranspose"


def find_least_scale(readers: Sequence[WeightReader], target: Target, params: QuantParams) -> NDArray[np.float32]:
    """The least weight scale with which each bias fits into int32: |bias| / (s_x * s_w) <= LARGEST_BIAS_CODE.

    The product s_x * s_w is a normal float32, too. One number, or one a channel; zero where no bias is stored as int32.
    """
    return np.asarray(
        functools.reduce(np.maximum, (_least_scale_of(r.layer, r.source, target, params) for r in readers))
    )


def _least_scale_of(
    layer: LayerPlan, source: LayerInput | None, target: Target, params: QuantParams
) -> NDArray[np.float32]:
    bias = constant_array(input_of(layer.node, 2))
    if source is None or bias is None or not _has_integer_bias(layer, source, target):
        return np.zeros((), np.float32)
    reach = np.abs(bias.astype(np.float64))
    if not isinstance(params.spec.granularity, PerChannel):
        reach = reach.max(initial=0.0)
    needed = np.maximum(reach / LARGEST_BIAS_CODE, 2 * SMALLEST_SCALE) / np.float64(source.params.scale)
    return np.asarray(needed, np.float32)
