"""Placement chooses the layers that are faster in float, by a measured table of operator costs.

With costs c_i(n) and c_f(n) of node n in integers and in float, and h(v) of converting tensor v, the cheapest
placement F of float nodes is

    min over F   sum_{n not in F} c_i(n) + sum_{n in F} c_f(n) + sum over v between both of h(v)

This is a minimum cut, found as a maximum flow (Ford and Fulkerson 1956; Dinic 1970). h(v) is paid once, however many
read v; a Relu or Clip goes with the layer that it is fused into. Some pairs of nodes cost more where the first is in
float and the second in integers: a MaxPool behind a layer (see `_settle_layouts`), the two nodes of a SiLU. What a
rounded tensor costs in accuracy can be added, see `planning.precision_curve`. A division by times alone is used only
where it gains enough to trust the table with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS, CostTable, Target
from qconv.ir.gelu import find_gelus
from qconv.ir.load import infer_shapes_at
from qconv.ir.model import Model, Node, Value, constant_array, dims
from qconv.ir.operators import QUANTIZATION_RULES, WeightedRule
from qconv.planning.channel_padding import time_of_padded
from qconv.planning.min_cut import FlowNetwork
from qconv.planning.operator_costs import NodeCost, Shapes, look_up_cost, switch_cost
from qconv.planning.plan import Plan, data_inputs

FLOAT_MARGIN = 1.1
"""Factor by which float must be cheaper: a layer that is as fast either way is better in integers, which are small."""

LEAST_GAIN_SHARE = 0.15
"""The least share of the network's time that a placement must save. Predicted savings of a tenth were not measured."""

LEAST_GAIN_US = 20.0

SLOW_DEPTHWISE_FACTOR = 30.0
"""Slowdown of the kernel for channel-wise zero points, measured on ONNX Runtime 1.32 with AVX2."""

