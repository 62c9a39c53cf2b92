"""This module chooses scales and zero points for every tensor of a plan from calibration sketches.

It also lists the quantized tensors as rows of the report: activations in graph order, then weights and biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from qconv.calibration.range_estimators import CALIBRATORS, CalibrationHints, Range
from qconv.calibration.sketch import Sketch, SketchContents
from qconv.config.choices import FEW_BITS_CALIBRATOR, PERCENTILE
from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding
from qconv.ir import layers
from qconv.ir.model import Node, Value, clip_bounds, constant_array, input_of
from qconv.ir.operators import QUANTIZATION_RULES, ConcatRule, operator
from qconv.planning.plan import DisjointSets, LayerPlan, Plan, count_channels, data_inputs
from qconv.planning.widths import COPY
from qconv.quantization import weight_ranges
from qconv.quantization.layer import LayerInput, LayerParams, WeightReader, quantize_readers
from qconv.quantizer import PerBlock, PerChannel, QuantParams, QuantSpec
from qconv.results.quantize import TensorRow

LARGEST_MULTIPLIER = 200.0

MOST_WIDENED_TO_JOIN = 1.25
"""How much larger steps may become so that a Concat copies codes.

To round codes anew adds step^2 / 12 to the noise of what the Concat reads, at each of a chain of them; larger steps add
(1.25^2 - 1) step^2 / 12 once.
"""

NO_SET_RANGES: Mapping[str, Range] = MappingProxyType({})


@dataclass(slots=True)
class Params:
    """Scales and zero points for every decision of a Plan. sources: quantized inputs of layers."""

    activations: dict[Value, QuantParams] = field(default_factory=dict)
    constants: dict[Value, QuantParams] = field(default_factory=dict)
    layers: list[LayerParams] = field(default_factory=list)
    sources: dict[Node, LayerInput] = field(default_factory=dict)


def choose_params(
    plan: Plan, sketches: Mapping[str, Sketch], recipe: Recipe, set_ranges: Mapping[str, Range] = NO_SET_RANGES
) -> tuple[Params, list[Finding]]:
    """Choose parameters of all tensors of a plan. sketches: by tensor; set_ranges: in place of the calibrator's."""
    params, findings = choose_activation_params(plan, sketches, recipe, set_ranges)
    findings += _choose_layer_params(plan, params, sketches, recipe)
    return params, findings


def choose_activation_params(
    plan: Plan, sketches: Mapping[str, Sketch], recipe: Recipe, set_ranges: Mapping[str, Range] = NO_SET_RANGES
) -> tuple[Params, list[Finding]]:
    """Choose parameters of activations and constants, not of layers; see `choose_params`."""
    params = Params()
    ranges = choose_ranges(plan, sketches, recipe, set_ranges)
    findings = _clip_at_gates(plan, ranges)
    findings += _share_joined_ranges(plan, ranges)
    _widen_average_ranges(plan, ranges)
    _hold_what_copies_read(plan, ranges)
    for value, (low, high) in ranges.items():
        params.activations[value] = plan.given.get(value) or _activation_spec(plan, value).from_range(low, high)
    for value in plan.by_channel():
        name = value.name or ""
        clips = recipe.calibrator == "aciq"
        chosen = weight_ranges.make_activation_channel_params(
            sketches[name], _activation_spec(plan, value), count_channels(value), clips=clips
        )
        params.activations[value] = chosen
        findings.append(weight_ranges.describe_channel_bits(name, "activations", chosen))
    for value, spec in plan.constants.items():
        numbers = constant_array(value)
        assert numbers is not None
        params.constants[value] = spec.from_range(numbers.min(initial=0), numbers.max(initial=0))
    return params, findings


def carry_over_params(params: Params, plan: Plan) -> Params:
    """The same parameters for the plan of a copy of the model. Tensors and layers are matched by name."""
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


def _choose_layer_params(plan: Plan, params: Params, sketches: Mapping[str, Sketch], recipe: Recipe) -> list[Finding]:
    found: dict[Node, tuple[LayerParams, list[Finding]]] = {}
    for alike in plan.layers_by_weight():
        readers = [WeightReader(layer, find_layer_input(layer, params, sketches)) for layer in alike]
        params.sources |= {reader.layer.node: reader.source for reader in readers if reader.source is not None}
        quantized = quantize_readers(
            readers,
            recipe.weight_calibrator,
            plan.target,
            seen=[find_layer_sketch(layer, sketches) for layer in alike],
            saturation_safe=recipe.saturation_safe,
            correction=recipe.bias_correction,
        )
        found |= {layer.node: chosen for layer, chosen in zip(alike, quantized, strict=True)}
    params.layers += [found[layer.node][0] for layer in plan.layers]
    return [note for layer in plan.layers for note in found[layer.node][1]]


