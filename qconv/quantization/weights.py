"""One layer's weights and bias become codes, with what the integer kernels demand of them.

The bias is stored as int32 with the exact scale s_x * s_w, and the accumulator starts from it. Where it would not fit,
the weight scale of that channel is widened until it does: weights lose precision there, the bias keeps its value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Sketch
from qconv.config.targets import Target
from qconv.errors import Change, Finding, QconvError, Skipped
from qconv.ir.layers import input_means_of
from qconv.ir.model import attribute, constant_array, input_of
from qconv.planning.plan import LayerPlan
from qconv.quantization import bias as bias_correction
from qconv.quantization import channel_bits, saturation
from qconv.quantization.weight_ranges import WEIGHT_RANGES
from qconv.quantizer import SMALLEST_SCALE, PerChannel, QuantParams, bias_params, group_extremes

# Leaves half of int32 to the sum of products: 2^30 / (255 * 127) inputs a channel is more than any layer has.
LARGEST_BIAS_CODE = 2.0**30

BIAS_FITS = "weight scales widened, so that the bias fits into int32"
"""Kind of what was done to a layer whose bias is too large for its scales."""
CORRECTED = "bias corrected by the means that BatchNormalization says"


@dataclass(slots=True)
class LayerParams:
    """Codes of a layer. bias: what it adds, shape (O,), None where it adds nothing.

    bias_params: how the bias is quantized; None where it stays float.
    """

    layer: LayerPlan
    weight: QuantParams
    codes: NDArray[np.integer]
    bias: NDArray[np.floating] | None = None
    bias_params: QuantParams | None = None

    @property
    def stored(self) -> tuple[QuantParams, NDArray[np.integer]]:
        """Parameters and codes as they go into the file: the same numbers, with zero at code 0 if the layer says so."""
        if not self.layer.moves_zero:
            return self.weight, self.codes
        _, zero = self.weight.spread(self.codes.shape)
        return replace(self.weight, zero_point=np.zeros_like(self.weight.zero_point)), np.asarray(
            self.codes - zero, self.codes.dtype
        )


@dataclass(frozen=True, slots=True)
class Source:
    """What a layer reads: its parameters, and its sketch where it was watched itself."""

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
        """The least and the largest code that there is, for each of `channels` channels."""
        spec = self.params.spec
        return np.full(channels, spec.qmin), np.full(channels, spec.qmax)

    def of(self, channels: int) -> Sketch | None:
        """The sketch, if it is of each of this many channels."""
        return self.sketch if self.sketch is not None and _is_of(self.sketch, channels) else None


def _is_of(sketch: Sketch, channels: int) -> bool:
    return bool(sketch.count) and sketch.lows.size == channels


def quantize_layer(
    layer: LayerPlan,
    source: Source | None,
    calibrator: str,
    target: Target,
    *,
    seen: Sketch | None = None,
    saturation_safe: bool | None = None,
    correction: str = "measured",
) -> tuple[LayerParams, list[Finding]]:
    """Codes and parameters of one layer. source: None where only weights are quantized; calibrator: the weights'.

    seen: what the layer reads, where that was watched.

    saturation_safe: no pair of products overflows 16 bits, whatever the picture (True), or on the calibration pictures
    (None); False: that is no matter. correction: how the bias takes back what rounding does to means, see Recipe.
    """
    weight = float_weight(layer)
    notes: list[Finding] = []
    if layer.own_bits:
        params = channel_bits.of_weights(weight, layer.weight, calibrator)
        notes.append(channel_bits.in_words(layer.node.name or "", "weights", params))
    else:
        params = layer.weight.from_range(*WEIGHT_RANGES[calibrator](weight, layer.weight))
    params, found = fitted(layer, params, weight, source, target, saturation_safe=saturation_safe)
    codes = params.quantize(weight)
    rounded = params.dequantize(codes)
    shift = None
    if correction in ("measured", "sequential") and seen is not None:
        shift = _measured_shift(layer, weight, rounded, seen)
    elif correction == "analytic":
        known = analytic_shift(layer, weight, rounded)
        if isinstance(known, str):
            found.append(Skipped("bias", layer.node.name or "", known))
        else:
            shift = known
            found.append(Change("bias", layer.node.name or "", CORRECTED, CORRECTED))
    return with_bias(layer, params, codes, shifted_bias(layer, shift), source, target), notes + found


def float_weight(layer: LayerPlan) -> NDArray[np.float32]:
    """The layer's weights as its spec sees them. Raises QconvError where they are no numbers."""
    stored = constant_array(layer.node.inputs[1])
    assert stored is not None
    weight = layer.arranged(stored.astype(np.float32, copy=False))
    if not np.isfinite(weight).all():
        name = layer.node.name
        raise QconvError(f"The weights of {name} hold NaN or infinity.", "export the model again, or --keep-float it.")
    return weight