LAYOUT_LOST_BY = frozenset(
    {"Gemm", "MatMul", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Gather", "Pad"}
)
"""Operators on codes behind which ONNX Runtime works on the layout of the file, NCHW."""

SILU_SHARE = 0.85
"""Time of x * Sigmoid(x) in float over that of Sigmoid and Mul: ONNX Runtime 1.32 makes one operator of both."""

CONVERSION_FACTOR = 2.5
"""Time of conversions between layers of both kinds, whose layouts differ, too, over what the table has: in
EfficientNet-B0 with 38 of them 2.7, measured on ONNX Runtime 1.32. Around a Gelu it is what the table has, or less: in
RepViT 0.6."""

NCHW_KINDS = {"MaxPool": "max_pool_nchw", "Transpose": "transpose_nchw"}
"""Operators whose time in integers hangs on the layout of the codes that they read, and their lines for NCHW."""


def is_placement_supported(recipe: Recipe, target: Target) -> bool:
    """Whether layers may be placed in float: integer kernels run, and activations have 8 bits."""
    return bool(target.costs) and recipe.runs_in_integers


def choose_float_nodes(model: Model, recipe: Recipe, fed: Preprocessing | None, whole: Plan) -> dict[str, str]:
    """Names of the nodes of a folded model that `recipe`'s target runs faster in float, each with the reason.

    fed: preprocessing of the input, which settles dynamic sizes; None for ready-made samples. whole: the plan without
    regard to costs.
    """
    target = TARGETS[recipe.target]
    if target.costs is None or not is_placement_supported(recipe, target):
        return {}
    return place_by_cost_table(model, whole, infer_run_shapes(model, fed), select_cost_table(recipe, target))


def select_cost_table(recipe: Recipe, target: Target) -> CostTable:
    """The costs of operators for the recipe's weights, on a CPU of which nothing is known."""
    return _adapt_costs(recipe, target.costs or {})


def select_cpu_tables(recipe: Recipe, target: Target) -> list[CostTable]:
    """The same on each class of CPU that is known."""
    return [_adapt_costs(recipe, table) for table in target.cpu_costs.values()]


def _adapt_costs(recipe: Recipe, known: CostTable) -> CostTable:
    """Depthwise layers with channel-wise zero points are slow."""
    if not recipe.has_zero_points(recipe.weight_bits):
        return known
    return {
        kind: {c: (f_us, f_ns, i_us, i_ns * SLOW_DEPTHWISE_FACTOR) for c, (f_us, f_ns, i_us, i_ns) in lines.items()}
        if kind.startswith("depthwise")
        else lines
        for kind, lines in known.items()
    }


def infer_run_shapes(model: Model, fed: Preprocessing | None) -> Shapes:
    """The shapes of all tensors in one run, as far as known; none where the input has a dynamic size, or there is none.

    fed: as in `choose_float_nodes`.
    """
    if not model.graph.inputs:
        return infer_shapes_at(model, "", ())
    first = model.graph.inputs[0]
    batch, *own = dims(first) or [None, None]
    sides = own if fed is None else fed.shape[1:]
    known = [side for side in sides if side is not None]
    return infer_shapes_at(model, first.name or "", [batch or 1, *known]) if len(known) == len(sides) else {}


def infer_sample_shapes(model: Model, feed: Mapping[str, Any]) -> Shapes:
    """The shapes of all tensors in a run of one ready-made sample. feed: a batch of these, by the names of inputs."""
    first = model.graph.inputs[0] if model.graph.inputs else None
    array = None if first is None else feed.get(first.name or "")
    if first is None or array is None:
        return {}
    return infer_shapes_at(model, first.name or "", [1, *array.shape[1:]])


def place_by_cost_table(model: Model, plan: Plan, shapes: Shapes, table: CostTable) -> dict[str, str]:
    """Choose the nodes of `plan` that are better left in float, by name, each with the reason.

    model: folded; plan: without regard to costs; shapes: of all tensors, for one run.
    """
    problem = PlacementProblem.of(model, plan, shapes, table)
    integer = problem.cautious().cheapest()
    gain, whole = problem.time(plan.integer) - problem.time(integer), problem.time(plan.integer)
    if gain < max(LEAST_GAIN_SHARE * whole, LEAST_GAIN_US):
        return {}
    return _explain_placement(plan, problem, integer)


def place_by_measured_costs(
    model: Model, plan: Plan, shapes: Shapes, table: CostTable, measured: Mapping[str, NodeCost]
) -> dict[str, str]:
    """Choose by measured costs of single nodes, however small the gain; see `place_by_cost_table`.

    table: costs of other nodes, and of conversions.
    """
    problem = PlacementProblem.of(model, plan, shapes, table, measured)
    return _explain_placement(plan, problem, problem.cautious().cheapest())


def place_all_in_float(model: Model, plan: Plan, shapes: Shapes, table: CostTable) -> dict[str, str]:
    """All nodes that could run in integers, with reasons as in `place_by_cost_table`."""
    return _explain_placement(plan, PlacementProblem.of(model, plan, shapes, table), set())


def _explain_placement(plan: Plan, problem: PlacementProblem, integer: Set[Node]) -> dict[str, str]:
    floats = plan.integer - integer
    return with_activations(plan, {node: _describe_cost(problem.costs[node]) for node in floats})


def with_activations(plan: Plan, floats: Mapping[Node, str]) -> dict[str, str]:
    """Reasons of nodes in float by their names, and of the activations that layers among them have absorbed."""
    fused = {activation: floats[layer] for activation, layer in plan.absorbed.items() if layer in floats}
    return {node.name or "": why for node, why in {**floats, **fused}.items()}


def _describe_cost(cost: NodeCost | None) -> str:
    if cost is not None and cost.float_us < cost.integer_us:
        return cost.in_words()
    return "its neighbours are faster in float, and changing over would cost more than it gains"


@dataclass(frozen=True, slots=True)
class TensorCost:
    """A tensor that may be converted. switch_us: cost of that; producer, readers: None for those outside the model.

    codes: whether it holds codes already, being the model's pixels. pointwise: whether a Gelu writes it, or only Gelus
    read it, which are in float anyway, and work on any layout.
    """

    value: Value
    producer: Node | None
    readers: tuple[Node | None, ...]
    switch_us: float
    codes: bool
    pointwise: bool = False

    def needs_conversion(self, integer: Set[Node]) -> bool:
        """Whether the tensor must be converted with these nodes in integers."""
        made = self.codes or self.producer in integer
        return any((reader in integer) != made for reader in self.readers)


@dataclass(frozen=True, slots=True)
class PlacementProblem:
    """The minimum cut problem. costs: of nodes that could run in integers, None where unknown; others cannot change.

    pairs: (node, other, us that both take longer where the first is in float and the other in integers).
    """

    costs: dict[Node, NodeCost | None]
    tensors: list[TensorCost]
    pairs: list[tuple[Node, Node, float]] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: Model, plan: Plan, shapes: Shapes, table: CostTable, measured: Mapping[str, NodeCost] | None = None
    ) -> PlacementProblem:
        """Arguments as for `place_by_measured_costs`."""
        known = measured or {}
        movable = [node for node in model.nodes() if node in plan.integer]  # in order: so are sums, to the last digit
        costs = {node: known.get(node.name or "") or look_up_cost(node, shapes, table) for node in movable}
        _spare_by_padding(plan, shapes, table, costs)
        pairs = [*_settle_layouts(plan, shapes, table, costs), *_join_gates(model, costs)]
        tensors = find_tensor_costs(model, plan, costs, lambda value: switch_cost(value, shapes, table))
        return cls(costs, tensors, pairs)

    def cautious(self) -> PlacementProblem:
        """The same with all costs in float raised by FLOAT_MARGIN."""
        costs = dict(self.costs)
        costs.update((n, replace(c, float_us=FLOAT_MARGIN * c.float_us)) for n, c in self.costs.items() if c)
        return replace(self, costs=costs)

    def with_dear_conversions(self) -> PlacementProblem:
        """The same with conversions as dear as among operators of all kinds, where layouts change, too."""
        dear = (t if t.pointwise else replace(t, switch_us=CONVERSION_FACTOR * t.switch_us) for t in self.tensors)
        return replace(self, tensors=list(dear))

    def time(self, integer: Set[Node]) -> float:
        """The time in us of one run with these nodes in integers, as far as the table knows."""
        found = sum(tensor.switch_us for tensor in self.tensors if tensor.needs_conversion(integer))
        for node, cost in self.costs.items():
            if cost is not None:
                found += cost.integer_us if node in integer else cost.float_us
        return found + sum(us for first, other, us in self.pairs if other in integer and first not in integer)

    def cheapest(
        self,
        penalties: Iterable[tuple[Set[Node], float]] = (),
        floats: Set[Node] = frozenset(),
        held: Set[Node] = frozenset(),
    ) -> set[Node]:
        """The nodes that should run in integers: all but the source's side of the minimum cut, the smallest such.

        penalties: nodes, and the us that it costs once if any of them runs in integers. floats, held: nodes that are
        known to run in float, and in integers.
        """
        network = FlowNetwork()
        vertices: dict[Node | None, object] = {node: node for node in self.costs}
        vertices.update((node, network.source) for node in floats)
        vertices.update((node, network.sink) for node in held)
        for index, (nodes, us) in enumerate(penalties):
            network.edge(network.source, index, us)
            for node in nodes:
                network.edge(index, vertices[node], math.inf)
        for node, cost in self.costs.items():
            if cost is not None:
                network.edge(network.source, vertices[node], cost.integer_us)
                network.edge(vertices[node], network.sink, cost.float_us)
            elif isinstance(QUANTIZATION_RULES[node.op_type], WeightedRule):  # unknown: integers are the rule
                network.edge(vertices[node], network.sink, math.inf)
        for first, other, us in self.pairs:
            network.edge(vertices[first], vertices[other], us)
        for tensor in self.tensors:
            self._tie(network, tensor, vertices)
        cut = network.source_side()
        return {node for node in self.costs if node not in cut and node not in floats}

    def _tie(self, network: FlowNetwork, tensor: TensorCost, vertices: Mapping[Node | None, object]) -> None:
        """Add the edges of a tensor: it is converted once for all readers of the other kind."""
        outside = network.sink if tensor.codes else network.source
        producer = vertices.get(tensor.producer, outside)
        codes, numbers = ("codes", tensor.value), ("numbers", tensor.value)
        network.edge(producer, codes, tensor.switch_us)
        network.edge(numbers, producer, tensor.switch_us)
        for reader in tensor.readers:
            if reader in self.costs:
                network.edge(codes, vertices[reader], math.inf)
                network.edge(vertices[reader], numbers, math.inf)
            else:
                network.edge(network.source, numbers, math.inf)


