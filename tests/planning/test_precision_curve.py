"""Divisions by time and noise: against trying every division, and on costs worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.ir.load import infer_shapes_at
from qconv.ir.model import Node
from qconv.planning.operator_costs import NodeCost
from qconv.planning.placement import PlacementProblem
from qconv.planning.planner import make_plan
from qconv.planning.precision_curve import LEAST_TIME_STEP, PrecisionProblem, TensorNoise, find_rounding_nodes
from tests.support.models import loaded, network

SAME = "pads=[1,1,1,1]"
CHAIN = f"""a = Conv<{SAME}>(x, w)  b = Relu(a)  c = Conv<group=4, {SAME}>(b, d)  e = Add(c, b)
            f = Conv(e, p)  y = Conv(f, p)"""
MODEL = loaded(network(CHAIN, x=(1, 3, 8, 8), w=(4, 3, 3, 3), d=(4, 1, 3, 3), p=(4, 4, 1, 1)))
PLAN = make_plan(MODEL, Recipe(), Target("plain"))
MADE = [*MODEL.graph.inputs, *(value for node in MODEL.nodes() for value in node.outputs)]
VALUES = {value.name or "": value for value in MADE}
NODES = {node.name or "": node for node in sorted(PLAN.integer, key=lambda node: node.name or "")}
EVERY = [frozenset(some) for count in range(6) for some in itertools.combinations(NODES.values(), count)]

TOUCHED = {"x": "a", "b": "ace", "c": "ce", "e": "ef", "f": "fy", "y": "y"}
"""The nodes that write or read each tensor, by eye: a writes b, as it has absorbed the Relu."""

Costs = dict[str, tuple[float, float]]
Noises = dict[str, float]


def problem_of(costs: Costs, noises: Noises, rest: float = 0.0, switch: float = 0.0) -> PrecisionProblem:
    """costs: (us in float, us in integers) of each node. noises: by the letters of tensors that share a range.

    switch: us for there and back.
    """
    known = {name: NodeCost(*both) for name, both in costs.items()}
    table = {"switch": {8: (0.0, 0.0, switch, 0.0)}}
    placement = PlacementProblem.of(MODEL, PLAN, infer_shapes_at(MODEL, "x", (1, 3, 8, 8)), table, known)
    found = [TensorNoise(tuple(VALUES[letter] for letter in letters), noise) for letters, noise in noises.items()]
    problem = PrecisionProblem.of(MODEL, PLAN, placement, found)
    problem.rest = rest
    return problem


def drawn(seed: int) -> tuple[PrecisionProblem, Noises]:
    """Random costs, and noises that differ by factors of up to 1000; c and e share a range."""
    rng = np.random.default_rng(seed)
    costs = {name: (float(rng.uniform(1, 9)), float(rng.uniform(1, 9))) for name in NODES}
    noises = {letters: float(10 ** rng.uniform(-4, -1)) for letters in ("x", "b", "ce", "f", "y")}
    rest, switch = float(10 ** rng.uniform(-5, -3)), float(rng.uniform(0, 3))
    return problem_of(costs, noises, rest, switch), noises


def noise_by_eye(integer: frozenset[Node], noises: Noises, rest: float) -> float:
    names = {node.name for node in integer}
    loud = [noise for letters, noise in noises.items() if any(names & set(TOUCHED[letter]) for letter in letters)]
    return rest + sum(loud)


def integers(names: str) -> frozenset[Node]:
    return frozenset(NODES[name] for name in names)


# -- against trying all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_tensor_is_loud_where_any_node_beside_it_is_in_integers(seed: int) -> None:
    problem, noises = drawn(seed)
    for integer in EVERY:
        assert problem.noise_of(integer) == pytest.approx(noise_by_eye(integer, noises, problem.rest))


@pytest.mark.parametrize("price", [0.0, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", range(20))
def test_no_division_is_better_at_its_price(seed: int, price: float) -> None:
    problem, noises = drawn(seed)

    def cost(integer: frozenset[Node]) -> float:
        return problem.cautious.time(integer) + price * noise_by_eye(integer, noises, problem.rest)

    assert cost(problem.divide(price)) == pytest.approx(min(map(cost, EVERY)))


@pytest.mark.parametrize("seed", range(40))
def test_each_point_is_the_best_at_some_price(seed: int) -> None:
    """Oracle: the prices at which it is no dearer than any other division are an interval that holds one at least."""
    problem, noises = drawn(seed)
    for point in problem.find_curve(problem.divide(0.0)).points:
        low, high, own = 0.0, math.inf, problem.cautious.time(point.integer)
        for other in EVERY:
            dearer = problem.cautious.time(other) - own
            louder = noise_by_eye(other, noises, problem.rest) - point.noise
            if abs(louder) < 1e-12:
                assert dearer > -1e-9
            elif louder > 0:
                low = max(low, -dearer / louder)
            else:
                high = min(high, dearer / -louder)
        assert low <= high * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_no_division_lies_below_the_curve(seed: int) -> None:
    """But by the share of the time at which nothing is looked for between two points."""
    problem, noises = drawn(seed)
    curve = problem.find_curve(problem.divide(0.0))
    hull = sorted((point.noise, problem.cautious.time(point.integer)) for point in curve.points)
    loud, times = zip(*hull, strict=True)
    whole = problem.problem.time(problem.whole)
    for other in EVERY:
        noise = noise_by_eye(other, noises, problem.rest)
        assert noise > loud[0] * (1 - 1e-9)
        assert problem.cautious.time(other) >= np.interp(noise, loud, times) - LEAST_TIME_STEP * whole - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_points_are_told_by_times_as_they_are_trusted(seed: int) -> None:
    """With the factor by which float has to be cheaper: what is promised of a division should hold."""
    problem, _ = drawn(seed)
    curve = problem.find_curve(problem.divide(0.0))
    whole = problem.problem.time(integers("acefy"))
    for point in curve.points:
        own = problem.problem.costs
        floats = sum(own[node].float_us for node in integers("acefy") - point.integer)
        assert point.time == pytest.approx((problem.problem.time(point.integer) + 0.1 * floats) / whole)


# -- by hand -----------------------------------------------------------------------------------------------------------

DEAR: Costs = {**dict.fromkeys("cefy", (100.0, 1.0)), "a": (3.0, 1.0)}
"""5 us in integers, 403 in float; the first layer costs 2 more there, the others 99 each. A tenth is added to all."""


def test_a_curve_by_hand() -> None:
    """x hangs on a alone, and y on y: 5, 7.3 and 116.3 us, with 0.101, 0.011 and 0.001 of noise."""
    problem = problem_of(DEAR, {"x": 0.09, "y": 0.01}, rest=0.001)
    curve = problem.find_curve(problem.whole)
    assert [point.integer for point in curve.points] == [integers("acefy"), integers("cefy"), integers("cef")]
    assert [point.time for point in curve.points] == pytest.approx([1, 7.3 / 5, 116.3 / 5])
    assert [point.noise for point in curve.points] == pytest.approx([0.101, 0.011, 0.001])
    assert [point.sqnr_db for point in curve.points] == pytest.approx([9.957, 19.586, 30], abs=0.001)
    assert curve.float_time == pytest.approx(1.1 * 403 / 5)


def test_tensors_that_share_a_range_are_loud_once() -> None:
    problem = problem_of(DEAR, {"xbe": 0.25, "y": 0.5})
    assert problem.noise_of(integers("acefy")) == 0.75
    assert problem.noise_of(integers("a")) == problem.noise_of(integers("acef")) == 0.25
    assert problem.noise_of(integers("y")) == 0.5
    assert problem.noise_of(frozenset()) == 0


def test_a_layer_touches_what_the_activation_writes_that_it_has_absorbed() -> None:
    assert find_rounding_nodes(MODEL, PLAN, [VALUES["b"]]) == integers("ace")
    for letter, names in TOUCHED.items():
        assert find_rounding_nodes(MODEL, PLAN, [VALUES[letter]]) == integers(names)


def test_what_nothing_rounds_is_no_noise() -> None:
    """The tensor between a layer and its Relu is none: nothing in integers reads it but what has absorbed it."""
    placed = make_plan(MODEL, Recipe(), Target("plain"), dict.fromkeys("abcefy", "told so"))
    assert find_rounding_nodes(MODEL, placed, [VALUES["b"]]) == set()


def test_the_first_point_is_the_division_by_times_alone() -> None:
    """Where times gain too little to count, all is in integers: then what is faster, and less noisy, comes behind."""
    problem = problem_of({**DEAR, "a": (0.5, 1.0)}, {"x": 0.09, "y": 0.01}, rest=0.001)
    curve = problem.find_curve(problem.whole)
    assert [point.integer for point in curve.points] == [integers("acefy"), integers("cefy"), integers("cef")]
    assert [point.time for point in curve.points] == pytest.approx([1, 4.55 / 5, 113.55 / 5])
    by_times = problem.find_curve(integers("cefy"))
    assert [point.integer for point in by_times.points] == [integers("cefy"), integers("cef")]


def test_what_is_no_less_noisy_is_no_point() -> None:
    problem = problem_of({**DEAR, "a": (0.5, 1.0)}, {"y": 0.01}, rest=0.001)
    assert [point.integer for point in problem.find_curve(problem.whole).points] == [
        integers("acefy"),
        integers("cef"),
    ]


def test_a_curve_of_one_point() -> None:
    problem = problem_of(DEAR, {"x": 0.1}, rest=0.0)
    (point,) = problem.fastest(integers("cefy")).points
    assert (point.time, point.noise, point.sqnr_db) == (pytest.approx(7.3 / 5), 0, math.inf)
    assert problem.fastest(problem.whole).float_time == pytest.approx(1.1 * 403 / 5)


def test_the_time_is_that_of_the_cpu_where_it_is_most() -> None:
    """Twice and three times as long in float: 3, and a tenth for want of trust, whatever both together are cut by."""
    own = PlacementProblem(dict.fromkeys(PLAN.integer, NodeCost(1.0, 1.0)), [])
    each = [PlacementProblem(dict.fromkeys(PLAN.integer, NodeCost(times, 1.0)), []) for times in (2.0, 3.0)]
    problem = PrecisionProblem.of(MODEL, PLAN, own, [], each)
    assert problem.describe(frozenset()).time == pytest.approx(1.1 * 3.0)
    assert problem.describe(problem.whole).time == pytest.approx(1.0)
