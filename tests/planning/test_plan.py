"""What is quantized and what stays float, from the graph alone. Oracle: one network by hand for every rule."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS, Target
from qconv.ir.model import Model, Node, Value, attribute, constant_array
from qconv.ir.operators import (
    QUANTIZATION_RULES,
    ComputingRule,
    ConcatRule,
    IntegerDomainRule,
    TransparentRule,
    WeightedRule,
)
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.planner import make_plan, replan
from qconv.quantizer import PerBlock, PerChannel, PerTensor
from tests.support.models import Constant, ints, loaded, network

W = (4, 3, 3, 3)  # of a Conv from 3 to 4 channels
V = (5, 4, 1, 1)  # of a Conv from 4 to 5
SAME = "pads=[1,1,1,1]"
ANYTHING = Target("anything")  # a runtime that has an integer kernel for every rule


class Planned:
    """A plan, spoken of by names: a node is called after its output."""

    def __init__(self, proto: onnx.ModelProto, recipe: Recipe | None = None, target: Target | None = None) -> None:
        self.model: Model = loaded(proto)
        self.plan: Plan = make_plan(self.model, recipe or Recipe(), target or TARGETS["ort-cpu"])

    def node(self, output: str) -> Node:
        return next(node for node in self.model.nodes() if output in [value.name for value in node.outputs])

    def value(self, name: str) -> Value:
        produced = [value for node in self.model.nodes() for value in node.outputs]
        return next(value for value in [*self.model.graph.inputs, *produced] if value.name == name)

    def layer(self, output: str) -> LayerPlan:
        return next(layer for layer in self.plan.layers if layer.node is self.node(output))

    @property
    def layers(self) -> str:
        return names(*(layer.node.outputs[0] for layer in self.plan.layers))

    @property
    def quantized(self) -> str:
        return names(*self.plan.activations)

    @property
    def integer(self) -> set[str]:
        return {node.outputs[0].name or "" for node in self.plan.integer}

    @property
    def ties(self) -> set[str]:
        return {names(*group) for group in self.plan.ties}

    @property
    def watched(self) -> list[str]:
        return [observer.name for observer in self.plan.observers()]

    @property
    def absorbed(self) -> dict[str, str]:
        return {names(reader.outputs[0]): names(node.outputs[0]) for reader, node in self.plan.absorbed.items()}

    def bits(self, name: str) -> int:
        spec = self.plan.activations[self.value(name)].spec
        assert spec is not None
        return spec.bits

    def kept(self, output: str) -> str:
        """Why the node stays float."""
        choice = self.plan.kept[self.node(output).name or ""]
        assert choice.spec is None
        return choice.why


def names(*values: Value) -> str:
    return " ".join(value.name or "" for value in values)


# -- every rule --------------------------------------------------------------------------------------------------------

# c -> a, where c is (2, 4, 6, 6) and comes from a Conv, and a feeds another layer. Names of other inputs that are no
# constants come first.
BETWEEN: dict[str, tuple[str, dict[str, Constant]]] = {
    "Conv": ("a = Conv(c, u)", {"u": (4, 4, 1, 1)}),
    "ConvTranspose": ("a = ConvTranspose(c, u)", {"u": (4, 4, 2, 2)}),
    "Gemm": ("f = Flatten(c) a = Gemm(f, u)", {"u": (144, 4)}),
    "MatMul": ("a = MatMul(c, u)", {"u": (6, 5)}),
    "Add": ("d = Conv(x, v) a = Add(c, d)", {"v": (4, 3, 1, 1)}),
    "Mul": ("d = Conv(x, v) a = Mul(c, d)", {"v": (4, 3, 1, 1)}),
    "Sub": ("d = Conv(x, v) a = Sub(c, d)", {"v": (4, 3, 1, 1)}),
    "AveragePool": ("a = AveragePool<kernel_shape=[2,2]>(c)", {}),
    "GlobalAveragePool": ("a = GlobalAveragePool(c)", {}),
    "Identity": ("a = Identity(c)", {}),
    "LeakyRelu": ("a = LeakyRelu(c)", {}),
    "Sigmoid": ("a = Sigmoid(c)", {}),
    "Softmax": ("a = Softmax<axis=1>(c)", {}),
    "MaxPool": ("a = MaxPool<kernel_shape=[2,2]>(c)", {}),
    "ReduceMax": ("a = ReduceMax<axes=[2,3]>(c)", {}),
    "Reshape": ("a = Reshape(c, s)", {"s": ints(0, 0, 4, 9)}),
    "Flatten": ("a = Flatten(c)", {}),
    "Transpose": ("a = Transpose<perm=[0,1,3,2]>(c)", {}),
    "Squeeze": ("d = Unsqueeze(c, ax) a = Squeeze(d, ax)", {"ax": ints(2)}),
    "Unsqueeze": ("a = Unsqueeze(c, ax) d = Squeeze(a, ax)", {"ax": ints(2)}),
    "Slice": ("a = Slice(c, from, to, ax)", {"from": ints(1), "to": ints(4), "ax": ints(2)}),
    "Split": ("a, b = Split<axis=2>(c)", {}),
    "Gather": ("a = Gather<axis=2>(c, rows)", {"rows": ints(0, 2, 5)}),
    "Expand": ("a = Expand(c, n)", {"n": ints(2, 4, 6, 6)}),
    "Tile": ("a = Tile(c, n)", {"n": ints(1, 1, 2, 1)}),
    "Resize": ('a = Resize<mode="nearest">(c, , k)', {"k": np.float32([1, 1, 2, 2])}),
    "DepthToSpace": ("a = DepthToSpace<blocksize=2>(c)", {}),
    "SpaceToDepth": ("a = SpaceToDepth<blocksize=2>(c)", {}),
    "HardSigmoid": ("a = HardSigmoid(c) m = Mul(c, a)", {}),
    "Concat": ("d = Conv(x, v) a = Concat<axis=1>(c, d)", {"v": (3, 3, 1, 1)}),
    # read elsewhere, too: a Relu or Clip that is the only reader is absorbed
    "Relu": ("d = Conv(c, u) a = Relu(c)", {"u": (4, 4, 1, 1)}),
    "Clip": ("d = Conv(c, u) a = Clip(c, z, s)", {"u": (4, 4, 1, 1), "z": 0.0, "s": 6.0}),
    "Pad": ("a = Pad(c, p)", {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
}
# What follows `a` to be a layer; by default a 1x1 Conv over the channels of `a`.
BEHIND: dict[str, tuple[str, tuple[int, ...]]] = {
    "Gemm": ("Gemm(a, t)", (4, 2)),
    "Flatten": ("Gemm(a, t)", (144, 2)),
    "Unsqueeze": ("Conv(d, t)", (2, 4, 1, 1)),
    "DepthToSpace": ("Conv(a, t)", (2, 1, 1, 1)),
    "SpaceToDepth": ("Conv(a, t)", (2, 16, 1, 1)),
    "Concat": ("Conv(a, t)", (2, 7, 1, 1)),
    "HardSigmoid": ("Conv(m, t)", (2, 4, 1, 1)),
}


def around(op_type: str) -> onnx.ModelProto:
    """Conv -> the operator -> a layer."""
    body, constants = BETWEEN[op_type]
    layer, shape = BEHIND.get(op_type, ("Conv(a, t)", (2, 4, 1, 1)))
    first = f"c = Conv<{SAME}>(x, w)"
    return network(f"{first} {body} y = {layer}", **{"w": W, "t": shape, **constants})


def of_kind(kind: type) -> list[str]:
    return [op_type for op_type, rule in QUANTIZATION_RULES.items() if isinstance(rule, kind)]


def test_every_rule_has_a_network_here() -> None:
    assert set(BETWEEN) == set(QUANTIZATION_RULES)


@pytest.mark.parametrize("op_type", QUANTIZATION_RULES)
def test_codes_flow_through_every_operator(op_type: str) -> None:
    """With a kernel for it, nothing is left float between the layers, and every tensor says why it is quantized."""
    planned = Planned(around(op_type), target=ANYTHING)
    assert planned.plan.kept == {}
    assert planned.node("a") in planned.plan.integer
    assert {"x", "c", "a"} <= set(planned.quantized.split())
    assert all("read or written by" in choice.why for choice in planned.plan.activations.values())
    assert (planned.node("a") in planned.plan.on_codes) == isinstance(QUANTIZATION_RULES[op_type], IntegerDomainRule)
    assert planned.absorbed == {}


@pytest.mark.parametrize("op_type", of_kind(WeightedRule))
def test_layers_have_scales_along_their_outputs(op_type: str) -> None:
    planned = Planned(around(op_type), target=ANYTHING)
    layer = planned.layer("a")
    assert layer.weight.granularity == PerChannel({"Conv": 0}.get(op_type, 1))
    assert layer.data is layer.node.inputs[0]
    assert (layer.weight.bits, layer.weight.signed, layer.weight.symmetric) == (8, True, True)


@pytest.mark.parametrize("op_type", of_kind(ComputingRule))
def test_computing_operators_tie_nothing(op_type: str) -> None:
    assert Planned(around(op_type), target=ANYTHING).ties == set()


TIES = {op_type: {"c a"} for op_type in of_kind(TransparentRule | IntegerDomainRule)} | {
    "Squeeze": {"c d a"},
    "Unsqueeze": {"c a d"},
    "Split": {"c a"},  # nobody reads its second output
}


@pytest.mark.parametrize("op_type", TIES)
def test_operators_that_hand_codes_on_share_parameters(op_type: str) -> None:
    planned = Planned(around(op_type), target=ANYTHING)
    assert planned.ties == TIES[op_type]
    values = {planned.value(name) for group in TIES[op_type] for name in group.split()}
    assert "c" in planned.watched  # what the Conv writes must be seen
    assert {*planned.plan.group_of()[planned.value("c")]} == values
    assert planned.plan.group_of()[planned.value("a")] == planned.plan.group_of()[planned.value("c")]


@pytest.mark.parametrize("op_type", of_kind(ConcatRule))
def test_joined_tensors_share_parameters(op_type: str) -> None:
    assert Planned(around(op_type)).ties == {"c d a"}


# -- joining -----------------------------------------------------------------------------------------------------------


def test_an_input_of_concat_with_another_reader_keeps_its_own_parameters() -> None:
    body = f"c = Conv<{SAME}>(x, w) d = Conv<{SAME}>(x, v) e = Conv(d, u) a = Concat<axis=1>(c, d) y = Conv(a, t)"
    planned = Planned(network(body, w=W, v=W, u=(2, 4, 1, 1), t=(2, 8, 1, 1)))
    assert planned.ties == {"c a"}
    assert planned.value("d") in planned.plan.activations


def test_ties_reach_through_chains() -> None:
    """Concat joins what MaxPool and Reshape have already tied."""
    body = f"""
        c = Conv<{SAME}>(x, w) m = MaxPool<kernel_shape=[1,1]>(c) r = Reshape(m, s)
        d = Conv<{SAME}>(x, v) a = Concat<axis=1>(r, d) y = Conv(a, t)
    """
    planned = Planned(network(body, w=W, v=W, s=ints(0, 4, 6, 6), t=(2, 8, 1, 1)))
    assert planned.ties == {"c m r d a"}
    assert planned.watched == ["x", "c", "d", "a", "y"]  # m and r hold copies of what c holds; a is what y reads


def test_two_groups_stay_two() -> None:
    body = (
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) d = Conv(m, v) n = MaxPool<kernel_shape=[2,2]>(d) "
        "y = Conv(n, t)"
    )
    assert Planned(network(body, w=W, v=(4, 4, 1, 1), t=V)).ties == {"c m", "d n"}


def test_constant_operands_are_quantized() -> None:
    planned = Planned(network("c = Conv(x, w) a = Mul(c, k) y = Conv(a, v)", w=W, v=V, k=0.5))
    assert names(*planned.plan.constants) == "k"
    assert all((spec.bits, spec.signed) == (8, False) for spec in planned.plan.constants.values())


# -- Relu and Clip -----------------------------------------------------------------------------------------------------

ABSORBABLE = {
    "relu": ("a = Relu(c)", {}),
    "relu6": ("a = Clip(c, z, s)", {"z": 0.0, "s": 6.0}),
    "hard tanh": ("a = Clip(c, z, s)", {"z": -1.0, "s": 1.0}),
    "open above": ("a = Clip(c, z)", {"z": -1.0}),
    "open below": ("a = Clip(c, , s)", {"s": 6.0}),
    "up to zero": ("a = Clip(c, z, s)", {"z": -3.0, "s": 0.0}),
}


@pytest.mark.parametrize(("body", "constants"), ABSORBABLE.values(), ids=ABSORBABLE)
def test_an_activation_whose_bounds_hold_zero_is_absorbed(body: str, constants: dict[str, Constant]) -> None:
    planned = Planned(network(f"c = Conv(x, w) {body} y = Conv(a, v)", w=W, v=V, **constants))
    assert planned.absorbed == {"a": "c"}
    assert planned.quantized == "x a y"  # the Conv's own output never exists
    assert planned.plan.on_codes == set()


@pytest.mark.parametrize(("low", "high"), [(1.0, 6.0), (-6.0, -1.0)])
def test_an_activation_whose_bounds_leave_zero_out_works_on_codes(low: float, high: float) -> None:
    """The range always contains zero, so the quantizer alone cannot saturate at these bounds."""
    planned = Planned(network("c = Conv(x, w) a = Clip(c, z, s) y = Conv(a, v)", w=W, v=V, z=low, s=high))
    assert planned.absorbed == {}
    assert planned.node("a") in planned.plan.on_codes
    assert planned.ties == {"c a"}


def test_computed_bounds_are_refused() -> None:
    body = "c = Conv(x, w) m = ReduceMean<keepdims=0>(x) a = Clip(c, , m) y = Conv(a, v)"
    planned = Planned(network(body, w=W, v=V))
    assert planned.kept("a") == "its bounds are computed, not constant"
    assert planned.absorbed == {}
    assert planned.quantized == "x c a y"


@pytest.mark.parametrize("other", ["b = Conv(c, u)", "b = Sigmoid(c)", "b = Shape(c)"])
def test_a_layer_with_two_readers_absorbs_nothing(other: str) -> None:
    planned = Planned(network(f"c = Conv(x, w) a = Relu(c) {other} y = Conv(a, v)", w=W, v=V, u=V))
    assert planned.absorbed == {}
    assert planned.node("a") in planned.plan.on_codes


def test_a_layer_that_is_returned_absorbs_nothing() -> None:
    planned = Planned(network("c = Conv(x, w) a = Relu(c) y = Conv(a, v)", outputs=("y", "c"), w=W, v=V))
    assert planned.absorbed == {}


@pytest.mark.parametrize("op_type", ["Add", "Gemm", "AveragePool"])
def test_other_operators_absorb_too(op_type: str) -> None:
    body, constants = BETWEEN[op_type]
    behind = "Gemm(r, t)" if op_type == "Gemm" else "Conv(r, t)"
    shape = (4, 2) if op_type == "Gemm" else (2, 4, 1, 1)
    planned = Planned(
        network(f"c = Conv<{SAME}>(x, w) {body} r = Relu(a) y = {behind}", **{"w": W, "t": shape, **constants})
    )
    assert planned.absorbed == {"r": "a"}


@pytest.mark.parametrize("first", ["a = Relu(x)", "t = Tanh(x) a = Relu(t)"])
def test_an_activation_before_all_codes_stays_float(first: str) -> None:
    """Its result is quantized for the layer behind it: codes before it would only cost."""
    planned = Planned(network(f"{first} y = Conv(a, w)", w=W))
    assert planned.quantized == "a y"
    assert planned.kept("a") == "no quantized tensor reaches it, so codes would only cost"


# -- left float --------------------------------------------------------------------------------------------------------

FLOAT = {
    "transposed": ("a = ConvTranspose(c, u)", {"u": (4, 4, 2, 2)}, "no integer ConvTranspose"),
    "linear": (
        'a = Resize<mode="linear">(c, , k)',
        {"k": np.float32([1, 1, 2, 2])},
        "only by nearest neighbour",
    ),
    "hard sigmoid in front of a layer": ("a = HardSigmoid(c)", {}, "what reads it would have to take the parameters"),
    "falling": ("a = HardSigmoid<alpha=-0.2>(c) m = Mul(c, a)", {}, "its line does not rise"),
    "hard swish": ("a = HardSwish(c)", {}, "HardSwish has no integer kernel"),
    "tanh": ("a = Tanh(c)", {}, "Tanh has no integer kernel"),
    "computed weights": ("u = Tanh(c) a = Conv(c, u)", {}, "its weights are computed"),
    "computed bias": (
        "m = ReduceMean<axes=[0,2,3],keepdims=0>(c) a = Conv(c, u, m)",
        {"u": (4, 4, 1, 1)},
        "its bias is computed",
    ),
    "padded with ones": (
        "a = Pad(c, p, one)",
        {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "one": 1.0},
        "something else than zero",
    ),
}


@pytest.mark.parametrize(("body", "constants", "why"), FLOAT.values(), ids=FLOAT)
def test_what_stays_float_says_why(body: str, constants: dict[str, Constant], why: str) -> None:
    """The layers around it are quantized all the same, and read and write codes."""
    x = (4, 3, 6, 6) if "Conv(c, u)" in body else (2, 3, 6, 6)
    planned = Planned(network(f"c = Conv<{SAME}>(x, w) {body} y = Conv(a, v)", x=x, w=W, v=V, **constants))
    assert why in planned.kept("a")
    assert planned.node("a") not in planned.plan.integer
    assert planned.layers == "c y"
    assert planned.quantized == "x c a y"


@pytest.mark.parametrize(
    ("gemm", "constants"),
    [
        ("a = Gemm<alpha=0.5>(f, u)", {}),
        ("a = Gemm<beta=0.5>(f, u, b)", {"b": (4,)}),
        ("t = Transpose<perm=[1,0]>(f) a = Gemm<transA=1>(t, u)", {}),
        ("a = Gemm(f, u, b)", {"b": (2, 4)}),
    ],
)
def test_gemms_that_no_kernel_runs_stay_float(gemm: str, constants: dict[str, Constant]) -> None:
    proto = network(
        f"c = Conv<{SAME}>(x, w) f = Flatten(c) {gemm} y = Gemm(a, v)", w=W, u=(144, 4), v=(4, 2), **constants
    )
    planned = Planned(proto)
    assert planned.node("a").name in planned.plan.kept
    assert planned.layers == "c y"


def test_keep_float_takes_globs_of_node_names() -> None:
    proto = network("c1 = Conv(x, w) c2 = Conv(c1, u) y = Conv(c2, v)", w=W, u=(4, 4, 1, 1), v=V)
    for node in proto.graph.node:
        node.name = f"/features/{node.output[0]}/Conv"
    planned = Planned(proto, Recipe(keep_float=("/features/c?/*",)))
    assert planned.layers == "y"
    assert planned.kept("c1") == planned.kept("c2") == "kept float by --keep-float"
    assert planned.quantized == "c2 y"


def test_keep_float_op_takes_types() -> None:
    body = "c = Conv(x, w) a = MaxPool<kernel_shape=[2,2]>(c) y = Conv(a, v)"
    planned = Planned(network(body, w=W, v=V), Recipe(keep_float_op=("MaxPool", "Softmax")))
    assert planned.kept("a") == "kept float by --keep-float-op"
    assert planned.ties == set()
    assert planned.layers == "c y"


def test_a_kept_activation_is_not_absorbed() -> None:
    planned = Planned(network("c = Conv(x, w) a = Relu(c) y = Conv(a, v)", w=W, v=V), Recipe(keep_float_op=("Relu",)))
    assert planned.absorbed == {}
    assert planned.kept("a") == "kept float by --keep-float-op"


def test_what_no_layer_reaches_stays_float() -> None:
    body = "s = Tanh(x) a = MaxPool<kernel_shape=[2,2]>(s) y = Conv(x, w)"
    planned = Planned(network(body, outputs=("y", "a"), w=W))
    assert planned.kept("a") == "no quantized tensor reaches it, so codes would only cost"
    assert planned.quantized == "x y"


@pytest.mark.parametrize("op_type", ["Softmax", "Sigmoid"])
def test_scores_behind_the_last_layer_stay_float(op_type: str) -> None:
    """And so does the last Gemm's output: writing codes would cost precision and save nothing."""
    body = f"c = Conv(x, w) f = Flatten(c) g = Gemm(f, v) y = {op_type}(g)"
    planned = Planned(network(body, w=W, v=(64, 5)))
    assert planned.node("y") not in planned.plan.integer
    assert planned.quantized == "x c f"
    assert planned.layers == "c g"


