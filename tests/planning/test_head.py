"""What is computed of the last layers' results stays float, and what these write keeps its whole range."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.calibration.observer import export_observed_model, observe
from qconv.calibration.sketch import Sketch
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Model
from qconv.planning.eligibility import HEAD_REASON, takes_expectation
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.quantization.parameters import choose_activation_params
from qconv.runtime.session import Session
from tests.support.models import ints, loaded, network

BINS = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)

DFL = """
    a = Conv(x, w) b = Conv(x, v) r = Reshape(a, shape) t = Transpose<perm=[0,2,1,3]>(r) s = Softmax<axis=1>(t)
    e = Conv(s, bins) f = Reshape(e, flat) g = Reshape(b, wide) p = Sigmoid(g) y = Concat<axis=1>(f, p)
"""


def detector(bins: np.ndarray = BINS) -> Model:
    """A head of 4 distributions over 4 bins and 2 scores, on 9 cells."""
    shapes = {"shape": ints(1, 4, 4, 9), "flat": ints(1, 4, 9), "wide": ints(1, 2, 9)}
    return loaded(network(DFL, x=(1, 3, 3, 3), w=(16, 3, 1, 1), v=(2, 3, 1, 1), bins=bins, **shapes))


def planned(model: Model, target: str = "ort-cpu") -> Plan:
    return make_plan(model, Recipe(target=target), TARGETS[target])


@pytest.mark.parametrize("target", ["ort-cpu", "generic", "tensorrt", "openvino"])
def test_the_mean_of_bins_is_no_layer(target: str) -> None:
    """Neither it nor the Softmax in front of it, nor what joins boxes and scores, is on codes."""
    plan = planned(detector(), target)
    assert [layer.node.name for layer in plan.layers] == ["a", "b"]
    assert not {"s", "e", "p", "y"} & {node.name for node in plan.integer}
    assert plan.kept["e"].why == HEAD_REASON
    assert target != "ort-cpu" or plan.kept["s"].why == HEAD_REASON
    assert "y" not in {value.name for value in plan.activations}


def test_other_weights_behind_a_softmax_are_a_layer() -> None:
    plan = planned(detector(BINS + np.float32(0.5)))
    assert [layer.node.name for layer in plan.layers] == ["a", "b", "e"]


@pytest.mark.parametrize(
    ("body", "bins", "expected"),
    [
        ("s = Softmax<axis=1>(x) y = Conv(s, w)", [0, 1, 2], True),
        ("s = Sigmoid(x) y = Conv(s, w)", [0, 1, 2], False),  # no shares
        ("s = Softmax<axis=1>(x) y = Conv(s, w)", [0, 2, 4], False),
        ("s = Softmax<axis=1>(x) y = Conv(s, w)", [2, 1, 0], False),
    ],
)
def test_what_takes_an_expectation(body: str, bins: list[float], expected: bool) -> None:
    model = loaded(network(body, x=(1, 3, 4, 4), w=np.float32(bins).reshape(1, 3, 1, 1)))
    assert takes_expectation(model.nodes()[-1]) is expected


def test_a_rare_logit_is_not_clipped() -> None:
    """One place in thousands is ten times as high as the rest: the range reaches there, as an object may be."""
    model = loaded(network("a = Conv(x, w) y = Sigmoid(a)", x=(1, 1, 64, 64), w=np.ones((1, 1, 1, 1), np.float32)))
    x = np.random.default_rng(0).uniform(-1, 0.5, (1, 1, 64, 64)).astype(np.float32)
    x[0, 0, 5, 7] = 10
    plan = planned(model)
    observers = plan.observers()
    with export_observed_model(model, observers) as runnable:
        sketches: dict[str, Sketch] = observe(Session(runnable, threads=1), observers, [{"x": x}])
    params, _ = choose_activation_params(plan, sketches, Recipe())
    (chosen,) = [found for value, found in params.activations.items() if value.name == "a"]
    low, high = chosen.code_range()
    assert float(low) == pytest.approx(-1, abs=0.05)
    assert float(high) == pytest.approx(10, abs=0.05)