def find_tensor_costs(
    model: Model, plan: Plan, costs: Collection[Node], switch: Callable[[Value], float]
) -> list[TensorCost]:
    """The tensors that may be converted. costs: the nodes that can change. switch: the cost of converting a tensor."""
    fused = set(plan.absorbed.values())
    of_gelus = {node for gelu in find_gelus(model) for node in gelu.nodes}
    made: list[tuple[Value, Node | None]] = [(value, None) for value in model.graph.inputs]
    made += [(value, node) for node in model.nodes() for value in node.outputs]
    tensors = []
    for value, producer in made:
        if producer in fused:
            continue  # between a layer and the activation that it is one with
        producer = producer if producer is None else plan.absorbed.get(producer, producer)
        readers = [node for node in model.readers(value) if _reads_data(node, value)]
        outside = (None,) if value.is_graph_output() else ()
        codes = value in plan.given and producer not in costs
        pointwise = producer in of_gelus or (bool(readers) and {*readers, *outside} <= of_gelus)
        tensors.append(TensorCost(value, producer, (*readers, *outside), switch(value), codes, pointwise))
    return tensors


def _spare_by_padding(plan: Plan, shapes: Shapes, table: CostTable, costs: dict[Node, NodeCost | None]) -> None:
    """Lower the costs in integers of layers whose input is padded with channels."""
    for layer in plan.layers:
        cost = costs.get(layer.node)
        if layer.padded and cost is not None and not cost.measured:
            out = shapes.get(layer.node.outputs[0].name or "")
            costs[layer.node] = replace(cost, integer_us=cost.integer_us * time_of_padded(layer, out, table))


