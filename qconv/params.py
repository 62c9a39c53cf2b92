"""From ranges and weights to scales and zero points, with what the integer kernels demand of them.

A bias is stored as int32 with the exact scale s_x * s_w, and the accumulator starts from it. Where it would not fit, the
weight scale of that channel is widened until it does: weights lose precision there, the bias keeps its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qconv import saturation
from qconv.findings import Change, Finding
from qconv.graph import Value, array, attribute, input_of
from qconv.plan import Layer, Plan
from qconv.quant import SMALLEST_SCALE, PerChannel, QuantParams, bias_params, extremes

# Leaves half of int32 to the sum of products: 2^30 / (255 * 127) inputs a channel is more than any layer has.
LARGEST_BIAS_CODE = 2.0**30
LARGEST_INT32 = 2.0**31 - 256  # a little less: the scale is rounded to float32


@dataclass(slots=True)
class LayerParams:
    """Codes of a layer. bias: None where the layer has none or keeps it in float."""

    layer: Layer
    weight: QuantParams
    codes: NDArray[np.integer]
    bias: QuantParams | None = None


@dataclass(slots=True)
class Params:
    """Numbers for every decision of a Plan."""

    activations: dict[Value, QuantParams] = field(default_factory=dict)
    constants: dict[Value, QuantParams] = field(default_factory=dict)
    layers: list[LayerParams] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Range:
    """Where a tensor's values lie: the range a calibrator chose, and the extremes of each channel, shape (C,)."""

    low: float
    high: float
    lows: NDArray[np.float32]
    highs: NDArray[np.float32]


def choose_params(plan: Plan, ranges: Mapping[str, Range]) -> tuple[Params, list[Finding]]:
    """Parameters for all tensors of the plan, from ranges by tensor name; tied tensors get their union."""
    params, findings = Params(), []
    for value, group in plan.group_of().items():
        spec = plan.activations[value].spec
        assert spec is not None
        found = [ranges[member.name or ""] for member in group if member.name in ranges]
        params.activations[value] = spec.from_range(min(r.low for r in found), max(r.high for r in found))
    for value, spec in plan.constants.items():
        numbers = array(value)
        assert numbers is not None
        params.constants[value] = spec.from_range(numbers.min(initial=0), numbers.max(initial=0))
    for layer in plan.layers:
        source = None
        if layer.data is not None:
            source = _Source(params.activations[layer.data], ranges.get(layer.data.name or ""))
        chosen, notes = _layer_params(layer, source)
        params.layers.append(chosen)
        findings += notes
    return params, findings


@dataclass(frozen=True, slots=True)
class _Source:
    """What a layer reads: its parameters and, where it was watched itself, its range."""

    params: QuantParams
    range: Range | None

    def channel_codes(self, channels: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The least and the largest code of each of `channels` channels on the calibration pictures."""
        if self.range is None or self.range.lows.size != channels:
            spec = self.params.spec
            return np.full(channels, spec.qmin), np.full(channels, spec.qmax)
        low, high = self.params.quantize(self.range.lows), self.params.quantize(self.range.highs)
        return low.astype(np.int64), high.astype(np.int64)


def _layer_params(layer: Layer, source: _Source | None) -> tuple[LayerParams, list[Finding]]:
    data = None if source is None else source.params
    weight = array(layer.node.inputs[1])
    assert weight is not None
    arranged = layer.arranged(weight.astype(np.float32))
    params = layer.weight.from_range(*extremes(arranged, layer.weight.granularity))
    params = _scale_dead_channels(params, arranged)
    bias = array(input_of(layer.node, 2))
    findings: list[Finding] = []
    if source is not None and source.params.spec.bits == 8 and _saturates_in_pairs(layer, arranged):
        low, high = source.channel_codes(_input_channels(layer, arranged))
        params = saturation.widen(params, arranged, low, high, output_axis=layer.rule.output_axis)
    bias_quantizer = None
    # 16-bit layers run in float, and would be served by a float bias, if ONNX Runtime did not quantize it by itself
    if bias is not None and data is not None and not layer.blocked:
        widened = _fit_bias(params, data, bias)
        count = int(np.count_nonzero(widened.scale > params.scale))
        if count:
            what = f"weight scale of {count} channels widened, so that the bias fits into int32"
            findings.append(Change("params", layer.node.name or "", what))
        params = widened
        bias_quantizer = bias_params((data.scale * params.scale).astype(np.float32))
    return LayerParams(layer, params, params.quantize(arranged), bias_quantizer), findings


def _scale_dead_channels(params: QuantParams, weight: NDArray[np.float32]) -> QuantParams:
    """An all-zero channel takes the largest scale of the others: its bias is stored in steps of s_x * s_w."""
    low, high = extremes(weight, params.spec.granularity)
    dead = (low == 0) & (high == 0)
    if params.scale.ndim == 0 or not dead.any() or dead.all():
        return params
    return params.with_scale(np.where(dead, params.scale[~dead].max(), params.scale))


def _input_channels(layer: Layer, weight: NDArray[np.float32]) -> int:
    return int(weight.shape[layer.rule.input_axis] * attribute(layer.node, "group", 1))


def _saturates_in_pairs(layer: Layer, weight: NDArray[np.float32]) -> bool:
    """Whether a kernel that adds products in pairs of 16 bits may run this layer: any but a depthwise one."""
    per_channel = isinstance(layer.weight.granularity, PerChannel)
    return per_channel and 7 < layer.weight.bits <= 8 and (weight.ndim == 2 or weight.shape[1] > 1)


def _fit_bias(params: QuantParams, data: QuantParams, bias: NDArray[np.floating]) -> QuantParams:
    """Widen weight scales until |bias| / (s_x * s_w) fits and the product is a normal float32."""
    limit = LARGEST_BIAS_CODE if data.spec.bits <= 8 and params.spec.bits <= 8 else LARGEST_INT32
    reach = np.abs(bias.astype(np.float64))
    if not isinstance(params.spec.granularity, PerChannel):
        reach = reach.max(initial=0.0)
    needed = np.maximum(reach / limit, 2 * SMALLEST_SCALE) / np.float64(data.scale)
    return params.with_scale(np.maximum(params.scale, needed.astype(np.float32)))
