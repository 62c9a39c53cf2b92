"""One layer's weights and bias become codes, with what the integer kernels demand of them.

The bias is stored as int32 with the exact scale s_x * s_w, and the accumulator starts from it. Where it would not fit,
the weight scale of that channel is widened until it does: weights lose precision there, the bias keeps its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv import bias as bias_correction
from qconv import channel_bits, saturation
from qconv.errors import QconvError
from qconv.findings import Change, Finding
from qconv.graph import array, attribute, input_of
from qconv.plan import Layer
from qconv.quant import SMALLEST_SCALE, PerChannel, QuantParams, bias_params, extremes
from qconv.readers import mean_shift
from qconv.sketch import Sketch
from qconv.targets import Target
from qconv.weight_ranges import WEIGHT_RANGES

# Leaves half of int32 to the sum of products: 2^30 / (255 * 127) inputs a channel is more than any layer has.
LARGEST_BIAS_CODE = 2.0**30


@dataclass(slots=True)
class LayerParams:
    """Codes of a layer. bias: what it adds, shape (O,), None where it adds nothing.

    bias_params: how the bias is quantized; None where it stays float.
    """

    layer: Layer
    weight: QuantParams
    codes: NDArray[np.integer]
    bias: NDArray[np.floating] | None = None
    bias_params: QuantParams | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What a layer reads: its parameters, and its sketch where it was watched itself."""

    params: QuantParams
    sketch: Sketch | None
    clips: bool = False

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
        found = self.sketch
        return found if found is not None and found.count and found.lows.size == channels else None


def quantize_layer(
    layer: Layer,
    source: Source | None,
    calibrator: str,
    target: Target,
    *,
    saturation_safe: bool | None = None,
    corrected: bool = True,
) -> tuple[LayerParams, list[Finding]]:
    """Codes and parameters of one layer. source: None where only weights are quantized; calibrator: the weights'.

    saturation_safe: no pair of products overflows 16 bits, whatever the picture (True), or on the calibration pictures
    (None); False: that is no matter. corrected: the bias takes back what rounding does to means.
    """
    stored = array(layer.node.inputs[1])
    assert stored is not None
    weight = layer.arranged(stored.astype(np.float32, copy=False))
    if not np.isfinite(weight).all():
        name = layer.node.name
        raise QconvError(f"The weights of {name} hold NaN or infinity.", "export the model again, or --keep-float it.")
    findings: list[Finding] = []
    if layer.own_bits:
        params = channel_bits.of_weights(weight, layer.weight, calibrator)
        findings.append(channel_bits.in_words(layer.node.name or "", "weights", params))
    else:
        params = layer.weight.from_range(*WEIGHT_RANGES[calibrator](weight, layer.weight))
    params = _scale_dead_channels(params, weight)
    bias = array(input_of(layer.node, 2))
    if source is None:
        return LayerParams(layer, params, params.quantize(weight), bias), findings

    channels = _input_channels(layer, stored)
    # A blocked layer has no one s_w for its bias, and one whose data has a scale for each channel no one s_x. Layers of
    # 16 bits run in float as well, but there ONNX Runtime would quantize a float bias by itself, and let it overflow.
    quantized_bias = target.integer_bias and not layer.blocked and source.params.scale.ndim == 0
    if bias is not None and quantized_bias:
        widened = _fit_bias(params, source.params, bias)
        count = int(np.count_nonzero(widened.scale > params.scale))
        if count:
            what = f"weight scale of {count} channels widened, so that the bias fits into int32"
            findings.append(Change("params", layer.node.name or "", what))
        params = widened
    paired = target.pairs and params.widest == 8 and _adds_pairs(layer, weight)
    if saturation_safe is not False and source.params.spec.bits == 8 and paired:
        limits = source.channel_codes(channels) if saturation_safe is None else source.all_codes(channels)
        params = saturation.widen(params, weight, *limits, output_axis=layer.rule.output_axis)
    codes = params.quantize(weight)
    sketch = source.of(channels)
    if sketch is not None and corrected:
        error = params.dequantize(codes)
        error = np.subtract(weight, error, out=error).reshape(stored.shape)
        groups = attribute(layer.node, "group", 1)
        axis = layer.rule.output_axis
        seen = 1 / np.prod(attribute(layer.node, "strides", [1])) if layer.node.op_type == "ConvTranspose" else 1.0
        shift = seen * bias_correction.correction(error, sketch.means, groups=groups, output_axis=axis)
        if sketch.columns.size and source.clips:
            moved = mean_shift(sketch.columns.reshape(-1, channels), source.params)
            shift -= seen * bias_correction.correction(
                (weight.reshape(stored.shape) - error), moved, groups=groups, output_axis=axis
            )
        bias = (shift if bias is None else bias + shift).astype(np.float32)
    if bias is None or not quantized_bias:
        return LayerParams(layer, params, codes, bias), findings
    with np.errstate(over="ignore"):
        product = np.multiply(source.params.scale, params.scale, dtype=np.float32)
    return LayerParams(layer, params, codes, bias, bias_params(product)), findings


def _scale_dead_channels(params: QuantParams, weight: NDArray[np.float32]) -> QuantParams:
    """An all-zero channel takes the largest scale of the others: its bias is stored in steps of s_x * s_w."""
    low, high = extremes(weight, params.spec.granularity)
    dead = (low == 0) & (high == 0)
    if params.scale.ndim == 0 or not dead.any() or dead.all():
        return params
    return params.with_scale(np.where(dead, params.scale[~dead].max(), params.scale))


def _input_channels(layer: Layer, weight: NDArray[np.floating]) -> int:
    if layer.node.op_type == "ConvTranspose":  # its weights have all input channels, but only a group's outputs
        return int(weight.shape[0])
    return int(weight.shape[layer.rule.input_axis] * attribute(layer.node, "group", 1))


def _adds_pairs(layer: Layer, weight: NDArray[np.float32]) -> bool:
    """Whether a kernel that adds products in pairs of 16 bits may run it: any layer but depthwise and transposed ones.

    Depthwise to ONNX Runtime is a Conv of one channel in and one channel out in each group.
    """
    groups = attribute(layer.node, "group", 1)
    depthwise = layer.node.op_type == "Conv" and groups > 1 and weight.shape[:2] == (groups, 1)
    turned = layer.node.op_type == "ConvTranspose"
    return not layer.blocked and not depthwise and not turned


def _fit_bias(params: QuantParams, data: QuantParams, bias: NDArray[np.floating]) -> QuantParams:
    """Widen weight scales until |bias| / (s_x * s_w) fits and the product is a normal float32."""
    reach = np.abs(bias.astype(np.float64))
    if not isinstance(params.spec.granularity, PerChannel):
        reach = reach.max(initial=0.0)
    needed = np.maximum(reach / LARGEST_BIAS_CODE, 2 * SMALLEST_SCALE) / np.float64(data.scale)
    return params.with_scale(np.maximum(params.scale, needed.astype(np.float32)))