def find_layer_input(layer: LayerPlan, params: Params, sketches: Mapping[str, Sketch]) -> LayerInput | None:
    """The quantized input of a layer; None where it stays float."""
    if layer.data is None:
        return None
    return LayerInput(params.activations[layer.data], find_layer_sketch(layer, sketches))


def find_layer_sketch(layer: LayerPlan, sketches: Mapping[str, Sketch]) -> Sketch | None:
    """The sketch of a layer's input, with channels along axis 1; None for a MatMul, which does not sum over these."""
    value = layer.node.inputs[0]
    return None if value is None or layer.node.op_type == "MatMul" else sketches.get(value.name or "")


def choose_ranges(
    plan: Plan,
    sketches: Mapping[str, Sketch],
    recipe: Recipe,
    set_ranges: Mapping[str, Range] = NO_SET_RANGES,
    *,
    calibrator_name: str | None = None,
) -> dict[Value, Range]:
    """The range of every quantized tensor; tied ones share the union of theirs, unless they are set.

    calibrator_name: in place of the recipe's.
    """
    calibrator = CALIBRATORS[calibrator_name or recipe.calibrator]
    readers = _find_channel_summing_layers(plan) if SketchContents.COLUMNS in calibrator.want else {}
    own: dict[Value, Range] = {}
    for value in plan.activations:
        sketch = sketches.get(value.name or "")
        if sketch is not None and value.name not in set_ranges:
            hints = CalibrationHints(
                recipe.percentile or PERCENTILE, readers.get(value, ()), is_input=value.is_graph_input()
            )
            # a logit that is clipped is an object that is lost, however rare it is
            whole = value in plan.head and recipe.calibrator == FEW_BITS_CALIBRATOR
            chosen = CALIBRATORS["minmax"] if whole else calibrator
            own[value] = chosen.find(sketch, _activation_spec(plan, value), hints)
    ranges = {}
    for value, group in plan.group_of().items():
        if value in plan.given:
            low, high = plan.given[value].code_range()
            ranges[value] = float(low), float(high)
            continue
        if (known := set_ranges.get(value.name or "")) is not None:
            ranges[value] = known
            continue
        lows, highs = zip(*(own[member] for member in group if member in own), strict=True)
        ranges[value] = min(lows), max(highs)
    return ranges


def _find_channel_summing_layers(plan: Plan) -> dict[Value, list[layers.Layer]]:
    """The layers that sum over the channels of each tensor."""
    found: dict[Value, list[layers.Layer]] = {}
    for layer in plan.layers:
        if layer.data is not None and layer.node.op_type != "MatMul":
            found.setdefault(layer.data, []).append(layers.read_layer(layer.node))
    return found


def _clip_at_gates(plan: Plan, ranges: dict[Value, Range]) -> list[Finding]:
    """Cut ranges where the activation behind (SiLU, HardSwish) makes the rest zero, see `ActivationGate`."""
    findings: list[Finding] = []
    for value, gate in plan.gates.items():
        if gate.product not in ranges:
            continue
        step = float(_activation_spec(plan, gate.product).from_range(*ranges[gate.product]).scale)
        (low, high), floor = ranges[value], gate.floor(step)
        if low < floor:
            ranges[value] = floor, high
            what = f"range ends at {floor:.3g} instead of {low:.3g}: the activation behind it makes the rest zero"
            findings.append(Change("params", value.name or "", what, "range ends where the activation behind is zero"))
    return findings


def _share_joined_ranges(plan: Plan, ranges: dict[Value, Range]) -> list[Finding]:
    """Give what a Concat reads and writes one range where theirs are near, so that it copies codes.

    `Plan.ties` has the inputs that nothing else reads. Where one has other readers, its range counts for these, too.
    """
    groups, joined = plan.group_of(), DisjointSets[Value]()
    bounds = _bounds_of_absorbed(plan, groups)
    # given, or with a range that was set for one of them alone
    fixed = {g[0] for g in groups.values() if any(one in plan.given or ranges[one] != ranges[g[0]] for one in g)}
    least: dict[Value, float] = {}  # the smallest step that a member of each set had
    for result, value in _joined_pairs(plan):
        roots = [joined.root(groups[one][0]) for one in (result, value)]
        if roots[0] == roots[1] or not fixed.isdisjoint((groups[result][0], groups[value][0])):
            continue
        ends = [ranges[root] for root in roots]
        union = min(low for low, _ in ends), max(high for _, high in ends)
        if any(_contains(bounds[root], ranges[root]) and not _contains(bounds[root], union) for root in roots):
            continue
        spec = _activation_spec(plan, result)
        smallest = min(least.get(root, float(spec.from_range(*ranges[root]).scale)) for root in roots)
        if float(spec.from_range(*union).scale) <= MOST_WIDENED_TO_JOIN * smallest:
            within = [max(bounds[root][0] for root in roots), min(bounds[root][1] for root in roots)]
            joined.union(*roots)
            root = joined.root(roots[0])
            ranges[root], least[root], bounds[root] = union, smallest, (within[0], within[1])
    for value, group in groups.items():
        root = joined.root(group[0])
        if root in least:  # others keep what they have
            ranges[value] = ranges[root]
    roots_of: dict[Value, set[Value]] = {}
    for result, value in _joined_pairs(plan):
        roots_of.setdefault(result, set()).update(joined.root(groups[one][0]) for one in (result, value))
    what = "a Concat copies codes: what it joins has near ranges, which became one"
    return [
        Change("params", result.name or "", what)
        for result, roots in roots_of.items()
        if len(roots) == 1 and not roots.isdisjoint(least)
    ]


