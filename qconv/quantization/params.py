"""From sketches to scales and zero points for every decision of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qconv.calibration.range_estimators import CALIBRATORS, CalibrationHints, Range
from qconv.calibration.sketch import Sketch, SketchContents
from qconv.config.choices import PERCENTILE
from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding
from qconv.ir import layers
from qconv.ir.model import Node, Value, constant_array
from qconv.planning.plan import LayerPlan, Plan, count_channels
from qconv.quantization import channel_bits
from qconv.quantization.weights import LayerParams, Source, quantize_layer
from qconv.quantizer import QuantParams, QuantSpec

LARGEST_MULTIPLIER = 200.0
NO_FACTORS: Mapping[str, float] = MappingProxyType({})


@dataclass(slots=True)
class Params:
    """Numbers for every decision of a Plan. sources: what layers read, where that is quantized."""

    activations: dict[Value, QuantParams] = field(default_factory=dict)
    constants: dict[Value, QuantParams] = field(default_factory=dict)
    layers: list[LayerParams] = field(default_factory=list)
    sources: dict[Node, Source] = field(default_factory=dict)


def choose_params(
    plan: Plan, sketches: Mapping[str, Sketch], recipe: Recipe, factors: Mapping[str, float] = NO_FACTORS
) -> tuple[Params, list[Finding]]:
    """Parameters for all tensors of the plan. sketches: of every watched tensor, factors: on ranges, by their names."""
    params, findings = choose_activations(plan, sketches, recipe, factors)
    findings += _choose_layers(plan, params, sketches, recipe)
    return params, findings


def choose_activations(
    plan: Plan, sketches: Mapping[str, Sketch], recipe: Recipe, factors: Mapping[str, float] = NO_FACTORS
) -> tuple[Params, list[Finding]]:
    """The same without the layers."""
    params = Params()
    ranges = _ranges(plan, sketches, recipe)
    for value, (low, high) in ranges.items():
        factor = factors.get(value.name or "", 1.0)
        ranges[value] = low * factor, high * factor
    findings = _end_at_gates(plan, ranges)
    _widen_means(plan, ranges)
    for value, (low, high) in ranges.items():
        params.activations[value] = plan.given.get(value) or _spec(plan, value).from_range(low, high)
    for value in plan.by_channel():
        name = value.name or ""
        clips = recipe.calibrator == "aciq"
        chosen = channel_bits.of_activations(sketches[name], _spec(plan, value), count_channels(value), clips=clips)
        params.activations[value] = chosen
        findings.append(channel_bits.in_words(name, "activations", chosen))
    for value, spec in plan.constants.items():
        numbers = constant_array(value)
        assert numbers is not None
        params.constants[value] = spec.from_range(numbers.min(initial=0), numbers.max(initial=0))
    return params, findings


def carried_over(params: Params, plan: Plan) -> Params:
    """The same numbers for the plan of a copy of the model: tensors and layers are known by their names."""
    activations, constants = (
        {value.name: found for value, found in known.items()} for known in (params.activations, params.constants)
    )
    layers = {layer.node.name: layer for layer in plan.layers}
    return Params(
        {value: activations[value.name] for value in plan.activations},
        {value: constants[value.name] for value in plan.constants},
        [replace(chosen, layer=layers[chosen.layer.node.name]) for chosen in params.layers],
        {layers[node.name].node: source for node, source in params.sources.items()},
    )


def _choose_layers(plan: Plan, params: Params, sketches: Mapping[str, Sketch], recipe: Recipe) -> list[Finding]:
    findings: list[Finding] = []
    for layer in plan.layers:
        source = source_of(layer, params, sketches)
        if source is not None:
            params.sources[layer.node] = source
        quantized, notes = quantize_layer(
            layer,
            source,
            recipe.weight_calibrator,
            plan.target,
            seen=sketch_of(layer, sketches),
            saturation_safe=recipe.saturation_safe,
            correction=recipe.bias_correction,
        )
        params.layers.append(quantized)
        findings += notes
    return findings


def source_of(layer: LayerPlan, params: Params, sketches: Mapping[str, Sketch]) -> Source | None:
    """What a layer reads; None where that stays float."""
    if layer.data is None:
        return None
    return Source(params.activations[layer.data], sketch_of(layer, sketches))


def sketch_of(layer: LayerPlan, sketches: Mapping[str, Sketch]) -> Sketch | None:
    """Of what a layer reads, channels along axis 1, which a MatMul does not sum over."""
    value = layer.node.inputs[0]
    return None if value is None or layer.node.op_type == "MatMul" else sketches.get(value.name or "")


def _ranges(plan: Plan, sketches: Mapping[str, Sketch], recipe: Recipe) -> dict[Value, Range]:
    """The range of every quantized tensor; tied ones share the union of theirs."""
    calibrator = CALIBRATORS[recipe.calibrator]
    readers = _readers(plan) if SketchContents.COLUMNS in calibrator.want else {}
    own: dict[Value, Range] = {}
    for value in plan.activations:
        sketch = sketches.get(value.name or "")
        if sketch is not None:
            hints = CalibrationHints(
                recipe.percentile or PERCENTILE, readers.get(value, ()), is_input=value.is_graph_input()
            )
            own[value] = calibrator.choose(sketch, _spec(plan, value), hints)
    ranges = {}
    for value, group in plan.group_of().items():
        if value in plan.given:
            low, high = plan.given[value].code_range()
            ranges[value] = float(low), float(high)
            continue
        lows, highs = zip(*(own[member] for member in group if member in own), strict=True)
        ranges[value] = min(lows), max(highs)
    return ranges


def _readers(plan: Plan) -> dict[Value, list[layers.Layer]]:
    """The layers that sum over the channels of each tensor."""
    found: dict[Value, list[layers.Layer]] = {}
    for layer in plan.layers:
        if layer.data is not None and layer.node.op_type != "MatMul":
            found.setdefault(layer.data, []).append(layers.read_layer(layer.node))
    return found


def _end_at_gates(plan: Plan, ranges: dict[Value, Range]) -> list[Finding]:
    """Give no codes to what the activation behind a tensor makes zero."""
    findings: list[Finding] = []
    for value, gate in plan.gates.items():
        if gate.product not in ranges:
            continue
        step = float(_spec(plan, gate.product).from_range(*ranges[gate.product]).scale)
        (low, high), floor = ranges[value], gate.floor(step)
        if low < floor:
            ranges[value] = floor, high
            what = f"range ends at {floor:.3g} instead of {low:.3g}: the activation behind it makes the rest zero"
            findings.append(Change("params", value.name or "", what, "range ends where the activation behind is zero"))
    return findings


def _widen_means(plan: Plan, ranges: dict[Value, Range]) -> None:
    """Where positive and negative cancel, a mean can be tiny beside what it is taken of.

    ONNX Runtime multiplies by s_x / (s_y * count) and refuses to run from 256 on.
    """
    groups = plan.group_of()
    absorbed = {node: activation for activation, node in plan.absorbed.items()}
    for node in plan.integer:
        source, result = node.inputs[0], absorbed.get(node, node).outputs[0]
        if node.op_type not in ("GlobalAveragePool", "AveragePool") or source not in ranges or result not in ranges:
            continue
        steps = [float(_spec(plan, value).from_range(*ranges[value]).scale) for value in (source, result)]
        factor = steps[0] / (LARGEST_MULTIPLIER * steps[1])
        if factor > 1:
            for value in groups[result]:
                low, high = ranges[value]
                ranges[value] = low * factor, high * factor


def _spec(plan: Plan, value: Value) -> QuantSpec:
    spec = plan.activations[value].spec
    assert spec is not None
    return spec
