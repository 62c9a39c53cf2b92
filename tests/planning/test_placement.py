"""What stays float because it is faster: against trying every division, and on networks where the answer is plain."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from qconv.config.choices import WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS, CostTable, Target, average_costs
from qconv.ir.load import infer_shapes_at
from qconv.ir.model import Model
from qconv.planning.operator_costs import Shapes, look_up_cost
from qconv.planning.placement import (
    PlacementProblem,
    choose_float_nodes,
    infer_run_shapes,
    is_placement_supported,
    place_by_cost_table,
)
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.quantization.emit import emit
from qconv.quantization.parameters import choose_params
from qconv.runtime.session import Session
from tests.support.models import loaded, network, random_feeds, run

PLAIN = Target("plain")
FREE = {8: (0.0, 0.0, 0.0, 0.0)}
SAME = "pads=[1,1,1,1]"
CHAIN = f"""a = Conv<{SAME}>(x, w)  b = Relu(a)  c = Conv<group=4, {SAME}>(b, d)  e = Add(c, b)
            f = Conv(e, p)  y = Conv(f, p)"""
WEIGHTS = {"w": (4, 3, 3, 3), "d": (4, 1, 3, 3), "p": (4, 4, 1, 1)}


def planned(body: str, x: tuple[int, ...] = (1, 3, 8, 8), **weights: object) -> tuple[Model, Plan, Shapes]:
    model = loaded(network(body, x=x, **weights))  # type: ignore[arg-type]
    return model, make_plan(model, Recipe(), PLAIN), infer_shapes_at(model, "x", x)


def table(**kinds: tuple[float, float]) -> CostTable:
    """Every kind costs (us in float, us in integers); `switch` us for there and back."""
    return {kind: {8: (own, 0.0, codes, 0.0)} for kind, (own, codes) in kinds.items()}


def names(nodes: object) -> set[str]:
    return {node.name or "" for node in nodes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(30))
def test_no_other_division_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    costs = {kind: tuple(rng.uniform(0, 9, 2)) for kind in ("stem3", "depthwise3", "Add")}
    problem = PlacementProblem.of(model, plan, shapes, table(**costs, switch=(0.0, float(rng.uniform(0, 9)))))
    cautious = {n: c and type(c)(1.1 * c.float_us, c.integer_us) for n, c in problem.costs.items()}
    judged = PlacementProblem(cautious, problem.tensors)
    chosen = problem.cautious().cheapest()
    nodes = list(plan.integer)
    every = (set(s) for n in range(len(nodes) + 1) for s in itertools.combinations(nodes, n))
    assert judged.time(chosen) == pytest.approx(min(map(judged.time, every)))


def test_a_layer_that_loses_much_stays_float() -> None:
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    costs = table(stem3=(50, 5), depthwise3=(5, 90), Add=(1, 1), switch=(0, 4))
    found = place_by_cost_table(model, plan, shapes, costs)
    assert set(found) == {"c"}
    assert found["c"] == "faster in float: 5 us against 90 by the cost table"


def test_what_stands_between_float_layers_follows() -> None:
    """The Add costs less in integers, but changing over for it costs more."""
    model, plan, shapes = planned(
        f"a = Conv<group=4, {SAME}>(x, d)  b = Add(a, x)  y = Conv<group=4, {SAME}>(b, d)  z = Conv(y, p)",
        x=(1, 4, 8, 8),
        outputs=("z",),
        **{**WEIGHTS, "d": (4, 1, 3, 3)},
    )
    costs = table(depthwise3=(5, 90), Add=(2, 1), conv1=(200, 5), switch=(0, 4))
    found = place_by_cost_table(model, plan, shapes, costs)
    assert set(found) == {"a", "b", "y"}
    assert "changing over" in found["b"]


def test_changing_over_must_pay() -> None:
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    costs = table(stem3=(500, 5), depthwise3=(5, 90), Add=(1, 1), switch=(0, 200))
    assert place_by_cost_table(model, plan, shapes, costs) == {}


def test_a_small_gain_is_left_alone() -> None:
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    costs = table(stem3=(500, 45), depthwise3=(5, 18), Add=(1, 1), switch=(0, 0))
    assert place_by_cost_table(model, plan, shapes, costs) == {}


def test_where_integers_always_lose_all_is_float() -> None:
    """Activations of whole floats, weights still in 8 bits; a Relu goes with its layer."""
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    kinds = ("stem3", "depthwise3", "Add")
    found = place_by_cost_table(model, plan, shapes, table(switch=(0, 1), **dict.fromkeys(kinds, (1, 99))))
    assert set(found) == set("abcefy")
    placed = make_plan(model, Recipe(), Target("plain", folds_constants=True), found)
    assert not placed.integer
    assert [(layer.node.name, layer.data, layer.at_load) for layer in placed.layers] == [
        (name, None, True) for name in "acfy"
    ]


def test_weights_of_a_float_layer_are_computed_when_the_file_is_loaded() -> None:
    """A quarter of the bytes, and at run time nothing but the layer is left: ONNX Runtime's own optimized graph."""
    proto = network(CHAIN, x=(1, 3, 8, 8), **WEIGHTS)
    model = loaded(proto)
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"], dict.fromkeys("abcefy", "told so"))
    params, _ = choose_params(plan, {}, Recipe())
    emit(model, plan, params)
    feeds = random_feeds(proto)
    got, want = (run(made, feeds)["y"] for made in (model, proto))
    assert 10 * np.log10(np.sum(want**2) / np.sum((got - want) ** 2)) > 35
    with TemporaryDirectory() as folder:
        place = Path(folder) / "optimized.onnx"
        Session(model.proto().SerializeToString(), threads=1, save_optimized=place)
        left = {node.op_type for node in onnx.load(str(place), load_external_data=False).graph.node}
    assert {array.dtype.name for array in stored(model) if array.size > 8} == {"int8"}
    assert not left & {"Cast", "Mul", "DequantizeLinear", "QuantizeLinear"}