def test_a_gate_in_the_middle_is_quantized() -> None:
    """SiLU: x * Sigmoid(x) before another layer."""
    planned = Planned(network("c = Conv(x, w) s = Sigmoid(c) a = Mul(c, s) y = Conv(a, v)", w=W, v=V))
    assert planned.quantized == "x c s a y"


# -- specs -------------------------------------------------------------------------------------------------------------

CHAIN = network(
    f"c = Conv<{SAME}>(x, w) d = Conv(c, u) m = MaxPool<kernel_shape=[2,2]>(d) e = Conv(m, t) y = Conv(e, v)",
    w=W,
    u=(4, 4, 1, 1),
    t=(4, 4, 1, 1),
    v=V,
)


def test_edges_keep_their_bits() -> None:
    """Weights and input of the first and the last layer have at least the edge bits; what lies between does not.

    What no layer reads has 8.
    """
    planned = Planned(CHAIN, Recipe(weight_bits=3, activation_bits=4, edge_bits=7))
    assert [planned.layer(name).weight.bits for name in "cdey"] == [7, 3, 3, 7]
    assert {name: planned.bits(name) for name in "xcdmey"} == {"x": 7, "c": 4, "d": 4, "m": 4, "e": 7, "y": 8}


def test_edge_bits_lower_nothing() -> None:
    planned = Planned(CHAIN, Recipe(weight_bits=8, activation_bits=8, edge_bits=2))
    assert {layer.weight.bits for layer in planned.plan.layers} == {8}
    assert {planned.bits(name) for name in "xcdmey"} == {8}