def _joined_pairs(plan: Plan) -> Iterator[tuple[Value, Value]]:
    """What each Concat on codes writes, with each of the tensors of the same type that it reads."""
    for result in plan.activations:
        node = result.producer()
        rule = None if node is None else QUANTIZATION_RULES.get(node.op_type)
        if node is not None and node in plan.integer and isinstance(rule, ConcatRule):
            for value in data_inputs(node, rule):
                if value in plan.activations and _activation_spec(plan, value) == _activation_spec(plan, result):
                    yield result, value


def _bounds_of_absorbed(plan: Plan, groups: Mapping[Value, tuple[Value, ...]]) -> dict[Value, Range]:
    """What the range of each group, by its first tensor, must not leave, so that its quantizers do what Clips do."""
    found = {group[0]: (-math.inf, math.inf) for group in groups.values()}
    for activation in plan.absorbed:
        group, own = groups.get(activation.outputs[0]), clip_bounds(activation)
        if group is not None and own is not None:
            low, high = found[group[0]]
            found[group[0]] = max(low, own[0]), min(high, own[1])
    return found


def _contains(outer: Range, inner: Range) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _widen_average_ranges(plan: Plan, ranges: dict[Value, Range]) -> None:
    """Widen the ranges of averages that are tiny beside what they are taken of, as positive and negative cancel.

    ONNX Runtime multiplies by s_x / (s_y * count) and refuses to run from 256 on.
    """
    groups = plan.group_of()
    absorbed = {node: activation for activation, node in plan.absorbed.items()}
    for node in plan.integer:
        source, result = node.inputs[0], absorbed.get(node, node).outputs[0]
        if not operator(node.op_type).averages or source not in ranges or result not in ranges:
            continue
        steps = [float(_activation_spec(plan, value).from_range(*ranges[value]).scale) for value in (source, result)]
        factor = steps[0] / (LARGEST_MULTIPLIER * steps[1])
        if factor > 1:
            for value in groups[result]:
                low, high = ranges[value]
                ranges[value] = low * factor, high * factor


def _hold_what_copies_read(plan: Plan, ranges: dict[Value, Range]) -> None:
    """Let the range of a copy with more bits hold all that has a code in what it is of, so that it loses nothing."""
    groups = plan.group_of()
    for value in plan.activations:
        maker = value.producer()
        source = None if maker is None or maker.op_type != COPY else maker.inputs[0]
        if source not in ranges or _activation_spec(plan, value).bits <= _activation_spec(plan, source).bits:
            continue
        known = plan.given.get(source) or _activation_spec(plan, source).from_range(*ranges[source])
        low, high = map(float, known.code_range())
        for member in groups[value]:
            ranges[member] = min(ranges[member][0], low), max(ranges[member][1], high)


def _activation_spec(plan: Plan, value: Value) -> QuantSpec:
    spec = plan.activations[value].spec
    assert spec is not None
    return spec


def make_tensor_rows(plan: Plan, params: Params) -> list[TensorRow]:
    """A row for every quantized tensor: activations in graph order, then weights and biases layer by layer."""
    rows = []
    for value, chosen in params.activations.items():
        rows.append(_make_row(_name_of(value), "activation", chosen, plan.activations[value].why))
    for layer in params.layers:
        node = layer.layer.node
        rows.append(_make_row(_name_of(node.inputs[1]), "weight", layer.stored[0], f"weights of {node.name}"))
        if layer.bias_params is not None:
            name = _name_of(input_of(node, 2)) or f"{node.name}_bias"
            rows.append(_make_row(name, "bias", layer.bias_params, f"bias of {node.name}, scale s_x * s_w"))
    return rows


def _name_of(value: Value | None) -> str:
    return "" if value is None else value.name or ""


def _make_row(name: str, kind: str, chosen: QuantParams, why: str) -> TensorRow:
    spec = chosen.spec
    granularity = {PerChannel: "per-channel", PerBlock: "per-block"}.get(type(spec.granularity), "per-tensor")
    scale, zero = (np.asarray(numbers).tolist() for numbers in (chosen.scale, chosen.zero_point))
    bits = spec.bits if chosen.bits is None else chosen.bits.tolist()
    return TensorRow(name, kind, bits, spec.symmetric, granularity, scale, zero, why)
