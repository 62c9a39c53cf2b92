"""Which shapes depend on the data, by the definition in the module."""

from __future__ import annotations

import pytest

from qconv.ir.data_shapes import find_data_shaped
from tests.support.models import ints, loaded, network

CASES = {
    "NonZero and all behind it": ("k = NonZero(x)  t = Transpose(k)  y = GatherND(x, t)", {}, "k t y"),
    "a shape is known, its tensor not": ("k = NonZero(x)  s = Shape(k)  y = Expand(c, s)", {"c": 1.0}, "k y"),
    "sizes of the data": ("n = Cast<to=7>(x)  f = Reshape(n, m)  y = Reshape(x, f)", {"m": ints(-1)}, "y"),
    "sizes of a shape": ("s = Shape(x)  y = Reshape(x, s)", {}, ""),
    "a constant slice": ("y = Slice(x, a, b)", {"a": ints(0), "b": ints(1)}, ""),
    "rows by a threshold": ("g = Greater(x, c)  f = Reshape(g, m)  y = Compress(x, f)", {"c": 0.0, "m": ints(-1)}, "y"),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_that_depend_on_the_data(case: str) -> None:
    body, constants, expected = CASES[case]
    model = loaded(network(body, x=(2, 3), **constants))
    assert sorted(value.name or "" for value in find_data_shaped(model)) == sorted(expected.split())
