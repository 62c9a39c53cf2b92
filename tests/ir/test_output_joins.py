"""What the last Concat joins an output of, and along which of its axes."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.ir.output_joins import find_joins
from qconv.runtime.output_origins import Join
from tests.support.models import network

W = {"w": np.ones((4, 3, 1, 1), np.float32), "v": np.ones((1, 3, 1, 1), np.float32)}
PAIR = "a = Conv(x, w) b = Conv(x, v) "


@pytest.mark.parametrize(
    ("body", "join"),
    [
        (PAIR + "y = Concat<axis=1>(a, b)", Join(1, (4, 1))),
        (PAIR + "y = Concat<axis=-3>(a, b)", Join(1, (4, 1))),
        (PAIR + "c = Concat<axis=1>(a, b) y = Transpose<perm=[0,2,3,1]>(c)", Join(3, (4, 1))),
        (PAIR + "c = Concat<axis=1>(a, b) d = Concat<axis=1>(a, b) y = Concat<axis=2>(c, d)", Join(1, (4, 1))),
        (PAIR + "c = Concat<axis=1>(a, b) d = Concat<axis=1>(b, a) y = Concat<axis=2>(c, d)", Join(2, (6, 6))),
        (PAIR + "c = Concat<axis=1>(a, b) y = Sigmoid(c)", None),  # a layer or an activation is the end
        ("a = Conv(x, w) y = Identity(a)", None),
    ],
)
def test_joins(body: str, join: Join | None) -> None:
    proto = network(body, x=(1, 3, 6, 6), outputs=("y",), **W)
    assert find_joins(proto) == ({} if join is None else {"y": join})


def test_open_sizes_leave_an_output_out() -> None:
    body = "y = Concat<axis=2>(x, x)"
    assert find_joins(network(body, x=("N", 3, "H", 6), outputs=("y",))) == {}
