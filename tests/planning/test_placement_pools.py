"""A MaxPool is slow on codes in ONNX Runtime's plain layout, and has to stay out of there.

Oracles: the graph that ONNX Runtime makes of the file, and the float network.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import onnx
import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.load import infer_shapes_at
from qconv.planning.placement import PlacementProblem
from qconv.planning.planner import make_plan
from tests.support.models import loaded, network
from tests.support.quantized import SAME, Quantized, Wiring, pictures, quantized

DRAWN = int(os.environ.get("QCONV_DRAWN_GRAPHS", "40"))
"""How many networks are drawn; more to search for faults."""

POOLS = (
    "kernel_shape=[2,2], strides=[2,2]",
    "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]",
    "kernel_shape=[3,3], pads=[1,1,1,1]",
    "kernel_shape=[2,2], strides=[2,2], ceil_mode=1",
)
BEFORE = {
    "conv": f"b = Conv<{SAME}>(x, w, k)",
    "relu": f"a = Conv<{SAME}>(x, w, k) b = Relu(a)",
    "clip": f"a = Conv<{SAME}>(x, w, k) b = Clip(a, zero, six)",
    "leaky relu": f"a = Conv<{SAME}>(x, w, k) b = LeakyRelu<alpha=0.1>(a)",
    "tanh": f"a = Conv<{SAME}>(x, w, k) b = Tanh(a)",
    "pool": f"a = Conv<{SAME}>(x, w, k) r = Relu(a) b = MaxPool<kernel_shape=[3,3], {SAME}>(r)",
    "concat": f"a = Conv<{SAME}>(x, w, k) c = Conv<{SAME}>(x, w2, k) b = Concat<axis=1>(a, c)",
    "sum": f"a = Conv<{SAME}>(x, w, k) c = Conv<{SAME}>(x, w2, k) d = Add(a, c) b = Relu(d)",
    "input": "b = Identity(x)",
    "returned": f"a = Conv<{SAME}>(x, w, k) z = Relu(a) b = Identity(z)",
}
BEHIND = {
    "conv": "y = Conv(m, v)",
    "relu, conv": "r2 = Relu(m) y = Conv(r2, v)",
    "turned": "t = Transpose<perm=[0,1,3,2]>(m) y = Conv(t, v)",
    "cut": "t = Slice(m, one, most, two) y = Conv(t, v)",
    "two readers": "c1 = Conv(m, v) t = Tanh(m) c2 = Conv(t, v) y = Add(c1, c2)",
    "shortcut": "c1 = Conv(m, v) e = Conv(c1, u) f = Conv(m, v) y = Add(e, f)",
    "pool": "m2 = MaxPool<kernel_shape=[2,2]>(m) y = Conv(m2, v)",
}


def pooled(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    before, behind = list(BEFORE)[seed % len(BEFORE)], list(BEHIND)[seed // len(BEFORE) % len(BEHIND)]
    pool, side, channels = POOLS[rng.integers(len(POOLS))], int(rng.integers(9, 20)), int(rng.integers(1, 9))
    read = {"input": 3, "concat": 2 * channels}.get(before, channels)
    return network(
        f"{BEFORE[before]} m = MaxPool<{pool}>(b) {BEHIND[behind]}",
        x=(1, 3, side, side),
        outputs=("y", "z") if before == "returned" else ("y",),
        w=(channels, 3, 3, 3),
        w2=(channels, 3, 3, 3),
        k=(channels,),
        v=(4, read, 1, 1),
        u=(4, 4, 1, 1),
        zero=0.0,
        six=6.0,
        one=np.int64([1]),
        most=np.int64([9]),
        two=np.int64([2]),
    )


def with_float_layer(seed: int) -> Quantized:
    """What stands in front of the pool stays float, as the cost table has it for many first layers."""
    proto = pooled(seed)
    shape = [size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim]
    return quantized(proto, pictures(shape, seed), keep_float=("a", "b", "c", "d"))


def slow_pools(wiring: Wiring) -> list[str]:
    """The MaxPools of the plain layout that read codes."""
    found = []
    for node in wiring.all("MaxPool"):
        maker = wiring.writers.get(node.input[0])
        while maker is not None and maker.op_type in ("Transpose", "Slice", "MaxPool", "Relu"):
            maker = wiring.writers.get(maker.input[0])
        if maker is not None and (maker.op_type == "QuantizeLinear" or maker.op_type.startswith("QLinear")):
            found.append(node.name)
    return found


@pytest.mark.parametrize("seed", range(DRAWN))
def test_no_quantizer_moves_to_the_front_of_a_pool(seed: int) -> None:
    result = with_float_layer(seed).check(20)
    assert slow_pools(result.optimized) == []


def test_an_activation_is_exchanged_with_the_pool() -> None:
    """Then the quantizer does it: nothing of it is left, and no copy is needed."""
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) m = MaxPool<kernel_shape=[2,2]>(b) y = Conv(m, v)"
    result = quantized(network(body, x=(1, 3, 12, 12), w=(4, 3, 3, 3), v=(4, 4, 1, 1)), keep_float=("a",)).check(30)
    assert not {"Relu", "Sum"} & set(result.runs)
    np.testing.assert_array_equal(result.got["y"], result.meant["y"])


# -- what the table says -----------------------------------------------------------------------------------------------


def problem_of(body: str, x: tuple[int, ...], **weights: tuple[int, ...]) -> PlacementProblem:
    model = loaded(network(body, x=x, **weights))
    costs = TARGETS["ort-cpu"].costs
    assert costs is not None
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    return PlacementProblem.of(model, plan, infer_shapes_at(model, "x", x), costs)


def test_a_pool_is_slow_where_its_layer_is_in_float() -> None:
    problem = problem_of(
        f"a = Conv<{SAME}>(x, w) b = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b) y = Conv(m, v)",
        x=(1, 3, 126, 126),
        w=(64, 3, 3, 3),
        v=(32, 64, 3, 3),
    )
    every = set(problem.costs)
    (layer,) = (node for node in every if node.name == "a")
    (pool,) = (node for node in every if node.name == "m")
    assert [(one.name, other.name) for one, other, _ in problem.pairs] == [("a", "m")]
    in_float = problem.time(every - {layer, pool})
    assert problem.time(every - {layer}) > in_float + 1000  # us: 254,000 numbers of 4 each


def test_a_pool_of_codes_from_elsewhere_is_slow_itself() -> None:
    alone = problem_of("m = MaxPool<kernel_shape=[3,3]>(x) y = Conv(m, v)", x=(1, 8, 28, 28), v=(4, 8, 1, 1))
    behind = problem_of(
        "c = Conv(x, w) r = Transpose<perm=[0,1,3,2]>(c) m = MaxPool<kernel_shape=[3,3]>(r) y = Conv(m, v)",
        x=(1, 8, 28, 28),
        w=(8, 8, 1, 1),
        v=(4, 8, 1, 1),
    )
    assert "m" not in {node.name for node in alone.costs}
    (cost,) = (cost for node, cost in behind.costs.items() if node.name == "m")
    assert cost is not None
    assert cost.integer_us > 20 * cost.float_us
    assert behind.pairs == []


@pytest.mark.parametrize("seed", range(20))
def test_no_other_division_is_cheaper(seed: int) -> None:
    """Against trying all: what a pool costs hangs on where the layers before it are."""
    rng = np.random.default_rng(seed)
    body = f"""a = Conv<{SAME}>(x, w) b = Conv<group=4, {SAME}>(a, d) c = Concat<axis=1>(a, b)
        m = MaxPool<kernel_shape=[3,3], {SAME}>(c) y = Conv(m, v)
        n = MaxPool<kernel_shape=[3,3], {SAME}>(b) z = Conv(n, p)"""
    weights = {"w": (4, 3, 3, 3), "d": (4, 1, 3, 3), "v": (4, 8, 1, 1), "p": (4, 4, 1, 1)}
    model = loaded(network(body, x=(1, 3, 8, 8), outputs=("y", "z"), **weights))
    kinds = {kind: tuple(rng.uniform(0, 9, 2)) for kind in ("stem3", "depthwise3", "conv1", "MaxPool", "switch")}
    kinds["max_pool_nchw"] = (0.0, 9 + float(rng.uniform(0, 20)))
    table = {kind: {8: (own, 0.0, codes, 0.0)} for kind, (own, codes) in kinds.items()}
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    problem = PlacementProblem.of(model, plan, infer_shapes_at(model, "x", (1, 3, 8, 8)), table)
    assert {(one.name, other.name) for one, other, _ in problem.pairs} == {("a", "m"), ("b", "m"), ("b", "n")}
    cautious = {n: c and type(c)(1.1 * c.float_us, c.integer_us) for n, c in problem.costs.items()}
    judged = PlacementProblem(cautious, problem.tensors, problem.pairs)
    every = (set(s) for n in range(len(plan.integer) + 1) for s in itertools.combinations(plan.integer, n))
    assert judged.time(problem.cautious().cheapest()) == pytest.approx(min(map(judged.time, every)))
