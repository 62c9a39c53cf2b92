"""Operators whose time hangs on where another one runs: gates that float has one operator for, and Transposes.

Oracles: sums by hand, every division, and the graph that ONNX Runtime makes of the float network.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.load import infer_shapes_at
from qconv.ir.model import Node
from qconv.planning.operator_costs import NodeCost
from qconv.planning.placement import SILU_SHARE, PlacementProblem
from qconv.planning.planner import make_plan
from qconv.runtime.session import Session
from tests.support.models import ints, loaded, network

SILU = "a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) y = Conv(m, v)"
WEIGHTS = {"w": (4, 3, 1, 1), "v": (4, 4, 1, 1), "u": (4, 3, 1, 1)}
SHAPE = (1, 3, 8, 8)
COSTS = {"stem3": (4.0, 4.0), "Sigmoid": (10.0, 7.0), "Mul": (2.0, 3.0), "switch": (0.0, 2.0)}


def problem_of(body: str, costs: dict[str, tuple[float, float]], **measured: NodeCost) -> PlacementProblem:
    """costs: (us in float, us in integers) of each kind; `switch` us for there and back."""
    shapes = {"shape": ints(1, 2, 2, 8, 8), "back": ints(1, 4, 8, 8)}
    numbers = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    model = loaded(network(body, x=SHAPE, **shapes, **numbers, **WEIGHTS))
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    table = {kind: {8: (own, 0.0, codes, 0.0)} for kind, (own, codes) in costs.items()}
    return PlacementProblem.of(model, plan, infer_shapes_at(model, "x", SHAPE), table, measured)


def nodes_of(problem: PlacementProblem) -> dict[str, Node]:
    return {node.name or "": node for node in problem.costs}


def time_with(problem: PlacementProblem, in_float: str) -> float:
    return problem.time({node for name, node in nodes_of(problem).items() if name not in in_float})


# -- x * Sigmoid(x) ----------------------------------------------------------------------------------------------------


def test_both_in_float_take_less_than_each_alone() -> None:
    """By hand, both layers 4, and 1 for a tensor that changes over; a is read twice, and changes over once."""
    problem = problem_of(SILU, COSTS)
    edge = time_with(problem, "") - 18  # of the network, whatever is within
    assert edge == pytest.approx(2)  # x and y
    assert time_with(problem, "sm") == pytest.approx(8 + SILU_SHARE * 12 + 2 + edge)
    assert time_with(problem, "s") == pytest.approx(8 + 10 + 3 + 2 + edge)
    assert time_with(problem, "m") == pytest.approx(8 + 7 + 2 + 3 + edge)


def test_they_cannot_take_less_than_nothing() -> None:
    """A share of both that is more than the Sigmoid takes: the Mul is left."""
    problem = problem_of(SILU, {**COSTS, "Sigmoid": (0.1, 7.0), "Mul": (20.0, 3.0)})
    assert time_with(problem, "sm") - time_with(problem, "") == pytest.approx(20 - 10 + 2)


def test_measured_times_are_true_as_they_are() -> None:
    problem = problem_of(SILU, COSTS, s=NodeCost(10, 7, measured=True))
    assert problem.pairs == []
    assert time_with(problem, "sm") - time_with(problem, "") == pytest.approx(12 - 10 + 2)


@pytest.mark.parametrize(
    "body",
    [
        SILU,
        "a = Conv(x, w) s = Sigmoid(a) m = Mul(s, a) y = Conv(m, v)",
        "a = Conv(x, w) b = Conv(x, u) s = Sigmoid(b) m = Mul(a, s) y = Conv(m, v)",
        "a = Conv(x, w) s = Sigmoid(a) m = Mul(s, s) y = Conv(m, v)",
        "a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) n = Add(m, s) y = Conv(n, v)",
        "a = Conv(x, w) s = Sigmoid(a) m = Add(a, s) y = Conv(m, v)",
        "a = Conv(x, w) s = Tanh(a) m = Mul(a, s) y = Conv(m, v)",
    ],
)
def test_they_are_paired_where_the_runtime_has_one_operator(body: str, tmp_path: Path) -> None:
    proto = network(body, x=SHAPE, **WEIGHTS)
    Session(proto.SerializeToString(), threads=1, save_optimized=tmp_path / "optimized.onnx")
    fused = "QuickGelu" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    costs = {**COSTS, "Add": (2.0, 3.0), "Tanh": (2.0, 3.0)}
    assert bool(problem_of(body, costs).pairs) is fused


@pytest.mark.parametrize("seed", range(30))
def test_no_other_division_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    body = "a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) n = Add(m, a) z = Sigmoid(n) o = Mul(n, z) y = Conv(o, v)"
    drawn = {kind: (float(rng.uniform(1, 9)), float(rng.uniform(1, 9))) for kind in (*COSTS, "Add")}
    problem = problem_of(body, drawn)
    assert {(one.name, other.name) for one, other, _ in problem.pairs} == {("s", "m"), ("z", "o")}
    nodes = list(problem.costs)
    every = (set(some) for count in range(len(nodes) + 1) for some in itertools.combinations(nodes, count))
    assert problem.time(problem.cheapest()) == pytest.approx(min(map(problem.time, every)))


# -- Transpose ---------------------------------------------------------------------------------------------------------

TURNED = {"stem3": (4.0, 4.0), "switch": (0.0, 0.0), "Transpose": (5.0, 90.0), "transpose_nchw": (5.0, 2.0)}
TURN = "Transpose<perm=[0,1,3,2]>"


@pytest.mark.parametrize(
    ("body", "us"),
    [
        (f"a = Conv(x, w) t = {TURN}(a) y = Conv(t, v)", {"t": 90}),
        (f"a = Conv(x, w) r = Relu(a) t = {TURN}(r) y = Conv(t, v)", {"t": 90}),
        (f"a = Conv(x, w) m = MaxPool<kernel_shape=[1,1]>(a) t = {TURN}(m) y = Conv(t, v)", {"t": 90}),
        # what it writes has the layout of the file
        (f"a = Conv(x, w) t = {TURN}(a) z = {TURN}(t) y = Conv(z, v)", {"t": 90, "z": 2}),
        # channels that are shuffled: the layout is changed before the Reshape
        (
            "a = Conv(x, w) r = Reshape(a, shape) t = Transpose<perm=[0,2,1,3,4]>(r) b = Reshape(t, back) "
            "y = Conv(b, v)",
            {"t": 90},
        ),
    ],
)
def test_a_transpose_behind_a_layer_has_to_change_the_layout(body: str, us: dict[str, float]) -> None:
    problem = problem_of(body, TURNED)
    costs = {node.name: cost for node, cost in problem.costs.items()}
    found = {name: cost.integer_us for name in us if (cost := costs[name]) is not None}
    assert found == us
    assert problem.pairs == []  # nothing is slower for a layer in float


# -- conversions -------------------------------------------------------------------------------------------------------


GELU = "a = Conv(x, w) d = Div(a, root) e = Erf(d) p = Add(e, one) m = Mul(a, p) h = Mul(m, half) "


@pytest.mark.parametrize(
    ("body", "dear"),
    [
        ("a = Conv(x, w) y = Conv(a, v)", {"x", "a", "y"}),
        ("a = Conv(x, w) e = Erf(a) y = Conv(e, v)", {"x", "a", "e", "y"}),
        (GELU + "y = Conv(h, v)", {"x", "y"}),
        (GELU + "b = Add(h, a) y = Conv(b, v)", {"x", "a", "b", "y"}),  # a sum reads it, too
        (GELU + "y = Conv(h, v) z = Conv(a, v)", {"x", "a", "y", "z"}),
    ],
)
def test_conversions_cost_more_but_around_a_gelu(body: str, dear: set[str]) -> None:
    """2.5 times as much. Inside of the Gelu nothing is ever converted."""
    problem = problem_of(body, COSTS)
    pairs = zip(problem.tensors, problem.with_dear_conversions().tensors, strict=True)
    factors = {before.value.name: after.switch_us / before.switch_us for before, after in pairs if before.switch_us}
    assert set(factors.values()) <= {1.0, 2.5}
    assert {name for name, factor in factors.items() if factor == 2.5} == dear