@pytest.mark.parametrize(("edge_bits", "bits"), [(8, {4, 8}), (4, {4})])
def test_packed_edges_keep_their_bits_too(edge_bits: int, bits: set[int]) -> None:
    planned = Planned(CHAIN, Recipe(weight_bits=4, pack=True, edge_bits=edge_bits))
    assert {layer.weight.bits for layer in planned.plan.layers} == bits


def test_tensors_tied_to_an_edge_have_its_bits() -> None:
    """Shared parameters mean shared bits: m is the last layer's input, c hands its codes to it."""
    body = "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) y = Conv(m, v)"
    planned = Planned(network(body, w=W, v=V), Recipe(activation_bits=3, edge_bits=6))
    assert planned.bits("c") == planned.bits("m") == 6


def test_branches_have_edges_of_their_own() -> None:
    """Both heads end the network, both stems begin it."""
    body = f"a = Conv<{SAME}>(x, w) b = Conv<{SAME}>(x, v) m = Add(a, b) y = Conv(m, t) z = Conv(m, u)"
    proto = network(body, outputs=("y", "z"), w=W, v=W, t=V, u=V)
    planned = Planned(proto, Recipe(weight_bits=4))
    assert {layer.weight.bits for layer in planned.plan.layers} == {8}


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("scheme", Scheme)
def test_specs_follow_the_recipe(bits: int, scheme: Scheme) -> None:
    recipe = Recipe(weight_bits=bits, activation_bits=bits, weight_scheme=scheme, activation_scheme=scheme, edge_bits=2)
    planned = Planned(CHAIN, recipe)
    symmetric = scheme is Scheme.SYMMETRIC
    for layer in planned.plan.layers:
        assert (layer.weight.bits, layer.weight.signed, layer.weight.symmetric) == (bits, True, symmetric)
    for value, choice in planned.plan.activations.items():
        assert choice.spec is not None
        own = max(bits, 8) if value.name == "y" else bits  # which no layer reads
        assert (choice.spec.bits, choice.spec.signed, choice.spec.symmetric) == (own, False, symmetric)
        assert choice.spec.granularity == PerTensor()


