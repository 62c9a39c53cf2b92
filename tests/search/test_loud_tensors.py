"""Which tensors stay float for what the outputs lose to them, and at which price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Value
from qconv.planning.placement import FloatCost
from qconv.planning.planner import make_plan
from qconv.search.loud_tensors import TensorNoise, keep_loud_tensors_float
from tests.support.models import loaded, network

BODY = "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<group=32, pads=[1,1,1,1]>(b, v) d = Relu(c) y = Conv(d, u)"
MODEL = loaded(
    network(
        BODY,
        x=(1, 3, 64, 64),
        w=np.ones((32, 3, 3, 3), np.float32),
        v=np.ones((32, 1, 3, 3), np.float32),
        u=np.ones((8, 32, 1, 1), np.float32),
    )
)
RECIPE = Recipe()
PLAN = make_plan(MODEL, RECIPE, TARGETS["ort-cpu"])
VALUES: dict[str, Value] = {value.name or "": value for value in PLAN.activations}


def kept(budget: float | None, **noises: float) -> set[str]:
    found = [TensorNoise((VALUES[name[0]],), noise) for name, noise in noises.items()]
    recipe = replace(RECIPE, float_budget=budget)
    return set(keep_loud_tensors_float(MODEL, PLAN, recipe, None, found))


def test_the_nodes_around_the_loudest_stay_float() -> None:
    """b is written by a with its Relu, and read by c: these, and what is cheaper beside them."""
    assert {"a", "c"} <= kept(1.0, b=0.5, d=0.001)
    assert kept(1.0, x=0.001, b=0.001, d=0.5) >= {"c", "y"}


@pytest.mark.parametrize(
    ("budget", "noises"),
    [
        (0.0, {"b": 0.5}),  # nothing may be spent
        (1.0, {"b": 0.009}),  # outputs of 20 dB and more need no help
        (1.0, dict.fromkeys(("x", "b", "d", "y", "b2"), 0.1)),  # no tensor is a quarter of all
        (1.0, {}),
    ],
)
def test_nothing_is_spent(budget: float, noises: dict[str, float]) -> None:
    assert kept(budget, **noises) == set()


def test_dense_layers_are_too_dear() -> None:
    """They take some three times as long in float."""
    model = loaded(
        network("a = Conv(x, w) b = Relu(a) y = Conv(b, v)", x=(1, 64, 32, 32), w=(64, 64, 3, 3), v=(64, 64, 3, 3))
    )
    plan = make_plan(model, RECIPE, TARGETS["ort-cpu"])
    noise = [TensorNoise(tuple(value for value in plan.activations if value.name == "b"), 0.5)]
    assert keep_loud_tensors_float(model, plan, RECIPE, None, noise) == {}
    assert set(keep_loud_tensors_float(model, plan, replace(RECIPE, float_budget=1.0), None, noise)) <= {"a", "b", "y"}


def test_a_price_is_what_the_table_says() -> None:
    """The network with a node in float, over the network without: by the placement's own sums."""
    cost = FloatCost.of(MODEL, PLAN, RECIPE, None)
    nodes = {node.name: node for node in PLAN.integer}
    problem = cost.problem
    expected = problem.time(PLAN.integer - {nodes["c"]}) / problem.time(PLAN.integer) - 1
    assert cost.share_of({nodes["c"]}) == pytest.approx(expected)
    assert cost.share_of(set()) == 0
    assert nodes["c"] in cost.spread({nodes["c"]})


def test_other_targets_have_no_table() -> None:
    recipe = replace(RECIPE, target="generic")
    noise = [TensorNoise((VALUES["b"],), 0.5)]
    assert keep_loud_tensors_float(MODEL, PLAN, recipe, None, noise) == {}