def stored(model: Model) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(tensor) for tensor in model.proto().graph.initializer]


@pytest.mark.parametrize("recipe", [Recipe(activation_bits=32), Recipe(activation_bits=32, weight_scheme="asymmetric")])
def test_weights_alone_are_computed_when_the_file_is_loaded(recipe: Recipe) -> None:
    """Equal to the same codes behind a DequantizeLinear, which other targets get."""
    proto, feeds = network(CHAIN, x=(1, 3, 8, 8), **WEIGHTS), {}
    results = []
    for target, op_type in ((TARGETS["ort-cpu"], "Cast"), (PLAIN, "DequantizeLinear")):
        model = loaded(proto)
        plan = make_plan(model, recipe, target)
        params, _ = choose_params(plan, {}, recipe)
        emit(model, plan, params)
        assert op_type in {node.op_type for node in model.nodes()}
        feeds = random_feeds(proto)
        results.append(run(model, feeds)["y"])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_layers_that_the_table_does_not_know_run_in_integers() -> None:
    model, plan, shapes = planned(CHAIN, **WEIGHTS)
    found = place_by_cost_table(model, plan, shapes, table(depthwise3=(1, 900), switch=(0, 1)))
    assert set(found) == {"c"}


@pytest.mark.parametrize(
    ("body", "weights", "kind", "work"),
    [
        ("y = Conv(x, k)", {"k": (8, 8, 1, 1)}, "conv1", 64 * 64),
        (f"y = Conv<{SAME}>(x, k)", {"k": (8, 8, 3, 3)}, "conv3", 64 * 64 * 9),
        ("y = Conv<group=8>(x, k)", {"k": (8, 1, 1, 1)}, "depthwise1", 8 * 64),
        (f"y = Conv<group=8, {SAME}>(x, k)", {"k": (8, 1, 3, 3)}, "depthwise3", 8 * 64 * 9),
        ("y = Conv<group=8, pads=[2,2,2,2]>(x, k)", {"k": (8, 1, 5, 5)}, "depthwise5", 8 * 64 * 25),
        ("y = Conv<group=8, pads=[3,3,3,3], strides=[2,2]>(x, k)", {"k": (8, 1, 7, 7)}, "depthwise7", 8 * 16 * 49),
        ("y = Conv<group=2>(x, k)", {"k": (8, 4, 1, 1)}, "grouped1", 8 * 4 * 64),
        (f"y = Conv<group=8, {SAME}>(x, k)", {"k": (16, 1, 3, 3)}, "grouped3", 16 * 64 * 9),
    ],
)
def test_work_is_counted_in_multiplications(
    body: str, weights: dict[str, tuple[int, ...]], kind: str, work: int
) -> None:
    model, _, shapes = planned(body, x=(1, 8, 8, 8), **weights)
    cost = look_up_cost(model.nodes()[0], shapes, {kind: {8: (1.0, 2000.0, 3.0, 1000.0)}})
    assert cost is not None
    assert (cost.float_us, cost.integer_us) == (1 + 2 * work, 3 + work)


@pytest.mark.parametrize(("channels", "factor"), [(8, 1.0), (24, 1.8), (32, 1.0), (40, 1.8)])
def test_a_rest_of_channels_is_slow_in_depthwise_layers(channels: int, factor: float) -> None:
    """The kernel takes blocks of 16 channels; in float nothing changes."""
    model, _, shapes = planned(
        f"y = Conv<group={channels}, {SAME}>(x, k)", x=(1, channels, 1, 1), k=(channels, 1, 3, 3)
    )
    cost = look_up_cost(model.nodes()[0], shapes, {"depthwise3": {8: (1.0, 0.0, 10.0, 0.0)}})
    assert cost is not None
    assert (cost.float_us, cost.integer_us) == (1.0, 10.0 * factor)