def fitted(
    layer: LayerPlan,
    params: QuantParams,
    weight: NDArray[np.float32],
    source: Source | None,
    target: Target,
    *,
    saturation_safe: bool | None = None,
) -> tuple[QuantParams, list[Finding]]:
    """Parameters with scales as wide as the integer kernels demand; see `quantize_layer`."""
    params = _scale_dead_channels(params, weight)
    if source is None:
        return params, []
    findings: list[Finding] = []
    widened = params.with_scale(np.maximum(params.scale, least_scale(layer, source, target, params)))
    count = int(np.count_nonzero(widened.scale > params.scale))
    if count:
        what = f"weight scale of {count} channels widened, so that the bias fits into int32"
        findings.append(Change("params", layer.node.name or "", what, BIAS_FITS))
        params = widened
    limits = pair_limits(layer, source, target, widest=params.widest, saturation_safe=saturation_safe)
    if limits is not None:
        params = saturation.widen(params, weight, *limits, output_axis=layer.rule.output_axis)
    return params, findings


def pair_limits(
    layer: LayerPlan, source: Source, target: Target, *, widest: int, saturation_safe: bool | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The least and the largest code of each input channel, where pairs of products must fit into 16 bits.

    widest: the most bits that a weight has.
    """
    bits = (source.params.spec.bits, widest)
    if saturation_safe is False or bits != (8, 8) or not target.pairs or not _adds_pairs(layer):
        return None
    channels = input_channels(layer)
    return source.channel_codes(channels) if saturation_safe is None else source.all_codes(channels)


def with_bias(
    layer: LayerPlan,
    params: QuantParams,
    codes: NDArray[np.integer],
    bias: NDArray[np.floating] | None,
    source: Source | None,
    target: Target,
) -> LayerParams:
    """The layer's numbers with a bias (O,) that is stored as the target wants it."""
    if source is None or bias is None or not _has_integer_bias(layer, source, target):
        return LayerParams(layer, params, codes, bias)
    with np.errstate(over="ignore"):
        product = np.multiply(source.params.scale, params.scale, dtype=np.float32)
    return LayerParams(layer, params, codes, bias, bias_params(product))


def _has_integer_bias(layer: LayerPlan, source: Source, target: Target) -> bool:
    """A blocked layer has no one s_w for its bias, and one whose data has a scale for each channel no one s_x.

    Layers of 16 bits run in float as well, but there ONNX Runtime would quantize a float bias by itself, and let it
    overflow.
    """
    return target.integer_bias and not layer.blocked and source.params.scale.ndim == 0


def shifted_bias(layer: LayerPlan, shift: NDArray[np.float64] | None) -> NDArray[np.floating] | None:
    """The layer's bias with a shift (O,), if there is any."""
    bias = constant_array(input_of(layer.node, 2))
    if shift is None:
        return bias
    return (shift if bias is None else bias + shift).astype(np.float32)


def analytic_shift(
    layer: LayerPlan, weight: NDArray[np.float32], rounded: NDArray[np.float32]
) -> NDArray[np.float64] | str:
    """What takes back what rounding does to the means of the outputs, (O,), by BatchNormalization's own numbers.

    Why it is not known, where that is so.
    """
    means = input_means_of(layer.node)
    if layer.node.op_type == "MatMul":
        return "a MatMul has no bias"
    return means if isinstance(means, str) else _on_average(layer, weight - rounded, means)


def _measured_shift(
    layer: LayerPlan, weight: NDArray[np.float32], rounded: NDArray[np.float32], seen: Sketch
) -> NDArray[np.float64] | None:
    """What takes back what rounding does to the means of the outputs, (O,); None where the channels were not watched.

    What clipping does to the inputs' means is left alone: few places are clipped, where the network behind makes little
    of the rest, and to lift all others for them only loses.
    """
    watched = _is_of(seen, input_channels(layer))
    return _on_average(layer, weight - rounded, seen.means) if watched else None


def _on_average(layer: LayerPlan, weight: NDArray[np.float32], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """What such weights make of such means, (O,). weight: in the layer's own shape; means: of its inputs, (I,)."""
    stored = constant_array(layer.node.inputs[1])
    assert stored is not None
    groups, axis = attribute(layer.node, "group", 1), layer.rule.output_axis
    seen = 1 / np.prod(attribute(layer.node, "strides", [1])) if layer.node.op_type == "ConvTranspose" else 1.0
    found = bias_correction.correction(weight.reshape(stored.shape), means, groups=groups, output_axis=axis)
    return np.asarray(seen * found)


def _scale_dead_channels(params: QuantParams, weight: NDArray[np.float32]) -> QuantParams:
    """An all-zero channel takes the largest scale of the others: its bias is stored in steps of s_x * s_w."""
    low, high = group_extremes(weight, params.spec.granularity)
    dead = (low == 0) & (high == 0)
    if params.scale.ndim == 0 or not dead.any() or dead.all():
        return params
    return params.with_scale(np.where(dead, params.scale[~dead].max(), params.scale))


def input_channels(layer: LayerPlan) -> int:
    """How many channels the layer reads."""
    weight = constant_array(layer.node.inputs[1])
    assert weight is not None
    if layer.node.op_type == "ConvTranspose":  # its weights have all input channels, but only a group's outputs
        return int(weight.shape[0])
    return int(weight.shape[layer.rule.input_axis] * attribute(layer.node, "group", 1))


def is_depthwise(layer: LayerPlan) -> bool:
    """Whether it is, to ONNX Runtime: a Conv of one channel in and one channel out in each group."""
    stored = constant_array(layer.node.inputs[1])
    groups = attribute(layer.node, "group", 1)
    return layer.node.op_type == "Conv" and groups > 1 and stored is not None and stored.shape[:2] == (groups, 1)


def _adds_pairs(layer: LayerPlan) -> bool:
    """Whether a kernel that adds products in pairs of 16 bits may run it: any but depthwise and transposed layers."""
    return not layer.blocked and not is_depthwise(layer) and layer.node.op_type != "ConvTranspose"


def least_scale(layer: LayerPlan, source: Source | None, target: Target, params: QuantParams) -> NDArray[np.float32]:
    """Of weights with such parameters, so that |bias| / (s_x * s_w) fits and the product is a normal float32.

    One number, or one a channel; zero where no bias is stored like that.
    """
    bias = constant_array(input_of(layer.node, 2))
    if source is None or bias is None or not _has_integer_bias(layer, source, target):
        return np.zeros((), np.float32)
    reach = np.abs(bias.astype(np.float64))
    if not isinstance(params.spec.granularity, PerChannel):
        reach = reach.max(initial=0.0)
    needed = np.maximum(reach / LARGEST_BIAS_CODE, 2 * SMALLEST_SCALE) / np.float64(source.params.scale)
    return np.asarray(needed, np.float32)
