"""What stands for outputs that a selection puts in an order."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.ir.judged_tensors import find_judged_tensors, find_selections
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


@pytest.mark.parametrize(
    ("body", "scores"),
    [
        # boxes by the places of the best scores, which themselves count as much as they are
        (
            "m = ReduceMax<axes=[2], keepdims=0>(s) v, i = TopK<axis=1>(m, k) j = Unsqueeze(i, last) "
            "y = GatherElements<axis=1>(b, j) z = GatherElements<axis=1>(s, j)",
            {"m": None, "b": ("m", 1, None), "s": None},
        ),
        (
            "q = ReduceMax<axes=[0, 2], keepdims=0>(s) v, i = TopK(q, k) y = Gather<axis=-2>(b, i)",
            {"b": ("q", 1, None)},
        ),
        (
            "t = Transpose<perm=[0, 2, 1]>(s) n = NonMaxSuppression(b, t) y = GatherND(b, n)",
            {"b": ("t", 1, True), "t": None},
        ),
        # all classes of all places in one row: the place is a quotient, or a remainder
        ("f = Flatten(s) v, i = TopK<axis=1>(f, k) j = Div(i, three) y = Gather<axis=1>(b, j)", {"b": ("f", 1, False)}),
        ("f = Flatten(s) v, i = TopK<axis=1>(f, k) j = Mod(i, three) y = Gather<axis=1>(b, j)", {"b": ("f", 1, True)}),
        ("f = Flatten(s) m = ArgMax<axis=1>(f) y = Gather<axis=1>(b, m)", {"f": None, "b": None}),  # no score is known
    ],
)
def test_what_scores_select(body: str, scores: dict[str, tuple[str, int, bool | None] | None]) -> None:
    """Boxes (1, 16, 4) of a Conv, and scores (1, 16, 3)."""
    head = (
        "c = Conv(x, w) f0 = Reshape(c, to_rows) b0 = Transpose<perm=[0, 2, 1]>(f0) b = Relu(b0) "
        "d = Conv(x, u) g0 = Reshape(d, to_scores) s0 = Transpose<perm=[0, 2, 1]>(g0) s = Sigmoid(s0) "
    )
    constants = {"k": ints(2), "last": ints(-1), "three": ints(3)}
    used = {name: array for name, array in constants.items() if f", {name})" in body}
    shapes = {"to_rows": ints(1, 4, 16), "to_scores": ints(1, 3, 16)}
    outputs = [name for name in ("y", "z") if f"{name} = " in body]
    model = loaded(network(head + body, x=(1, 3, 4, 4), outputs=tuple(outputs), w=W, u=W[:3], **shapes, **used))
    found = {
        value.name: selected and (selected.scores.name, selected.axis, selected.classes_first)
        for value, selected in find_selections(model).items()
    }
    assert {name: found[name] for name in scores} == scores
