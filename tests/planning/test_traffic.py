"""What divisions read and write. Oracle: networks of a few nodes, counted by hand."""

from __future__ import annotations

import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Model, Node
from qconv.planning.placement import PlacementProblem
from qconv.planning.planner import make_plan
from qconv.planning.precision_curve import PrecisionProblem, TensorNoise, find_rounding_nodes
from qconv.planning.traffic import count_traffic
from tests.support.models import loaded, network

BODY = "a = Conv(x, w) g = Sigmoid(a) s = Mul(a, g) y = Conv(s, v)"
SHAPES = {"x": (1, 3, 4, 4), **dict.fromkeys("agsy", (1, 4, 4, 4))}
NODES = {"a": 3 + 4, "g": 4 + 4, "s": 4 + 4 + 4, "y": 4 + 4}
"""What nodes read and write, in 16 elements."""


def counted(bits: int) -> tuple[Model, PlacementProblem, dict[str, Node]]:
    model = loaded(network(BODY, (1, 3, 4, 4), w=(4, 3, 1, 1), v=(4, 4, 1, 1)))
    plan = make_plan(model, Recipe(target="generic"), TARGETS["generic"])
    return model, count_traffic(model, plan, SHAPES, bits), {node.name or "": node for node in model.nodes()}


@pytest.mark.parametrize(("bits", "factor"), [(16, 2), (32, 4)])
def test_a_node_counts_what_it_reads_and_writes(bits: int, factor: int) -> None:
    _, problem, nodes = counted(bits)
    for name, elements in NODES.items():
        cost = problem.costs[nodes[name]]
        assert cost is not None
        assert (cost.integer_us, cost.float_us) == (16 * elements, 16 * elements * factor)


def test_a_tensor_between_unlike_nodes_is_converted_once() -> None:
    """The caller's x is converted into 8 bits, and y out of them; with a on 16 bits, a once for g and s, and no x."""
    _, problem, nodes = counted(16)
    whole = set(nodes.values())
    assert problem.time(whole) == 16 * (sum(NODES.values()) + 3 + 4)
    assert problem.time(whole - {nodes["a"]}) == 16 * (sum(NODES.values()) + NODES["a"] + 4 + 4)


def test_the_loud_tensor_is_the_one_that_gets_more_bits() -> None:
    """g makes nearly all the noise, and Sigmoid and Mul are what touches it. a, s and y have neighbours on 8 bits."""
    model, problem, nodes = counted(16)
    plan = make_plan(model, Recipe(target="generic"), TARGETS["generic"])
    noises = [TensorNoise((nodes[name].outputs[0],), 1e-1 if name == "g" else 1e-9) for name in "agsy"]
    curve = PrecisionProblem.of(model, plan, problem, noises).find_curve(plan.integer)
    second = curve.points[1]
    assert {node.name for node in plan.integer - second.integer} == {"g", "s"}
    assert second.noise == pytest.approx(3e-9)


def test_in_front_of_readers_only_these_round() -> None:
    """TensorRT's quantizers stand in front of layers: the Conv that writes a tensor leaves it in float."""
    model = loaded(network("a = Conv(x, w) y = Conv(a, v)", (1, 3, 4, 4), w=(4, 3, 1, 1), v=(4, 4, 1, 1)))
    plan = make_plan(model, Recipe(target="tensorrt"), TARGETS["tensorrt"])
    first, second = model.nodes()
    assert {first, second} <= plan.integer
    assert find_rounding_nodes(model, plan, [first.outputs[0]]) == {second}
