"""The oracle is ONNX Runtime: it runs the model before and after on random input, its own optimizations off."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.errors import Change, Finding, Skipped
from qconv.ir.data_shapes import find_data_shaped
from qconv.ir.files import Source, read_proto
from qconv.ir.load import load
from qconv.ir.model import Model, constant_array
from qconv.passes import fold
from qconv.passes.fold import run_float_passes
from qconv.runtime.session import Session
from tests.support.models import ints, loaded, network, op_types, random_feeds, run, statistics

BN = "BatchNormalization"
NORM = "gamma, beta, mean, var"


def folded(proto: onnx.ModelProto, tolerance: float = 1e-5) -> tuple[Model, list[Finding]]:
    """Fold, and check that names, shapes and numbers of the outputs stay, and that a second fold changes nothing."""
    model = loaded(proto)
    findings = run_float_passes(model)
    feeds = random_feeds(proto)
    before, after = run(proto, feeds), run(model, feeds)
    assert list(before) == list(after)
    for name, numbers in before.items():
        assert after[name].shape == numbers.shape
        np.testing.assert_allclose(after[name], numbers, rtol=0, atol=tolerance * max(np.abs(numbers).max(), 1e-3))
    assert not [finding for finding in run_float_passes(model) if isinstance(finding, Change)]
    onnx.checker.check_model(model.proto(), full_check=True)
    return model, findings


# -- what is done ------------------------------------------------------------------------------------------------------

W = (4, 3, 3, 3)  # of a Conv from 3 to 4 channels
POSITIVE = np.float32([0.5, 1.0, 2.0])

SIMPLIFIED = {
    "identity": (network("a = Identity(x) y = Sigmoid(a)"), "Sigmoid"),
    "identity as output": (network("a = Sigmoid(x) y = Identity(a)"), "Sigmoid"),
    "dropout": (network("a = Dropout(x, half) y = Sigmoid(a)", half=0.5), "Sigmoid"),
    "dropout, told not to train": (
        network("a = Dropout(x, half, no) y = Sigmoid(a)", half=0.5, no=np.array(False)),
        "Sigmoid",
    ),
    "sum of two": (network("a = Sigmoid(x) y = Sum(a, x)"), "Sigmoid Add"),
    "sum of one": (network("a = Sigmoid(x) y = Sum(a)"), "Sigmoid"),
    "sum of three stays": (network("a = Sigmoid(x) y = Sum(a, x, x)"), "Sigmoid Sum"),
    "pad": (network("a = Pad(x, p) y = Conv(a, w)", p=ints(0, 0, 1, 2, 0, 0, 0, 1), w=W), "Conv"),
    "pad and padding": (
        network("a = Pad(x, p) y = Conv<pads=[1,1,0,2], strides=[2,1]>(a, w)", p=ints(0, 0, 1, 2, 0, 0, 0, 1), w=W),
        "Conv",
    ),
    "pad before valid": (
        network('a = Pad(x, p, z) y = Conv<auto_pad="VALID">(a, w)', p=ints(0, 0, 1, 1, 0, 0, 1, 1), z=0.0, w=W),
        "Conv",
    ),
    "pad with axes": (
        network("a = Pad(x, p, , ax) y = Conv(a, w)", opset=18, p=ints(2, 1, 0, 1), ax=ints(-1, 2), w=W),
        "Conv",
    ),
    "resize with axes": (
        network('y = Resize<axes=[2,-1], mode="linear">(x, , , s)', opset=18, s=ints(12, 9)),
        "Resize",
    ),
    "resize with axes behind an open batch": (
        network('y = Resize<axes=[-1,2], mode="cubic">(x, , , s)', x=("N", 3, 6, 6), opset=18, s=ints(12, 9)),
        "Resize",
    ),
    "resize to sizes that no scale gives": (
        network('y = Resize<axes=[2], mode="linear">(x, , , s)', x=("N", 3, 3, 6), opset=18, s=ints(5)),
        "Shape Where Resize",
    ),
    "resize by scales with axes": (
        network("y = Resize<axes=[3,2]>(x, , s)", opset=18, s=np.float32([1.5, 2])),
        "Resize",
    ),
    "resize by scales of open sizes": (
        network(
            "r = Reshape(x, p) y = Resize<axes=[2,3]>(r, , s)", p=ints(2, 3, 4, -1), opset=18, s=np.float32([1.5, 2])
        ),
        "Reshape Resize",
    ),
    "resize behind an unknown rank": (
        network(
            "h = Shape(x) t = Identity(h) r = Reshape(x, t) y = Resize<axes=[2,3]>(r, , s)",
            opset=18,
            x=("N", 3, "H", "W"),
            s=np.float32([1.5, 2]),
        ),
        "Shape Reshape Resize",
    ),
    "resize in proportion": (
        network('y = Resize<axes=[2,3], keep_aspect_ratio_policy="not_larger">(x, , , s)', opset=18, s=ints(12, 9)),
        "Resize",
    ),
    "resize in proportion that is rounded": (
        network('y = Resize<axes=[2,3], keep_aspect_ratio_policy="not_larger">(x, , , s)', opset=18, s=ints(13, 10)),
        "Reshape Resize",
    ),
    "resize in proportion that crops": (
        network(
            'y = Resize<axes=[2,3], coordinate_transformation_mode="tf_crop_and_resize",'
            ' keep_aspect_ratio_policy="not_larger">(x, area, , s)',
            opset=18,
            area=np.float32([0.1, 0.1, 0.8, 0.8]),
            s=ints(12, 9),
        ),
        "Reshape Resize",
    ),
    "cubic resize that shrinks": (
        network('y = Resize<mode="cubic">(x, , s)', s=np.float32([1, 1, 0.5, 1.5])),
        "Reshape Resize",
    ),
    "cubic resize between": (
        network('a = Sigmoid(x) r = Resize<mode="cubic">(a, , , s) y = Tanh(r)', x=("N", 3, 6, 6), s=ints(2, 3, 4, 4)),
        "Sigmoid Reshape Resize Reshape Tanh",
    ),
    "cubic resize that grows": (network('y = Resize<mode="cubic">(x, , s)', s=np.float32([1, 1, 2, 1])), "Resize"),
    "pad before two": (
        network("a = Pad(x, p) b = Conv(a, w) c = Conv(a, v) y = Mul(b, c)", p=ints(0, 0, 1, 1, 0, 0, 1, 1), w=W, v=W),
        "Conv Conv Mul",
    ),
    "mean": (network("y = ReduceMean<axes=[2,3]>(x)"), "GlobalAveragePool"),
    "mean, rank 2": (network("y = ReduceMean<axes=[-1,-2], keepdims=0>(x)"), "GlobalAveragePool Flatten"),
    "mean, opset 18": (network("y = ReduceMean(x, ax)", opset=18, ax=ints(2, 3)), "GlobalAveragePool"),
    "mean over channels stays": (network("y = ReduceMean<axes=[1,2]>(x)"), "ReduceMean"),
    "mean of sequences stays": (network("y = ReduceMean<axes=[2]>(x)", x=(2, 3, 5)), "ReduceMean"),
    "average over all": (network("y = AveragePool<kernel_shape=[6,6]>(x)"), "GlobalAveragePool"),
    "average over some stays": (network("y = AveragePool<kernel_shape=[6,5]>(x)"), "AveragePool"),
    "padded average stays": (network("y = AveragePool<kernel_shape=[6,6], pads=[1,1,1,1]>(x)"), "AveragePool"),
    "matmul": (network("y = MatMul(x, w)", x=(2, 5), w=(5, 4)), "Gemm"),
    "matmul and bias": (network("a = MatMul(x, w) y = Add(a, b)", x=(2, 5), w=(5, 4), b=(4,)), "Gemm"),
    "matmul and wide bias": (network("a = MatMul(x, w) y = Add(b, a)", x=(2, 5), w=(5, 4), b=(1, 4)), "Gemm"),
    "matmul of three axes stays": (network("y = MatMul(x, w)", x=(2, 3, 5), w=(5, 4)), "MatMul"),
    "division": (network("a = Sigmoid(x) y = Div(a, c)", c=3.0), "Sigmoid Mul"),
    "subtraction": (network("a = Sigmoid(x) y = Sub(a, c)", c=(6, 6)), "Sigmoid Add"),
    "division of sizes stays": (network("y = Div(x, c)", x=(3,), c=3.0), "Div"),
    "relu twice": (network("a = Relu(x) y = Relu(a)"), "Relu"),
    "relu behind relu6": (network("a = Clip(x, z, s) y = Relu(a)", z=0.0, s=6.0), "Clip"),
    "relu6 behind relu": (network("a = Relu(x) y = Clip(a, z, s)", z=0.0, s=6.0), "Clip"),
    "relu6 behind a shared relu": (
        network("a = Relu(x) b = Clip(a, z, s) y = Add(a, b)", z=0.0, s=6.0),
        "Relu Clip Add",
    ),
    "clip at zero": (network("y = Clip(x, z)", z=0.0), "Relu"),
    "clip at nothing": (network("a = Clip(x) y = Sigmoid(a)"), "Sigmoid"),
    "clip inside out stays": (network("y = Clip(x, a, b)", a=2.0, b=1.0), "Clip"),
}


@pytest.mark.parametrize("case", SIMPLIFIED)
def test_simplified(case):
    proto, expected = SIMPLIFIED[case]
    assert op_types(folded(proto)[0]) == expected


GEMMS = {
    "alpha": network("y = Gemm<alpha=0.5>(x, w, b)", x=(2, 5), w=(5, 4), b=(4,)),
    "beta, transposed": network("y = Gemm<beta=3.0, transB=1>(x, w, b)", x=(2, 5), w=(4, 5), b=(4,)),
    "scalar C": network("y = Gemm(x, w, b)", x=(2, 5), w=(5, 4), b=2.0),
    "wide C": network("y = Gemm(x, w, b)", x=(2, 5), w=(5, 4), b=(1, 4)),
    "C of one, one output": network("y = Gemm<beta=2.0>(x, w, b)", x=(2, 5), w=(5, 1), b=(1, 1)),
    "no C": network("y = Gemm<alpha=2.0, beta=3.0>(x, w)", x=(2, 5), w=(5, 4)),
}


@pytest.mark.parametrize("case", GEMMS)
def test_gemm_is_normalised(case):
    model, _ = folded(GEMMS[case])
    (gemm,) = model.nodes()
    assert not {"alpha", "beta"} & set(gemm.attributes)
    bias = constant_array(gemm.inputs[2]) if len(gemm.inputs) > 2 else None
    assert (bias is None) if case == "no C" else bias.shape == (1 if "one" in case else 4,)


LAYERS = {
    "Conv": ("c = Conv(x, w, b)", {"w": W, "b": (4,)}),
    "Conv without bias": ("c = Conv(x, w)", {"w": W}),
    "grouped Conv": ("c = Conv<group=3, pads=[1,1,1,1]>(x, w, b)", {"w": (6, 1, 3, 3), "b": (6,)}),
    "ConvTranspose": ("c = ConvTranspose<strides=[2,2]>(x, w, b)", {"w": (3, 4, 3, 3), "b": (4,)}),
    "grouped ConvTranspose": (
        "c = ConvTranspose<group=2, strides=[2,2], output_padding=[1,1]>(x, w)",
        {"w": (4, 3, 2, 2), "x": (2, 4, 5, 5)},
    ),
    "Conv of sequences": ("c = Conv(x, w)", {"w": (4, 3, 3), "x": (2, 3, 8)}),
    "Gemm": ("c = Gemm(x, w)", {"w": (5, 4), "x": (2, 5)}),
    "transposed Gemm": ("c = Gemm<transB=1, alpha=0.5>(x, w, b)", {"w": (4, 5), "b": (4,), "x": (2, 5)}),
    "MatMul": ("c = MatMul(x, w)", {"w": (5, 4), "x": (2, 5)}),
}
BEHIND = {
    BN: f"y = {BN}<epsilon=0.01>(c, {NORM})",
    "Mul": "y = Mul(c, k)",
    "Add": "y = Add(k, c)",
    "Sub": "y = Sub(c, k)",
    "Sub from": "y = Sub(k, c)",
    "Div": "y = Div(c, k)",
    "Div by a number": "y = Div(c, number)",
    "Scale": "s = Mul(c, k) y = Add(s, k)",
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("layer", LAYERS)
def test_folds_into_the_layer_before(layer, behind):
    body, constants = LAYERS[layer]
    axes = len(constants["w"])
    channels = 6 if layer.startswith("grouped") else 4
    k = np.linspace(0.5, 2, channels, dtype=np.float32).reshape(-1, *[1] * (axes - 2))
    proto = network(f"{body} {BEHIND[behind]}", **constants, **statistics(channels), k=k, number=7.0)
    model, findings = folded(proto)
    assert op_types(model) == layer.split()[-1 if "of" not in layer and "without" not in layer else 0].replace(
        "MatMul", "Gemm"
    )
    assert {finding.where for finding in findings} == {"c"}
    assert model.graph.outputs[0].name == "y"


def test_a_matmul_of_three_axes_takes_a_scale():
    model, _ = folded(network("c = MatMul(x, w) y = Mul(c, k)", x=(2, 3, 5), w=(5, 4), k=(4,)))
    assert op_types(model) == "MatMul"


AHEAD = {
    "Conv": (network(f"a = {BN}(x, {NORM}) y = Conv(a, w, b)", **statistics(3), w=W, b=(4,)), "Conv"),
    "grouped Conv": (network(f"a = {BN}(x, {NORM}) y = Conv<group=3>(a, w)", **statistics(3), w=(6, 1, 2, 2)), "Conv"),
    "two Convs": (
        network(f"a = {BN}(x, {NORM}) b = Conv(a, w) c = Conv(a, v) y = Mul(b, c)", **statistics(3), w=W, v=W),
        "Conv Conv Mul",
    ),
    "Gemm": (network(f"a = {BN}(x, {NORM}) y = Gemm(a, w)", x=(2, 5), **statistics(5), w=(5, 4)), "Gemm"),
    "MatMul": (network(f"a = {BN}(x, {NORM}) y = MatMul(a, w)", x=(2, 5), **statistics(5), w=(5, 4)), "Gemm"),
    "Flatten": (
        network(f"a = {BN}(x, {NORM}) f = Flatten(a) y = Gemm<transB=1>(f, w)", **statistics(3), w=(4, 108)),
        "Flatten Gemm",
    ),
    "Flatten, size not known": (
        network(f"a = {BN}(x, {NORM}) f = Flatten(a) y = Gemm(f, w)", x=(2, 3, "H", "V"), **statistics(3), w=(12, 4)),
        "Flatten Gemm",
    ),
    "Reshape": (
        network(f"a = {BN}(x, {NORM}) f = Reshape(a, s) y = Gemm(f, w)", **statistics(3), s=ints(-1, 108), w=(108, 4)),
        "Reshape Gemm",
    ),
    "global pool": (
        network(
            f"a = {BN}(x, {NORM}) p = GlobalAveragePool(a) f = Squeeze(p, s) y = Gemm(f, w)",
            **statistics(3),
            s=ints(2, 3),
            w=(3, 4),
        ),
        "GlobalAveragePool Squeeze Gemm",
    ),
    "average pool": (
        network(f"a = {BN}(x, {NORM}) p = AveragePool<kernel_shape=[2,2]>(a) y = Conv(p, w)", **statistics(3), w=W),
        "AveragePool Conv",
    ),
    "max pool, padded": (
        network(
            f"a = {BN}(x, {NORM}) p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(a) y = Conv(p, w)",
            **statistics(3, gamma=POSITIVE),
            w=W,
        ),
        "MaxPool Conv",
    ),
    "scale, padded Conv": (
        network("a = Mul(x, k) y = Conv<pads=[1,1,1,1]>(a, w)", k=(1, 3, 1, 1), w=W),
        "Conv",
    ),
    "pixels / 255": (network("a = Div(x, k) y = Conv<pads=[1,1,1,1]>(a, w)", k=255.0, w=W), "Conv"),
    "pixels - mean": (network("a = Sub(x, k) y = Conv(a, w)", k=(3, 1, 1), w=W), "Conv"),
    "1 - pixels": (network("a = Sub(k, x) y = Conv(a, w)", k=1.0, w=W), "Conv"),
    "(pixels - mean) / std": (network("a = Sub(x, m) b = Div(a, s) y = Conv(b, w)", m=(3, 1, 1), s=2.0, w=W), "Conv"),
    "scale, ConvTranspose": (
        network("a = Mul(x, k) y = ConvTranspose<group=3>(a, w)", k=(3, 1, 1), w=(3, 2, 2, 2)),
        "ConvTranspose",
    ),
    "Shape reads it too": (
        network(
            f"a = {BN}(x, {NORM}) s = Shape<start=0, end=1>(a) t = Concat<axis=0>(s, rest) f = Reshape(a, t) "
            "y = Gemm(f, w)",
            **statistics(3),
            rest=ints(-1),
            w=(108, 4),
        ),
        "Shape Concat Reshape Gemm",
    ),
    "hard swish": (
        network(
            "c = Conv(x, w) a = Add(c, three) b = Clip(a, zero, six) m = Mul(c, b) d = Div(m, six) y = Conv(d, v)",
            w=W,
            v=(2, 4, 1, 1),
            three=3.0,
            zero=0.0,
            six=6.0,
        ),
        "Conv Add Clip Mul Conv",
    ),
}


@pytest.mark.parametrize("case", AHEAD)
def test_folds_into_the_layers_behind(case):
    proto, expected = AHEAD[case]
    assert op_types(folded(proto)[0]) == expected


DEPTHWISE = {
    "norm alone": network(f"a = Relu(x) y = {BN}(a, {NORM})", **statistics(3)),
    "scale": network("a = Relu(x) y = Mul(k, a)", k=(3, 1, 1)),
    "scale and shift": network("a = Relu(x) b = Mul(a, k) y = Add(b, l)", k=(1, 3, 1, 1), l=(3, 1, 1)),
    "shared scale and one shift": network("a = Relu(x) b = Div(a, k) y = Sub(b, l)", k=(1, 3, 1, 1), l=2.0),
}


@pytest.mark.parametrize("case", DEPTHWISE)
def test_what_is_left_becomes_a_depthwise_conv(case):
    model, _ = folded(DEPTHWISE[case])
    assert op_types(model) == "Relu Conv"
    conv = model.nodes()[1]
    assert conv.attributes["group"].value == 3
    assert constant_array(conv.inputs[1]).shape == (3, 1, 1, 1)


def test_the_shapes_of_data_are_looked_for_once(monkeypatch):
    """For all scales together: the search goes through the whole network."""
    calls = []

    def counted(model: Model) -> set:
        calls.append(model)
        return find_data_shaped(model)

    monkeypatch.setattr(fold, "find_data_shaped", counted)
    scales = " ".join(f"s{i} = Sigmoid({f'm{i - 1}' if i else 'x'}) m{i} = Mul(s{i}, k)" for i in range(4))
    model = loaded(network(f"{scales} y = Sigmoid(m3)", x=("N", 3, "H", "W"), k=(3, 1, 1)))
    fold.make_depthwise(model)
    assert op_types(model) == "Sigmoid Conv " * 4 + "Sigmoid"
    assert len(calls) == 1


MOVERS = {
    "MaxPool": ("m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)", {}),
    "Reshape": ("m = Reshape(c, s)", {"s": ints(2, -1)}),
    "Flatten": ("m = Flatten(c)", {}),
    "Transpose": ("m = Transpose<perm=[0,2,3,1]>(c)", {}),
    "Unsqueeze": ("m = Unsqueeze(c, s)", {"s": ints(4)}),
    "Slice": ("m = Slice(c, s, e, ax)", {"s": ints(1), "e": ints(3), "ax": ints(2)}),
    "Resize": ('m = Resize<mode="nearest">(c, , k)', {"k": np.float32([1, 1, 2, 2])}),
    "DepthToSpace": ("m = DepthToSpace<blocksize=2>(c)", {}),
}


@pytest.mark.parametrize("activation", ["Relu(m)", "Clip(m, low, high)"])
@pytest.mark.parametrize("mover", MOVERS)
def test_activation_moves_before(mover, activation):
    body, constants = MOVERS[mover]
    proto = network(f"c = Conv(x, w, b) {body} y = {activation}", w=W, b=(4,), low=-0.5, high=0.75, **constants)
    model, findings = folded(proto)
    assert op_types(model) == f"Conv {activation.split('(')[0]} {mover}"
    assert Change("hoist", "y", f"{activation.split('(')[0]} moved before {mover} m") in findings


def test_activation_moves_before_concat_in_copies_and_on():
    body = "c = Conv(x, w) p = MaxPool<kernel_shape=[1,1]>(c) d = Conv(x, v) m = Concat<axis=1>(p, d) y = Relu(m)"
    model, _ = folded(network(body, w=W, v=W))
    assert Counter(op_types(model).split()) == {"Conv": 2, "Relu": 2, "MaxPool": 1, "Concat": 1}
    assert {node.inputs[0].producer().op_type for node in model.nodes() if node.op_type == "Relu"} == {"Conv"}


# -- what is refused ---------------------------------------------------------------------------------------------------

PAD1 = ints(0, 0, 1, 1, 0, 0, 1, 1)
REFUSED = {
    "mask of a dropout": (
        network("a, m = Dropout(x) f = Cast<to=1>(m) y = Mul(a, f)"),
        Skipped("simplify", "a", "its mask is used"),
    ),
    "identity between input and output": (
        network("y = Identity(x)"),
        Skipped("simplify", "y", "the model returns its output under a name that must stay"),
    ),
    "pad with ones": (
        network("a = Pad(x, p, one) y = Conv(a, w)", p=PAD1, one=1.0, w=W),
        Skipped("simplify", "a", "it does not pad with zeros"),
    ),
    "pad by reflection": (
        network('a = Pad<mode="reflect">(x, p) y = Conv(a, w)', p=PAD1, w=W),
        Skipped("simplify", "a", "it does not pad with zeros"),
    ),
    "pad of channels": (
        network("a = Pad(x, p) y = Conv(a, w)", p=ints(0, 1, 0, 0, 0, 0, 0, 0), w=(4, 4, 3, 3)),
        Skipped("simplify", "a", "it pads more than height and width"),
    ),
    "pad that crops": (
        network("a = Pad(x, p) y = Conv(a, w)", p=-PAD1, w=W),
        Skipped("simplify", "a", "it crops"),
    ),
    "pad with another reader": (
        network("a = Pad(x, p) c = Conv<pads=[1,1,1,1]>(a, w) y = Mul(c, a)", p=PAD1, w=(3, 3, 3, 3)),
        Skipped("simplify", "a", "Mul y reads it too"),
    ),
    "pad that the model returns": (
        network("a = Pad(x, p) y = Conv(a, w)", p=PAD1, w=W, outputs=["y", "a"]),
        Skipped("simplify", "a", "the model returns its output"),
    ),
    "pad before automatic padding": (
        network('a = Pad(x, p) y = Conv<auto_pad="SAME_UPPER">(a, w)', p=PAD1, w=W),
        Skipped("simplify", "a", "Conv y computes its own padding (auto_pad)"),
    ),
    "division by zero": (
        network("c = Sigmoid(x) d = Div(c, z) y = Clip(d, l, h)", z=0.0, l=-1.0, h=1.0),
        Skipped("simplify", "d", "it divides by zero, or by a number too small to invert"),
    ),
    "transposed data": (
        network("y = Gemm<transA=1, alpha=2.0>(x, w)", x=(5, 2), w=(5, 4)),
        Skipped("fold", "y", "Gemm y transposes its data"),
    ),
    "C for every element": (
        network("y = Gemm<beta=2.0>(x, w, c)", x=(2, 5), w=(5, 4), c=(2, 4)),
        Skipped("fold", "y", "the bias of Gemm y is not one number for each output"),
    ),
    "another reader": (
        network(f"c = Conv(x, w) a = {BN}(c, {NORM}) y = Add(a, c)", **statistics(4), w=W),
        Skipped("fold", "a", "its Conv c has another reader"),
    ),
    "an output in the middle": (
        network(f"c = Conv(x, w) y = {BN}(c, {NORM})", **statistics(4), w=W, outputs=["c", "y"]),
        Skipped("fold", "y", "the model returns the output of its Conv c"),
    ),
    "computed statistics": (
        network(
            f"c = Conv(x, w) r = ReduceMean<axes=[0,2,3], keepdims=0>(c) y = {BN}(c, gamma, beta, r, var)",
            **statistics(4),
            w=W,
        ),
        Skipped("fold", "y", "its scale, shift or statistics are computed"),
    ),
    "computed weights": (
        network(f"v = Mul(w, x) c = Conv(one, v) y = {BN}(c, {NORM})", **statistics(4), x=(1,), one=(1, 3, 5, 5), w=W),
        Skipped("fold", "y", "the weights of Conv c are computed"),
    ),
    "negative variance": (
        network(f"c = Conv(x, w) d = {BN}(c, {NORM}) y = IsNaN(d)", **statistics(4, var=-np.ones(4)), w=W),
        Skipped("fold", "d", "its variance is negative, zero or not a number"),
    ),
    "beyond float32": (
        network("c = Conv(x, w) d = Mul(c, k) y = Clip(d, l, h)", w=np.full(W, 1e30, "f"), k=1e30, l=-1.0, h=1.0),
        Skipped("fold", "d", "Conv c would get numbers that float32 does not have"),
    ),
    "a constant map": (
        network("c = Conv(x, w) y = Add(c, k)", w=W, k=(4, 4, 4)),
        Skipped("fold", "y", "its constant is neither one number nor one for each channel"),
    ),
    "a constant along another axis": (
        network("c = Conv(x, w) y = Mul(c, k)", w=W, k=(4,)),
        Skipped("fold", "y", "its constant is neither one number nor one for each channel"),
    ),
    "a constant that makes channels": (
        network("c = Conv(x, w) y = Mul(c, k)", w=(1, 3, 3, 3), k=(4, 1, 1)),
        Skipped("fold", "y", "its constant makes more channels out of the one of Conv c"),
    ),
    "division of a constant": (
        network("c = Conv(x, w) y = Div(k, c)", w=W, k=1.0),
        Skipped("fold", "y", "it divides a constant by the data"),
    ),
    "zero behind a Conv": (
        network("c = Conv(x, w) d = Div(c, z) y = Clip(d, l, h)", w=W, z=0.0, l=-1.0, h=1.0),
        Skipped("fold", "d", "its scale or shift is not finite"),
    ),
    "norm before padding": (
        network(f"a = {BN}(x, {NORM}) y = Conv<pads=[1,1,1,1]>(a, w)", **statistics(3), w=W),
        Skipped("fold", "a", "Conv y pads its data with zeros, which its shift would not reach"),
    ),
    "mean before automatic padding": (
        network('a = Sub(x, k) y = Conv<auto_pad="SAME_LOWER">(a, w)', k=(3, 1, 1), w=W),
        Skipped("fold", "a", "Conv y pads its data with zeros, which its shift would not reach"),
    ),
    "shift before ConvTranspose": (
        network("a = Add(x, k) y = ConvTranspose(a, w)", k=1.0, w=(3, 4, 2, 2)),
        Skipped("fold", "a", "outputs of ConvTranspose y do not all see as many shifted inputs"),
    ),
    "norm with another reader": (
        network(f"a = {BN}(x, {NORM}) c = Conv(a, w) s = Sigmoid(a) y = Add(c, s)", **statistics(3), w=(3, 3, 1, 1)),
        Skipped("fold", "a", "Sigmoid s reads it too"),
    ),
    "scale of data and C": (
        network("a = Mul(x, k) y = Gemm(a, w, a)", x=(5, 5), k=2.0, w=(5, 5)),
        Skipped("fold", "a", "Gemm y reads it too"),
    ),
    "norm that the model returns": (
        network(f"a = {BN}(x, {NORM}) y = Conv(a, w)", **statistics(3), w=W, outputs=["y", "a"]),
        Skipped("fold", "a", "the model returns its output"),
    ),
    "negative scale before MaxPool": (
        network(f"a = {BN}(x, {NORM}) p = MaxPool<kernel_shape=[2,2]>(a) y = Conv(p, w)", **statistics(3), w=W),
        Skipped("fold", "a", "some of its scales are negative, and there is a MaxPool before the next layer"),
    ),
    "channels that a Reshape mixes": (
        network(f"a = {BN}(x, {NORM}) f = Reshape(a, s) y = Gemm(f, w)", **statistics(3), s=ints(-1, 36), w=(36, 4)),
        Skipped("fold", "a", "Reshape f may mix channels"),
    ),
    "channels that a Reshape moves to another place": (
        network(
            f"a = {BN}(x, {NORM}) f = Reshape(a, s) y = Conv(f, w)",
            x=(4, 3, 1, 1),
            **statistics(3),
            s=ints(1, 3, 2, 2),
            w=(4, 3, 1, 1),
        ),
        Skipped("fold", "a", "Reshape f may mix channels"),
    ),
    "a constant that makes channels before a Conv": (
        network("a = Mul(x, k) y = Conv(a, w)", x=(2, 1, 6, 6), k=(3, 1, 1), w=W),
        Skipped("fold", "a", "its data do not have as many channels as its constant, or it is not known how many"),
    ),
    "norm of features": (
        network(f"a = Sigmoid(x) y = {BN}(a, {NORM})", **statistics(5), x=(2, 5)),
        Skipped("fold", "y", "its data are no maps with height and width"),
    ),
    "activation that another reader sees before": (
        network("c = Conv(x, w) m = MaxPool<kernel_shape=[1,1]>(c) r = Relu(m) y = Add(r, m)", w=W),
        Skipped("hoist", "r", "something else reads MaxPool m"),
    ),
    "activation behind a shared layer": (
        network("c = Conv(x, w) m = MaxPool<kernel_shape=[1,1]>(c) r = Relu(m) y = Add(r, c)", w=W),
        Skipped("hoist", "r", "something else reads Conv c"),
    ),
    "activation with no layer before": (
        network("m = MaxPool<kernel_shape=[2,2]>(x) y = Relu(m)"),
        Skipped("hoist", "y", "no layer before MaxPool m could absorb it"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error")
def test_refused_with_the_reason(case):
    proto, skipped = REFUSED[case]
    assert skipped in folded(proto)[1]


def test_training_mode_is_refused():
    """ONNX Runtime draws its mask at random here, so only the graph is looked at."""
    model = loaded(network("a = Dropout(x, half, yes) y = Relu(a)", half=0.5, yes=np.array(True)))
    assert run_float_passes(model) == [Skipped("simplify", "a", "it runs in training mode")]
    body = f"c = Conv(x, w) y, m, v = {BN}<training_mode=1>(c, {NORM})"
    assert run_float_passes(loaded(network(body, **statistics(4), w=W))) == [
        Skipped("fold", "y", "it runs in training mode")
    ]


@pytest.mark.parametrize(
    "resize",
    [
        'Resize<mode="linear">(c, , k)',
        'Resize<coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=-9.0>(c, area, k)',
    ],
)
def test_a_resize_that_makes_up_numbers_does_not_let_an_activation_through(resize):
    constants = {"k": np.float32([1, 1, 2, 2]), "area": np.float32([0, 0, 0, 0, 1, 1, 2, 2])}
    proto = network(f"c = Conv(x, w) m = {resize} y = Clip(m, l, h)", w=W, l=1.0, h=2.0, **constants)
    assert op_types(folded(proto)[0]) == "Conv Resize Clip"


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_shared_weights_are_copied():
    """Two Convs share weight and bias; only one of them is followed by a norm."""
    body = f"a = Conv(x, w, b) c = {BN}(a, {NORM}) d = Conv(x, w, b) y = Mul(c, d)"
    model, _ = folded(network(body, **statistics(4), w=W, b=(4,)))
    assert op_types(model) == "Conv Conv Mul"
    assert set(model.graph.initializers) == {"w", "b", "a_weight", "a_bias"}


def test_weights_that_only_a_body_reads_otherwise_are_copied():
    """The branches of an If see the weight by its name."""
    body = f"""
        a = Conv(x, w) c = {BN}(a, {NORM}) t = ReduceSum<keepdims=0>(c) yes = Greater(t, zero)
        y = If (yes) <then_branch = g1 () => (float[4,3,3,3] p) {{ p = Identity(w) }},
                      else_branch = g2 () => (float[4,3,3,3] q) {{ q = Neg(w) }}>
    """
    model, _ = folded(network(body, **statistics(4), w=W, zero=0.0))
    assert BN not in op_types(model)


def test_a_tensor_that_a_body_reads_is_not_folded_away():
    body = f"""
        a = Conv(x, w) c = {BN}(a, {NORM}) t = ReduceSum<keepdims=0>(c) yes = Greater(t, zero)
        y = If (yes) <then_branch = g1 () => (float[2,4,4,4] p) {{ p = Identity(a) }},
                      else_branch = g2 () => (float[2,4,4,4] q) {{ q = Neg(a) }}>
    """
    _, findings = folded(network(body, **statistics(4), w=W, zero=0.0))
    assert Skipped("fold", "c", "its Conv a has another reader") in findings


def test_a_layer_in_a_body_is_left_alone():
    body = """
        a = Mul(x, k) c = Conv(a, w) t = ReduceSum<keepdims=0>(c) yes = Greater(t, k)
        y = If (yes) <then_branch = g1 () => (float[2,4,4,4] p) { p = Conv(a, w) },
                      else_branch = g2 () => (float[2,4,4,4] q) { q = Neg(c) }>
    """
    _, findings = folded(network(body, w=W, k=2.0))
    assert findings == [Skipped("fold", "a", "Conv p reads it too")]


# -- chains ------------------------------------------------------------------------------------------------------------

LINKS = {
    "conv": "{y} = Conv<pads=[1,1,1,1]>({x}, w)",
    "valid conv": "{y}p = Pad({x}, p) {y} = Conv({y}p, w, b)",
    "1x1": "{y} = Conv({x}, w1)",
    "norm": f"{{y}} = {BN}({{x}}, {NORM})",
    "scale": "{y} = Mul({x}, k)",
    "shift": "{y} = Add(k, {x})",
    "from": "{y} = Sub(one, {x})",
    "divide": "{y} = Div({x}, k)",
    "relu": "{y} = Relu({x})",
    "relu6": "{y} = Clip({x}, zero, six)",
    "pool": "{y} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>({x})",
    "average": "{y} = AveragePool<kernel_shape=[1,1]>({x})",
    "residual": "{y}r = Relu({x}) {y} = Sum({y}r, {x})",
    "branch": "{y}a = Conv({x}, w1) {y}b = Slice({x}, first, second, channels) {y}c = Mul({y}b, {y}a) {y} = Relu({y}c)",
    "identity": "{y} = Identity({x})",
}
NUMBERS = {
    "w": np.random.default_rng(0).normal(0, 0.2, (3, 3, 3, 3)).astype(np.float32),
    "w1": np.random.default_rng(1).normal(0, 0.5, (3, 3, 1, 1)).astype(np.float32),
    "b": (3,),
    "k": np.float32([0.5, -1.5, 2.0]).reshape(3, 1, 1),
    "p": PAD1,
    "first": ints(0),
    "second": ints(1),
    "channels": ints(1),
    "zero": 0.0,
    "one": 1.0,
    "six": 6.0,
    **statistics(3),
}
HEADS = {
    "none": "",
    "gemm": "f = Flatten({x}) y = Gemm<alpha=0.5>(f, g)",
    "mean": "f = ReduceMean<axes=[2,3], keepdims=0>({x}) h = MatMul(f, g3) y = Div(h, six)",
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(LINKS)), min_size=1, max_size=7), st.sampled_from(sorted(HEADS)), st.data())
def test_fold_keeps_the_outputs_of_any_chain(links, head, data):
    names = ["x", *(f"t{index}" for index in range(len(links)))]
    body = " ".join(LINKS[link].format(x=x, y=y) for link, x, y in zip(links, names, names[1:], strict=False))
    body += " " + HEADS[head].format(x=names[-1])
    middle = data.draw(st.sampled_from([[], names[1:]]))
    outputs = list(dict.fromkeys([*middle[:1], names[-1] if head == "none" else "y"]))
    proto = network(body, x=(2, 3, 4, 4), outputs=outputs, **NUMBERS, g=(48, 2), g3=(3, 2))
    model, _ = folded(proto, tolerance=2e-5)
    assert BN not in op_types(model)


# -- real models -------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("QCONV_DATA", Path(__file__).parents[3] / "shared" / "data"))
REAL = (
    "resnet20_cifar10",
    "mobilenetv2_imagenet",
    "efficientnet_lite0_imagenet",
    "efficientnet_b0_binary",
    "kerascnn_cifar10",
    "rapidocr_cls_v2",
    "mnist",
    "ultraface_rfb320",
    "deeplabv3_257_mv_gpu",
)


@pytest.mark.parametrize("name", REAL)
def test_real_models_keep_their_outputs_and_no_norm(name):
    path = DATA / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set QCONV_DATA to the folder that has models/")
    source = Source(path.name, path)
    model, _ = load(read_proto(source), source)
    run_float_passes(model)
    assert BN not in op_types(model)
    before = Session(str(path), optimize=False)
    after = Session(model.proto().SerializeToString(), optimize=False)
    rng = np.random.default_rng(0)
    feeds = {
        label: rng.standard_normal([1, *(d or 48 for d in shape[1:])]).astype(np.float32)
        for label, _, shape in before.inputs
    }
    for reference, numbers in zip(before.run_all(feeds), after.run_all(feeds), strict=True):
        signal = np.square(reference, dtype=np.float64).sum()
        noise = np.square(reference - numbers, dtype=np.float64).sum()
        assert 10 * np.log10(signal / max(noise, 1e-30)) > 90