def test_granularity_of_weights() -> None:
    """Blocks run over input channels, kernel positions included: 2 channels of 3x3 are 18 elements of a row."""
    proto = network(f"c = Conv<{SAME}>(x, w) f = Flatten(c) y = Gemm<transB=1>(f, v)", w=W, v=(5, 144))
    expected = {
        WeightGranularity.PER_TENSOR: [PerTensor(), PerTensor()],
        WeightGranularity.PER_CHANNEL: [PerChannel(0), PerChannel(0)],
        WeightGranularity.PER_BLOCK: [PerBlock(1, 18), PerBlock(1, 2)],
    }
    for granularity, wanted in expected.items():
        planned = Planned(proto, Recipe(weight_granularity=granularity, block_size=2))
        assert [layer.weight.granularity for layer in planned.plan.layers] == wanted


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_turns_with_trans_b(trans: int) -> None:
    shape = (5, 144) if trans else (144, 5)
    proto = network(f"c = Conv<{SAME}>(x, w) f = Flatten(c) y = Gemm<transB={trans}>(f, v)", w=W, v=shape)
    for granularity, wanted in (
        (WeightGranularity.PER_CHANNEL, PerChannel(1 - trans)),
        (WeightGranularity.PER_BLOCK, PerBlock(trans, 32)),
    ):
        layer = Planned(proto, Recipe(weight_granularity=granularity)).layer("y")
        assert layer.weight.granularity == wanted
        assert attribute(layer.node, "transB", 0) == trans


