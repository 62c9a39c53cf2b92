"""What stands for outputs that a selection puts in an order."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.ir.judged_tensors import find_judged_tensors
from tests.support.models import ints, loaded, network

W = np.ones((4, 3, 1, 1), np.float32)
HEAD = "c = Conv(x, w) f = Flatten(c) "


@pytest.mark.parametrize(
    ("body", "outputs", "judged"),
    [
        ("y = Conv(x, w)", ("y",), ["y"]),
        (HEAD + "s = Sigmoid(f) y, i = TopK<axis=1>(s, k)", ("y", "i"), ["s"]),  # the best, and where they are
        (HEAD + "s = Sigmoid(f) v, i = TopK<axis=1>(s, k) y = GatherElements<axis=1>(f, i)", ("y",), ["s", "f"]),
        ("c = Conv(x, w) y = ArgMax<axis=1>(c)", ("y",), ["c"]),
        ("c = Conv(x, w) y = Cast<to=7>(c)", ("y",), ["c"]),  # whole numbers, one by one
        ("c = Conv(x, w) y = Gather<axis=1>(c, j)", ("y",), ["y"]),  # rows that are always the same
        # what is selected first is found behind what is selected last
        (
            HEAD + "v, i = TopK<axis=1>(f, k) g = GatherElements<axis=1>(f, i) y, j2 = TopK<axis=1>(g, one)",
            ("y",),
            ["f"],
        ),
        # a network that goes on behind a selection is judged by what it says
        ("a = Conv(x, w) m = ArgMax<axis=1>(a) b = Cast<to=1>(m) y = Conv(b, v)", ("y",), ["y"]),
    ],
)
def test_what_is_judged(body: str, outputs: tuple[str, ...], judged: list[str]) -> None:
    constants = {"w": W, "v": np.ones((2, 1, 1, 1), np.float32), "k": ints(2), "j": ints(0, 2), "one": ints(1)}
    used = {name: array for name, array in constants.items() if f"{name})" in body or f", {name}" in body}
    model = loaded(network(body, x=(1, 3, 4, 4), outputs=outputs, **used))
    assert [value.name for value in find_judged_tensors(model)] == judged
