"""The oracle is ONNX Runtime: it runs the model before and after, its own optimizations off."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.errors import Change, Skipped
from qconv.ir.layers import input_means_of
from qconv.ir.model import constant_array
from qconv.passes.fold import run_float_passes
from tests.passes.test_fold import folded
from tests.support.models import loaded, network, op_types, statistics

X = (2, 4, 6, 6)
SAME = "pads=[1,1,1,1]"
NORM = "gamma, beta, mean, var"

MERGED = {
    "1x1 behind 1x1": network("a = Conv(x, w, b) y = Conv(a, v, c)", X, w=(5, 4, 1, 1), b=(5,), v=(3, 5, 1, 1), c=(3,)),
    "1x1 behind 3x3": network(f"a = Conv<{SAME}>(x, w, b) y = Conv(a, v, c)", X,
                              w=(8, 4, 3, 3), b=(8,), v=(3, 8, 1, 1), c=(3,)),
    "strided 1x1 behind strided 3x3": network(
        "a = Conv<pads=[0,1,1,0], strides=[2,1]>(x, w, b) y = Conv<strides=[1,2]>(a, v)", X,
        w=(8, 4, 3, 2), b=(8,), v=(3, 8, 1, 1)),
    "padded 1x1": network("a = Conv<pads=[1,0,0,2]>(x, w, b) y = Conv(a, v)", X,
                          w=(8, 4, 1, 1), b=(8,), v=(3, 8, 1, 1)),
    "3x3 behind 1x1": network("a = Conv(x, w, b) y = Conv<strides=[2,1]>(a, v, c)", X,
                              w=(6, 4, 1, 1), b=(6,), v=(3, 6, 3, 3), c=(3,)),
    "padded 3x3 behind 1x1 without a bias": network(f"a = Conv(x, w) y = Conv<{SAME}, dilations=[1,2]>(a, v, c)", X,
                                                    w=(6, 4, 1, 1), v=(3, 6, 3, 3), c=(3,)),
    "SAME": network('a = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w, b) y = Conv<strides=[2,2]>(a, v)', X,
                    w=(8, 4, 3, 3), b=(8,), v=(3, 8, 1, 1)),
    "4 and 2 groups": network(f"a = Conv<{SAME}, group=4>(x, w, b) y = Conv<group=2>(a, v, c)", X,
                              w=(24, 1, 3, 3), b=(24,), v=(2, 12, 1, 1), c=(2,)),
    "three in a row": network("a = Conv(x, w) b = Conv(a, w, c) y = Conv(b, w)", X, w=(4, 4, 1, 1), c=(4,)),
    "1 axis": network("a = Conv<pads=[1,1]>(x, w, b) y = Conv(a, v)", (2, 4, 9), w=(8, 4, 3), b=(8,), v=(3, 8, 1)),
    "3 axes": network("a = Conv(x, w, b) y = Conv(a, v)", (1, 2, 3, 3, 3),
                      w=(4, 2, 2, 2, 2), b=(4,), v=(2, 4, 1, 1, 1)),
    "open sizes": network("a = Conv(x, w, b) y = Conv(a, v)", ("N", 4, "H", "W"), w=(5, 4, 1, 1), b=(5,),
                          v=(3, 5, 1, 1)),
    "Gemms": network("a = Gemm(x, w, b) y = Gemm<transB=1, alpha=0.5>(a, v, c)", (3, 5),
                     w=(5, 8), b=(8,), v=(4, 8), c=(4,)),
    "transposed first": network("a = Gemm<transB=1>(x, w, b) y = Gemm(a, v)", (3, 5), w=(8, 5), b=(8,), v=(8, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_merged_exactly(case: str) -> None:
    model, findings = folded(MERGED[case])
    (layer,) = model.nodes()
    assert layer.name == "y"
    assert any(isinstance(finding, Change) and finding.step == "merge" for finding in findings)


def test_worked_by_hand() -> None:
    """3 (2 x + 1) + 4 = 6 x + 7, and a second output 5 (2 x + 1)."""
    numbers = {"w": [[2]], "b": [1], "v": [[3, 5]], "c": [4, 0]}
    proto = network("a = Gemm(x, w, b) y = Gemm(a, v, c)", (1, 1), **{n: np.float32(k) for n, k in numbers.items()})
    (layer,) = folded(proto)[0].nodes()
    weight, bias = (constant_array(value) for value in layer.inputs[1:])
    assert weight is not None
    assert bias is not None
    assert (weight.tolist(), bias.tolist()) == ([[6], [10]], [7, 5])


LEFT_ALONE = {
    "depthwise, then 1x1": (f"a = Conv<{SAME}, group=4>(x, w) y = Conv(a, v)", {"w": (4, 1, 3, 3), "v": (4, 4, 1, 1)}),
    "1x1, then depthwise": (f"a = Conv(x, w) y = Conv<{SAME}, group=4>(a, v)", {"w": (4, 4, 1, 1), "v": (4, 1, 3, 3)}),
    "narrow in the middle": ("a = Conv(x, w) y = Conv(a, v)", {"w": (1, 4, 1, 1), "v": (4, 1, 1, 1)}),
    "two larger kernels": ("a = Conv(x, w) y = Conv(a, v)", {"w": (4, 4, 1, 2), "v": (1, 4, 2, 1)}),
    "3x3 behind a stride": ("a = Conv<strides=[2,2]>(x, w) y = Conv(a, v)", {"w": (9, 4, 1, 1), "v": (1, 9, 3, 3)}),
    "an activation between": ("a = Conv(x, w) r = Relu(a) y = Conv(r, w)", {"w": (4, 4, 1, 1)}),
    "another reader": ("a = Conv(x, w) b = Conv(a, w) y = Mul(a, b)", {"w": (4, 4, 1, 1)}),
    "read as the weights": ("a = Conv(k, w) y = Conv(x, a)", {"w": (4, 4, 1, 1), "k": (4, 4, 1, 1)}),
    "a Gemm behind a Conv": ("a = Conv(x, w) f = Flatten(a) y = Gemm(f, v)", {"w": (4, 4, 1, 1), "v": (144, 2)}),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_without_a_word(case: str) -> None:
    body, numbers = LEFT_ALONE[case]
    findings = folded(network(body, X, **numbers))[1]
    assert not [finding for finding in findings if finding.step == "merge"]


def test_a_bias_in_front_of_padding_is_refused() -> None:
    """As in a diverse branch block that was exported without its padding by the bias."""
    proto = network(f"a = Conv(x, w, b) y = Conv<{SAME}>(a, v)", X, w=(4, 4, 1, 1), b=(4,), v=(4, 4, 3, 3))
    model, findings = folded(proto)
    assert op_types(model) == "Conv Conv"
    assert Skipped("merge", "y", "it pads with zeros what Conv a adds a bias to") in findings


def test_returned_tensors_stay() -> None:
    model, _ = folded(network("a = Conv(x, w) y = Conv(a, w)", X, outputs=("y", "a"), w=(4, 4, 1, 1)))
    assert op_types(model) == "Conv Conv"


def test_input_means_are_those_of_the_first() -> None:
    body = f"i = BatchNormalization(x, {NORM}) r = Relu(i) a = Conv(r, w) {{}}"
    found = []
    for end in ("y = Sigmoid(a)", "b = Conv(a, w) y = Sigmoid(b)"):
        model = loaded(network(body.format(end), X, w=(4, 4, 1, 1), **statistics(4)))
        run_float_passes(model)
        assert op_types(model) == "Conv Relu Conv Sigmoid"
        found.append(input_means_of(model.nodes()[2]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("seed", range(30))
def test_chains_drawn_at_random_stay(seed: int) -> None:
    """Of layers with groups, strides and pads, some of which have no bias."""
    rng = np.random.default_rng(seed)
    lines, constants, data, channels = [], {}, "x", 4
    for index in range(3):
        size, groups = int(rng.choice([1, 1, 3])), int(rng.choice([1, 2]))
        outputs = 2 * int(rng.integers(1, 7))
        pads = rng.integers(0, 2, 4).tolist() if size == 3 else [0, 0, 0, 0]
        form = f"group={groups}, strides={rng.integers(1, 3, 2).tolist()}, pads={pads}"
        constants[f"w{index}"] = (outputs, channels // groups, size, size)
        bias = rng.random() < 0.5
        if bias:
            constants[f"b{index}"] = (outputs,)
        name = "y" if index == 2 else f"a{index}"
        lines.append(f"{name} = Conv<{form}>({data}, w{index}{f', b{index}' if bias else ''})")
        data, channels = name, outputs
    folded(network(" ".join(lines), (1, 4, 17, 19), **constants))