# -- weights only ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op_type", QUANTIZATION_RULES)
def test_weights_only_quantizes_no_activation(op_type: str) -> None:
    planned = Planned(around(op_type), Recipe(activation_bits=32))
    assert planned.plan.activations == {}
    assert planned.plan.constants == {}
    assert planned.plan.ties == []
    assert planned.plan.absorbed == {}
    assert planned.watched == []
    assert "c" in planned.layers
    assert "y" in planned.layers
    assert all(layer.data is None for layer in planned.plan.layers)
    if not isinstance(QUANTIZATION_RULES[op_type], WeightedRule):
        assert planned.kept("a") == "only weights are quantized"


def test_weights_only_takes_layers_without_an_integer_kernel() -> None:
    """They run in float anyway."""
    assert Planned(around("ConvTranspose"), Recipe(activation_bits=32)).layers == "c a y"


def test_blocks_are_no_longer_than_the_channels() -> None:
    """A block of a million would be stored, and repeated, as a million."""
    planned = Planned(CHAIN, Recipe(weight_granularity=WeightGranularity.PER_BLOCK, block_size=10**6))
    for layer in planned.plan.layers:
        weight = constant_array(layer.node.inputs[1])
        assert weight is not None
        assert isinstance(layer.weight.granularity, PerBlock)
        assert layer.weight.granularity.size == np.prod(weight.shape[1:])


