"""The planner decides from the graph alone which tensors are quantized, how, and why the others stay float.

Layers with weights run in integers; operators between them follow where that avoids conversions. A Relu or Clip that
is the only reader of a layer is absorbed: the quantizer behind the layer saturates at the same bounds. Every tensor
carries the reason for the decision. No calibration data is needed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Set

from qconv.config.choices import FLOAT_BITS, WIDE_BITS, Scheme
from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.ir.gelu import find_gelus, keep_gelus_float
from qconv.ir.model import DataType, Model, Node, Value, clip_bounds, constant_array, input_of
from qconv.ir.operators import (
    CLIPPING_ACTIVATIONS,
    QUANTIZATION_RULES,
    ComputingRule,
    ConcatRule,
    IntegerDomainRule,
    Rule,
    SaturatingLineRule,
    TransparentRule,
    WeightedRule,
    with_,
)
from qconv.ir.stored_weights import read_dequantizer
from qconv.planning.channel_padding import choose_padded_layers
from qconv.planning.eligibility import (
    HEAD_REASON,
    NO_16_BIT_KERNEL,
    computes_at_load,
    describe_inside,
    explain_refusal,
    find_shortcut_input,
    keep_places_float,
    make_weight_spec,
    orient_rule,
)
from qconv.planning.float_reasons import explain_float_execution
from qconv.planning.plan import (
    Decision,
    DisjointSets,
    LayerPlan,
    Plan,
    count_channels,
    data_inputs,
    find_activation_gate,
)
from qconv.planning.widths import find_nodes_on_16_bits, holds_16_bits, specify_constants
from qconv.quantizer import PerChannel, PerTensor, QuantSpec

KEPT_FLOAT_BY_OPTION = "kept float by --keep-float"

KEPT_FLOAT_BY_LAYER_BITS = "kept float by --layer-bits"

INTEGERS_ARE_PIXELS = "its codes are the input's pixels"

AVERAGE_POOLS = with_(averages=True)


def make_plan(
    model: Model,
    recipe: Recipe,
    target: Target,
    floats: Mapping[str, str] | None = None,
    wide: Mapping[str, str] | None = None,
) -> Plan:
    """Decide for every node and tensor of a folded model. `passes.requantize` then gives readers of unlike bits copies.

    floats, wide: names of nodes to leave in float, and to compute on 16 bits (not where `inputs_only`), with reasons.
    """
    planner = _Planner(model, recipe, target, Plan(recipe, target, dict(floats or {}), dict(wide or {})))
    planner.choose_layers()
    if recipe.activation_bits < 32:
        if target.inputs_only:
            planner.spread_to_inputs()
        else:
            planner.spread()
            planner.plan.on_16_bits = find_nodes_on_16_bits(planner.plan)
            planner.tie()
        planner.choose_activations()
        planner.take_given()
    explain_float_execution(planner.nodes, planner.plan)
    choose_padded_layers(planner.plan)
    return planner.plan


def replan(
    plan: Plan,
    model: Model,
    *,
    recipe: Recipe | None = None,
    floats: Mapping[str, str] | None = None,
    wide: Mapping[str, str] | None = None,
) -> Plan:
    """Make a plan again of this model: a copy of the one that it is of, or the same, as it was changed since.

    recipe: another one of the same target; None for the plan's own. floats, wide: others; None for the plan's own.
    """
    floats, wide = plan.floats if floats is None else floats, plan.wide if wide is None else wide
    return make_plan(model, recipe or plan.recipe, plan.target, floats, wide)


class _Planner:
    def __init__(self, model: Model, recipe: Recipe, target: Target, plan: Plan) -> None:
        self.model, self.recipe, self.target, self.plan = model, recipe, target, plan
        self.nodes = model.nodes()
        told = (name for node in self.nodes if recipe.bits_of(name := node.name or "").activations == FLOAT_BITS)
        known = {**keep_places_float(self.nodes), **keep_gelus_float(find_gelus(model))}
        self.floats = {**known, **plan.floats, **dict.fromkeys(told, KEPT_FLOAT_BY_LAYER_BITS)}
        self.quantized: dict[Value, str] = {}
        self.eligible: dict[Node, Rule] = {}
        for node in self.nodes:
            rule = QUANTIZATION_RULES.get(node.op_type)
            why = self._refusal(node, rule)
            if why is None and rule is not None:
                self.eligible[node] = rule
            elif why is not None and _is_float_node(node):
                self.plan.kept[node.name or ""] = Decision(None, why)
        self.weighted = {n for n, rule in self.eligible.items() if isinstance(rule, WeightedRule)}
        self.reaches_weights = self._closure(reversed(self.nodes), _next_nodes, self.weighted)
        self.after_weights = self._closure(self.nodes, _previous_nodes, self.weighted)
        # the first and the last layer are the network's own, whatever runs in float
        layers = self.weighted | {node for node in self.nodes if self._is_placed_layer(node)}
        self.inner = self._closure(reversed(self.nodes), _next_nodes, layers)
        self.inner &= self._closure(self.nodes, _previous_nodes, layers)

    def _is_placed_layer(self, node: Node) -> bool:
        """Whether a node is a layer that stays float only because it is faster there, or for what reads it."""
        kept = self.plan.kept.get(node.name or "")
        placed = kept is not None and kept.why == self.floats.get(node.name or "")
        return placed and isinstance(QUANTIZATION_RULES.get(node.op_type), WeightedRule)

    def _closure(self, order: Iterable[Node], neighbours: _Neighbours, layers: Set[Node]) -> set[Node]:
        """Nodes from which one of `layers` is reached through `neighbours`, themselves not counted."""
        reached: set[Node] = set()
        for node in order:
            if any(other in reached or other in layers for other in neighbours(node)):
                reached.add(node)
        return reached

    # -- may this node be quantized at all? ------------------------------------------------------------------------

    def _refusal(self, node: Node, rule: Rule | None) -> str | None:
        recipe, name = self.recipe, node.name or ""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.keep_float):
            return KEPT_FLOAT_BY_OPTION
        if node.op_type in recipe.keep_float_op:
            return f"{KEPT_FLOAT_BY_OPTION}-op"
        if recipe.bits_of(name).in_float:
            return KEPT_FLOAT_BY_LAYER_BITS
        if rule is None or node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} has no integer kernel{describe_inside(node)}"
        weights_only = recipe.activation_bits == 32
        if node.op_type in self.target.float_ops and not weights_only:
            return self.target.float_ops[node.op_type]
        if weights_only and not isinstance(rule, WeightedRule):
            return "only weights are quantized"
        if isinstance(rule, SaturatingLineRule) and recipe.activation_bits > 8:
            return NO_16_BIT_KERNEL
        return explain_refusal(node, rule) or self.floats.get(name)

    # -- layers with weights ---------------------------------------------------------------------------------------

    def choose_layers(self) -> None:
        for node in self.nodes:
            placed = self._is_placed_layer(node)
            rule = QUANTIZATION_RULES.get(node.op_type) if placed else self.eligible.get(node)
            if not isinstance(rule, WeightedRule) or constant_array(input_of(node, 1)) is None:
                continue
            rule = orient_rule(node, rule)
            spec = make_weight_spec(node, rule, self.recipe, self.target, self._least_bits(node))
            data = None if placed or self.recipe.activation_bits == 32 else node.inputs[0]
            at_load = data is None and computes_at_load(node, self.recipe, self.target)
            own_bits = self.recipe.allocates_weights and spec.bits < 8 and isinstance(spec.granularity, PerChannel)
            moves_zero = not spec.symmetric and self.recipe.moves_zero(spec.bits)
            self.plan.layers.append(LayerPlan(node, rule, spec, data, at_load, own_bits, moves_zero))

    def _least_bits(self, node: Node) -> int:
        """The bits of a layer where no glob gives it its own: `edge_bits` for the first and the last layer."""
        return 0 if node in self.inner else self.recipe.edge_bits

    # -- which nodes run on codes, which tensors become codes --------------------------------------------------------

    def spread_to_inputs(self) -> None:
        """Quantize the inputs of layers with weights and of averages, and the shortcut of an Add behind a layer.

        The layer's own branch stays float up to the Add, so that runtimes can fuse both. All tensors that are joined
        or handed on share parameters with what they become, so that a quantizer may move past the operator.
        """
        reads = self.plan.reads = {}
        self._take_pixels()
        wanted = [(layer.node, layer.data) for layer in self.plan.layers if layer.data is not None]
        wanted += [
            (node, node.inputs[0])
            for node in self.nodes
            if node in self.eligible and node.op_type in AVERAGE_POOLS and node in self.after_weights and node.inputs[0]
        ]
        for node in self.nodes:
            if node.op_type == "Add" and node in self.eligible and node in self.after_weights:
                side = find_shortcut_input(self.model, node, self._data(node), self.weighted)
                wanted += [] if side is None else [(node, side)]
        for node, value in wanted:
            self.plan.integer.add(node)
            self.quantized.setdefault(value, f"read by {node.name}")
            reads.setdefault(value, []).append(node)
        self._tie_moved()

    def _tie_moved(self) -> None:
        groups: DisjointSets[Value] = DisjointSets()
        for node in self.nodes:
            if isinstance(QUANTIZATION_RULES.get(node.op_type), TransparentRule | ConcatRule) and node in self.eligible:
                ends = [*self._data(node), *node.outputs]
                groups.join(value for value in ends if value in self.quantized)
        self.plan.ties = groups.in_order(self._in_graph_order())

    def _take_pixels(self) -> None:
        for node in self.nodes:
            if node.op_type == "DequantizeLinear":
                self.quantized[node.outputs[0]] = INTEGERS_ARE_PIXELS

    def spread(self) -> None:
        """Grow the set of integer nodes and quantized tensors from the layers with weights until it stays the same."""
        self._take_pixels()
        for layer in self.plan.layers:
            if layer.data is not None:
                self._make_integer(layer.node)
        grown = True
        while grown:
            before = len(self.plan.integer)
            for node in self.nodes:
                decided = node not in self.eligible or node in self.plan.integer or node in self.plan.absorbed
                if not decided and self._worthwhile(node):
                    self._make_integer(node)
            grown = len(self.plan.integer) > before
        for node in self.eligible:
            if node not in self.plan.integer and node not in self.plan.absorbed and _is_float_node(node):
                self.plan.kept[node.name or ""] = Decision(None, self._why_left(node))

    def _why_left(self, node: Node) -> str:
        """Why a node is left in float. An activation that is merged with a float layer has the layer's reason."""
        before = next(_previous_nodes(node), None)
        if (
            before is not None
            and node.op_type in CLIPPING_ACTIVATIONS
            and isinstance(QUANTIZATION_RULES.get(before.op_type), WeightedRule)
        ):
            reason = self.plan.kept.get(before.name or "")
            if reason is not None:
                return reason.why
        rule = self.eligible.get(node)
        in_head = node in self.after_weights and node not in self.reaches_weights
        if in_head and (isinstance(rule, ConcatRule) or _is_float_in_tail(rule)):
            return HEAD_REASON
        return "no quantized tensor reaches it, so codes would only cost"

    def _worthwhile(self, node: Node) -> bool:
        rule = self.eligible[node]
        data = self._data(node)
        if isinstance(rule, WeightedRule):
            # two activations multiplied: an operator like any other
            return bool(data) and all(value in self.quantized for value in data)
        tail = node not in self.reaches_weights
        if tail and _is_float_in_tail(rule):
            return False
        if tail and isinstance(rule, ConcatRule) and node in self.after_weights:
            return False  # boxes and scores would share a scale
        known = [value in self.quantized for value in data]
        return bool(known) and (all(known) if tail else any(known))

    def _is_in_head(self, value: Value) -> bool:
        """Whether a tensor comes from the last layers, and something without weights goes on from there."""
        node = value.producer()
        made = node is not None and (node in self.weighted or node in self.after_weights)
        return made and node not in self.reaches_weights and bool(self.model.readers(value))

    def _data(self, node: Node) -> list[Value]:
        """The data inputs of a node that are no constants."""
        return [value for value in data_inputs(node, self.eligible[node]) if constant_array(value) is None]

    def _make_integer(self, node: Node) -> None:
        rule = self.eligible[node]
        self.plan.integer.add(node)
        reason = f"read or written by {node.name}"
        for value in self._data(node):
            self.quantized.setdefault(value, reason)
        follower = None
        if isinstance(rule, WeightedRule | ComputingRule):
            follower = self._absorbable(node)
        if follower is not None:
            self.plan.absorbed[follower] = node
            self.quantized.setdefault(follower.outputs[0], reason)
        elif not isinstance(rule, WeightedRule) or self._needs_output(node, rule):
            for value in node.outputs:
                if value.uses() or value.is_graph_output():
                    self.quantized.setdefault(value, reason)
        if isinstance(rule, IntegerDomainRule):
            self.plan.on_codes.add(node)

    def _needs_output(self, node: Node, rule: WeightedRule) -> bool:
        """Whether the layer's result must be quantized, for the layer itself or for its readers to run on codes.

        Without codes in between ONNX Runtime makes one float Gemm out of a MatMul and the Add behind it.
        """
        if rule.needs_output or constant_array(input_of(node, 1)) is None:
            return True
        readers = self.model.readers(node.outputs[0])
        if node in self.reaches_weights and any(reader in self.eligible for reader in readers):
            return True
        return node.op_type == "MatMul" and any(reader.op_type == "Add" for reader in readers)

    def _absorbable(self, node: Node) -> Node | None:
        """The Relu or Clip that alone reads the node's output, and that a saturating quantizer can replace."""
        reader = self.model.sole_reader(node.outputs[0])
        if reader is None or reader.op_type not in CLIPPING_ACTIVATIONS or reader not in self.eligible:
            return None
        bounds = clip_bounds(reader)
        return reader if bounds is not None and bounds[0] <= 0 <= bounds[1] else None

    # -- parameters shared -------------------------------------------------------------------------------------------

    def tie(self) -> None:
        groups: DisjointSets[Value] = DisjointSets()
        for node in self.nodes:
            if node not in self.plan.integer:
                continue
            rule, wide = self.eligible[node], node in self.plan.on_16_bits
            outputs = [value for value in node.outputs if value in self.quantized]
            alike = [v for v in self._data(node) if holds_16_bits(self.model, self.plan, v) == wide]
            if isinstance(rule, TransparentRule | IntegerDomainRule):
                groups.join([*alike, *outputs])
            elif isinstance(rule, ConcatRule):
                groups.join([*(v for v in alike if self.model.sole_reader(v) is node), *outputs])
        self.plan.ties = groups.in_order(self._in_graph_order())

    def _in_graph_order(self) -> list[Value]:
        produced = [*self.model.graph.inputs, *(value for node in self.nodes for value in node.outputs)]
        return [value for value in produced if value in self.quantized]

    def choose_activations(self) -> None:
        recipe = self.recipe
        wanted_bits = self._wanted_activation_bits()
        apart = self._with_channels() if recipe.allocates_activations else set()
        group_of = {value: group for group in self.plan.ties for value in group}
        symmetric, default = recipe.activation_scheme is Scheme.SYMMETRIC, max(recipe.activation_bits, 8)
        for value in self._in_graph_order():
            group = group_of.get(value, (value,))
            bits = max((wanted_bits[m] for m in group if m in wanted_bits), default=default)
            bits = WIDE_BITS if holds_16_bits(self.model, self.plan, value) else bits
            whole = PerTensor() if value not in apart or len(group) > 1 or bits >= 8 else PerChannel(1)
            spec = QuantSpec(bits, self.target.signed, symmetric, whole)
            self.plan.activations[value] = Decision(spec, self.quantized[value])
            gate = find_activation_gate(self.model, value) if group == (value,) else None
            if gate is not None:
                self.plan.gates[value] = gate
            if bits >= 8 and self._is_in_head(value):
                self.plan.head.add(value)
        self.plan.constants = specify_constants(self.plan, self.nodes, symmetric=symmetric)

    def _wanted_activation_bits(self) -> dict[Value, int]:
        """The bits of every quantized tensor: the most that a layer wants of it; 8 or more where no layer reads it."""
        recipe, found = self.recipe, dict[Value, int]()
        for layer in self.plan.layers:
            if layer.data is not None and layer.node not in self.plan.on_16_bits:
                wish = recipe.bits_of(layer.node.name or "").activations
                bits = wish or max(recipe.activation_bits, self._least_bits(layer.node))
                found[layer.data] = max(bits, found.get(layer.data, 0))
        return found

    def _with_channels(self) -> set[Value]:
        """The tensors with several channels, whose channels layers sum over."""
        read = {layer.data for layer in self.plan.layers if layer.data is not None}
        moved = {layer.data for layer in self.plan.layers if layer.node.op_type == "MatMul"}
        return {value for value in read - moved if count_channels(value) > 1}

    def take_given(self) -> None:
        """Keep the parameters of tensors that hold codes already, and of what is copied or cut from them.

        A line that saturates ends with its codes.

        Where such a tensor shares its parameters with others, as in a Concat, it is rounded like any tensor.
        """
        plan, groups = self.plan, self.plan.group_of()
        for node in self.nodes:
            value = node.outputs[0]
            spec = plan.activations[value].spec if value in plan.activations else None
            if spec is not None and isinstance(self.eligible.get(node), SaturatingLineRule) and node in plan.integer:
                plan.given[value] = spec.from_range(0.0, 1.0)
            group = groups.get(value, ())
            others = [member for member in group if member is not value]
            dequantizer = read_dequantizer(value)
            params = None if dequantizer is None or dequantizer.at_load else dequantizer.tensor_params()
            if params is not None and group and all(map(self._fits, others)):
                for member in group:
                    plan.given[member] = params
                    plan.gates.pop(member, None)
                    plan.activations[member] = Decision(plan.given[member].spec, INTEGERS_ARE_PIXELS)

    def _fits(self, value: Value) -> bool:
        """Whether all values of a tensor have codes in its group."""
        return self.plan.copies(value) or value.producer() in self.plan.on_codes


_Neighbours = Callable[[Node], Iterator[Node]]


def _next_nodes(node: Node) -> Iterator[Node]:
    for value in node.outputs:
        yield from (use.node for use in value.uses())


def _previous_nodes(node: Node) -> Iterator[Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer


def _is_float_in_tail(rule: Rule | None) -> bool:
    return isinstance(rule, SaturatingLineRule) or (isinstance(rule, ComputingRule) and rule.float_in_tail)


def is_quantizable_layer(node: Node) -> bool:
    """Whether a node has constant weights that could be quantized."""
    return (
        isinstance(QUANTIZATION_RULES.get(node.op_type), WeightedRule) and constant_array(input_of(node, 1)) is not None
    )


def _is_float_node(node: Node) -> bool:
    return any(value.dtype in (DataType.FLOAT, None) for value in node.outputs)