def test_between_channels_the_table_is_interpolated() -> None:
    model, _, shapes = planned("y = Conv(x, k)", x=(1, 16, 1, 1), k=(16, 16, 1, 1))
    lines = {8: (1.0, 0.0, 10.0, 0.0), 32: (3.0, 0.0, 20.0, 0.0)}
    cost = look_up_cost(model.nodes()[0], shapes, {"conv1": lines})
    assert cost is not None
    assert (cost.float_us, cost.integer_us) == (2.0, 15.0)


@pytest.mark.parametrize(
    ("recipe", "held"),
    [
        (Recipe(), True),
        (Recipe(weight_bits=4), True),
        (Recipe(weight_bits=4, pack=True), True),
        (Recipe(activation_bits=4), False),
        (Recipe(activation_bits=16), False),
        (Recipe(weight_granularity=WeightGranularity.PER_BLOCK), False),
    ],
)
def test_layers_are_placed_where_integer_kernels_run(recipe: Recipe, held: bool) -> None:
    assert is_placement_supported(recipe, TARGETS["ort-cpu"]) is held
    assert not is_placement_supported(recipe, PLAIN)


def test_the_committed_table_has_what_placement_asks_for() -> None:
    costs = TARGETS["ort-cpu"].costs
    assert costs is not None
    for kind in ("conv1", "conv3", "depthwise3", "stem3", "grouped1", "Add", "Mul", "Sigmoid", "switch"):
        assert all(number >= 0 for line in costs[kind].values() for number in line), kind


def test_the_first_and_the_last_layer_are_the_networks_own() -> None:
    """A layer does not become the last one because what follows is left in float."""
    model = loaded(network(CHAIN, x=(1, 3, 8, 8), **WEIGHTS))
    plan = make_plan(model, Recipe(weight_bits=4), TARGETS["ort-cpu"], dict.fromkeys("cfy", "told so"))
    assert {layer.node.name: layer.weight.bits for layer in plan.layers} == {"a": 8, "c": 4, "f": 4, "y": 8}


def test_depthwise_layers_with_zero_points_stay_float() -> None:
    body = f"a = Conv<{SAME}>(x, w)  b = Conv<group=64, {SAME}>(a, d)  y = Conv<{SAME}>(b, p)"
    shapes = {"w": (64, 64, 3, 3), "d": (64, 1, 3, 3), "p": (64, 64, 3, 3)}
    model = loaded(network(body, x=(1, 64, 28, 28), **shapes))
    for scheme, floats in (("symmetric", set()), ("asymmetric", {"b"})):
        recipe = Recipe(weight_scheme=scheme)  # type: ignore[arg-type]
        whole = make_plan(model, recipe, TARGETS[recipe.target])
        assert set(choose_float_nodes(model, recipe, None, whole)) == floats


def test_costs_are_the_mean_of_those_of_all_cpus() -> None:
    tables = [{"Add": {8: (1.0, 2.0, 3.0, 4.0)}, "Mul": FREE}, {"Add": {8: (3.0, 4.0, 5.0, 6.0), 16: (1.0,) * 4}}]
    assert average_costs(tables) == {"Add": {8: (2.0, 3.0, 4.0, 5.0)}, "Mul": FREE}


def test_shapes_follow_the_pictures() -> None:
    model = loaded(network("a = Relu(x)  y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)", x=("N", 3, "H", "W")))
    assert infer_shapes_at(model, "x", (1, 3, 10, 20)) == {"x": (1, 3, 10, 20), "a": (1, 3, 10, 20), "y": (1, 3, 5, 10)}


@pytest.mark.parametrize("x", [("N", 3, "H", "W"), (1, 3, "H", 8), ("N", "C", 8, 8)], ids=str)
def test_no_shapes_where_the_size_is_open(x: tuple[int | str, ...]) -> None:
    """Of a size that is made up they would be wrong, and of fewer sides the input would have another rank."""
    model = loaded(network("y = Conv(x, w)", x=x, w=(4, 3, 3, 3)))
    assert infer_run_shapes(model, None) == {}
    model = loaded(network("y = Conv(x, w)", x=("N", 3, 8, 8), w=(4, 3, 3, 3)))
    assert infer_run_shapes(model, None)["y"] == (1, 4, 6, 6)


def test_a_model_without_inputs_has_shapes() -> None:
    """onnx's own `test_constant` has none, either."""
    proto = network("y = RandomNormal<shape=[1,4,2,2]>()")
    del proto.graph.input[:]
    assert infer_run_shapes(loaded(proto), None)["y"] == (1, 4, 2, 2)