def test_a_plan_is_made_again_for_a_copy_another_recipe_and_other_nodes_in_float() -> None:
    """By names it is the plan that is made from the start."""
    proto = network("c = Conv(x, w) a = Relu(c) y = Conv(a, v)", w=W, v=V)
    planned = Planned(proto)
    copy = planned.model.copy()
    for changes in ({}, {"floats": {"c": "faster"}}, {"recipe": Recipe(weight_bits=4, edge_bits=4)}):
        again = replan(planned.plan, copy, **changes)
        recipe, floats = changes.get("recipe", planned.plan.recipe), changes.get("floats", {})
        fresh = make_plan(planned.model, recipe, TARGETS["ort-cpu"], floats)
        assert _decisions(again) == _decisions(fresh)
        assert all(layer.node in copy.nodes() for layer in again.layers)
    assert replan(planned.plan, copy, floats={"c": "faster"}).placed == {"c"}
    with pytest.raises(TypeError):
        Plan()  # type: ignore[call-arg]  # a target that nobody named would decide


def _decisions(plan: Plan) -> tuple[object, ...]:
    layers = [(layer.node.name, layer.weight, layer.data and layer.data.name) for layer in plan.layers]
    return {value.name: found for value, found in plan.activations.items()}, layers, plan.kept, plan.floats