def _settle_layouts(
    plan: Plan, shapes: Shapes, table: CostTable, costs: dict[Node, NodeCost | None]
) -> list[tuple[Node, Node, float]]:
    """Set the costs of operators that hang on the layout of their codes; those that may take longer are returned.

    ONNX Runtime's integer convolutions, and what reads only what they write, work on NHWC, where a MaxPool is fast. On
    codes that come from elsewhere it is not, but a Transpose is, which else has to change the layout before. Returns
    (layer, operator, us) where it hangs on that layer.
    """
    found = []
    for node, cost in tuple(costs.items()):
        if node.op_type not in NCHW_KINDS or cost is None or cost.measured:
            continue
        own, nchw = (look_up_cost(node, shapes, table, kind) for kind in (node.op_type, NCHW_KINDS[node.op_type]))
        if own is None or nchw is None:
            continue
        more, layers = max(nchw.integer_us - own.integer_us, 0.0), _find_layout_makers(node, plan)
        if layers is None:
            costs[node] = nchw
        else:
            found += [(layer, node, more) for layer in layers if more]
    return found


def _join_gates(model: Model, costs: dict[Node, NodeCost | None]) -> list[tuple[Node, Node, float]]:
    """The Sigmoids that are one operator in float with the Mul that alone reads them, which is faster than both.

    Lowers the Sigmoid's cost in float; it is as before where the Mul is in integers.
    """
    found = []
    for gate, cost in tuple(costs.items()):
        product = model.sole_reader(gate.outputs[0]) if gate.op_type == "Sigmoid" else None
        if product is None or product.op_type != "Mul" or set(product.inputs) != {gate.inputs[0], gate.outputs[0]}:
            continue
        other = costs.get(product)
        if cost is not None and other is not None and not cost.measured:
            spared = min((1 - SILU_SHARE) * (cost.float_us + other.float_us), cost.float_us)
            costs[gate] = replace(cost, float_us=cost.float_us - spared)
            found.append((gate, product, spared))
    return found


def _find_layout_makers(node: Node, plan: Plan) -> list[Node] | None:
    """The convolutions that a node's input comes from; None where some of it comes from elsewhere."""
    found: dict[Node, None] = {}
    waiting = [_skip_reshape(value) if node.op_type == "Transpose" else value for value in _read_by(node)]
    seen = set(waiting)
    while waiting:
        maker = waiting.pop().producer()
        maker = maker if maker is None else plan.absorbed.get(maker, maker)
        if maker is None or maker not in plan.integer or maker.op_type in LAYOUT_LOST_BY:
            return None
        if maker.op_type == "Conv":
            found[maker] = None
            continue
        before = [v for v in _read_by(maker) if constant_array(v) is None]
        waiting += [value for value in before if value not in seen]
        seen.update(before)
    return list(found)


def _read_by(node: Node) -> list[Value]:
    return data_inputs(node, QUANTIZATION_RULES[node.op_type])


def _skip_reshape(value: Value) -> Value:
    """What a Reshape has made a tensor of: in front of it, too, the layout has to be the file's."""
    maker = value.producer()
    return value if maker is None or maker.op_type != "Reshape" else maker.inputs[0] or value


def _reads_data(node: Node, value: Value) -> bool:
    rule = QUANTIZATION_RULES.get(node.op_type)
    return rule is None or value in data_inputs(node, rule)
