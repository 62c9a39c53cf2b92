"""Where the range of an activation's input may end. Oracle: the activations themselves, computed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.planning.plan import ActivationGate, find_activation_gate
from tests.support.models import loaded, network, run

CONSTANTS = {"three": 3.0, "zero": 0.0, "six": 6.0}
SILU = {"SiLU": "s = Sigmoid(x) y = Mul(x, s)", "SiLU, other order": "s = Sigmoid(x) y = Mul(s, x)"}
HARD = {
    "HardSwish": "y = HardSwish(x)",
    "HardSwish of its parts": "s = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, s)",
    "HardSigmoid's own slope": "s = HardSigmoid(x) y = Mul(x, s)",
    "HardSwish with Clip": "a = Add(x, three) s = Clip(a, zero, six) y = Mul(x, s)",
}


def activation(body: str) -> onnx.ModelProto:
    used = {name: number for name, number in CONSTANTS.items() if name in body}
    return network(body, x=("N", 8), opset=17, **used)


def gate_in(proto: onnx.ModelProto) -> ActivationGate | None:
    model = loaded(proto)
    return find_activation_gate(model, model.graph.inputs[0])


@pytest.mark.parametrize("body", [*SILU.values(), *HARD.values()], ids=[*SILU, *HARD])
@pytest.mark.parametrize("step", [0.001, 0.02, 0.3])
def test_below_the_floor_everything_is_within_a_quarter_of_a_step_of_zero(body: str, step: float) -> None:
    proto = activation(body)
    gate = gate_in(proto)
    assert gate is not None
    assert gate.product.name == "y"
    below = gate.floor(step) - np.linspace(0, 30, 80).reshape(10, 8)
    assert np.abs(run(proto, {"x": below.astype(np.float32)})["y"]).max() <= step / 4 * 1.001


@pytest.mark.parametrize("body", list(SILU.values()), ids=list(SILU))
def test_above_silus_floor_more_than_a_quarter_of_a_step_comes_out(body: str) -> None:
    """So that no code is given away for nothing."""
    proto = activation(body)
    gate = gate_in(proto)
    assert gate is not None
    above = np.full((1, 8), gate.floor(0.02) + 0.01, np.float32)
    assert np.all(run(proto, {"x": above})["y"] < -0.02 / 4)


def test_a_step_larger_than_silus_dip_ends_the_range_at_the_dip() -> None:
    """x / (1 + exp(-x)) is never below -0.27846, which it is at -1.27846."""
    gate = gate_in(activation(SILU["SiLU"]))
    assert gate is not None
    assert gate.floor(4.0) == pytest.approx(-1.27846, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "closed_at"), list(zip(HARD.values(), [-3, -3, -2.5, -3], strict=True)), ids=list(HARD)
)
def test_hard_gates_close_where_their_line_crosses_zero(body: str, closed_at: float) -> None:
    gate = gate_in(activation(body))
    assert gate is not None
    assert gate.closed_at == pytest.approx(closed_at, abs=1e-5)


def test_a_gate_that_closes_may_have_other_readers() -> None:
    """What it gives below is zero to all of them."""
    assert gate_in(activation("s = HardSigmoid(x) p = Mul(x, s) y = Add(p, s)")) is not None


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid(x) z = Mul(x, s) y = Add(z, x)",  # the skip connection sees all of x
        "s = Sigmoid(x) t = Relu(s) y = Mul(t, x)",
        "s = Sigmoid(x) y = Add(x, s)",
        "s = Tanh(x) y = Mul(x, s)",  # goes to -x on the left
        "s = HardSigmoid<alpha=-0.2>(x) y = Mul(x, s)",  # closed on the right
        "a = Add(x, three) s = Clip(a, three, six) y = Mul(x, s)",  # never closed
        "a = Add(x, x) s = Relu(a) y = Mul(x, s)",  # no constant
        "s = Sigmoid(x) p = Mul(x, s) y = Add(p, s)",  # so near zero and zero are not the same
        "y = Sigmoid(x)",
        "y = Mul(x, x)",
    ],
)
def test_what_sees_all_of_the_range_is_no_gate(body: str) -> None:
    assert gate_in(activation(body)) is None
