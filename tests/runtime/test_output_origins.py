"""What computes outputs, read off graphs of a few nodes."""

from __future__ import annotations

import pytest

from qconv.runtime.output_origins import OutputOrigin, find_output_origins
from tests.support.models import network


@pytest.mark.parametrize(
    ("body", "operators", "kernel"),
    [
        ("c = Conv(x, w) r = Relu(c) y = Sigmoid(r)", ("Sigmoid", "Relu", "Conv"), 9),
        ("c = Conv(x, w) f = Flatten(c) y = Cast<to=1>(f)", ("Conv",), 9),  # values that only move
        ("c = Conv(x, w) a = ArgMax<axis=1>(c) y = Cast<to=2>(a)", ("ArgMax", "Conv"), 9),
        ("c = Conv(x, w) y = Concat<axis=1>(c, c)", ("Concat",), None),  # two ways meet
        ("c = Conv(x, w) n = ReduceL2<axes=[1]>(c) y = Div(c, n)", ("LpNormalization",), None),
        ("c = Conv(x, w) e = Exp(c) s = ReduceSum(e) y = Div(e, s)", ("Softmax",), None),
        ("y = Relu(x)", ("Relu",), None),
    ],
)
def test_the_way_back_to_the_last_layer(body: str, operators: tuple[str, ...], kernel: int | None) -> None:
    used = {"w": (4, 3, 3, 3)} if "w)" in body else {}
    assert find_output_origins(network(body, **used)) == {"y": OutputOrigin(operators, kernel)}
