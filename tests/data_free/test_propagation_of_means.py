"""What layers read on average: ONNX Runtime says it, over a large sample of inputs that really are normal."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qconv.config.choices import LayerBits
from qconv.config.recipe import make_request
from qconv.data_free.propagation import set_batchnorm_means
from qconv.errors import Skipped
from qconv.ir.files import Source
from qconv.ir.layers import input_means_of
from qconv.ir.model import Model, Node
from qconv.passes.equalize import apply_scales
from qconv.passes.fold import run_float_passes
from qconv.passes.scale_groups import find_scale_groups
from qconv.pipeline.quantize import quantize
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.models import ints, loaded, network, run

MEANS = np.array([0.3, -0.5, 1.0, 0.0, -1.0, 2.0])
STDS = np.array([1.0, 0.5, 2.0, 1.5, 1.0, 0.7])
SIZE, COUNT = 4, 8192
PLACES = COUNT * SIZE * SIZE

A = "n = BatchNormalization(x, ag, ab, am, av)"
"""Of the network's input, which is normal."""
B = "c = Conv(x, p) n = BatchNormalization(c, bg, bb, bm, bv)"
"""Of the first three channels, mixed; D of the last three: independent of each other."""
D = "d = Conv(x, q) m = BatchNormalization(d, dg, db, dm, dv)"
HALVES = (np.arange(6) < 3, np.arange(6) >= 3)
rng = np.random.default_rng(7)


def behind(kernel: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the input, or of a Conv of it."""
    if kernel is None:
        return MEANS, STDS**2
    return kernel @ MEANS, kernel**2 @ STDS**2


def normalisation(letter: str, kernel: NDArray[np.float64] | None) -> dict[str, NDArray[np.float32]]:
    mean, var = behind(kernel)
    gamma = rng.uniform(0.5, 1.5, mean.size) * rng.choice([-1, 1], mean.size)
    beta = rng.normal(size=mean.size)
    numbers = {"g": gamma, "b": beta, "m": mean, "v": var}
    return {f"{letter}{name}": np.float32(array) for name, array in numbers.items()}


MIXES = [np.where(half, rng.normal(size=(5, 6)), 0.0) for half in HALVES]
CONSTANTS: dict[str, NDArray] = {
    "p": np.float32(MIXES[0])[:, :, None, None],
    "q": np.float32(MIXES[1])[:, :, None, None],
    **normalisation("a", None),
    **normalisation("b", MIXES[0]),
    **normalisation("d", MIXES[1]),
    "zero": np.float32(0),
    "six": np.float32(1.2),
    "w5": np.float32(rng.normal(size=(4, 5, 3, 3))),
    "w6": np.float32(rng.normal(size=(4, 6, 3, 3))),
    "w10": np.float32(rng.normal(size=(4, 10, 1, 1))),
    "v5": np.float32(rng.normal(size=(5, 1, 3, 3))),
    "u5": np.float32(rng.normal(size=(5, 3, 2, 2))),
    "k5": np.float32(rng.normal(size=(5, 4))),
    "k80": np.float32(rng.normal(size=(80, 4))),
    "flat": ints(0, 80),
    "gain": np.float32(rng.normal(size=(5, 1, 1))),
    "places": ints(0, 0, 1, 1, 0, 0, 1, 1),
    "channels": ints(0, 2, 0, 0, 0, 3, 0, 0),
    "begin": ints(1, 0),
    "end": ints(4, 3),
    "axes": ints(1, 2),
    "w3": np.float32(rng.normal(size=(4, 3, 2, 2))),
    "e5": np.float32(rng.normal(size=(5, 5, 1, 1))),
    "mixed": ints(0, 5, 2, 8),
    "rows": ints(0, 5, 16),
    "m16": np.float32(rng.normal(size=(16, 4))),
}
# name -> what lies in front of the layer y, all of it really normal but for what is cut off
KNOWN = {
    "nothing": f"{A} y = Conv(n, w6)",
    "behind a layer": f"{B} y = Conv(n, w5)",
    "relu": f"{B} r = Relu(n) y = Conv(r, w5)",
    "clip": f"{B} r = Clip(n, zero, six) y = Conv(r, w5)",
    "depthwise": f"{B} r = Relu(n) y = Conv<group=5>(r, v5)",
    "transposed": f"{B} r = Relu(n) y = ConvTranspose(r, u5)",
    "normalised after a relu": f"{B} r = Relu(n) s = BatchNormalization(r, bg, bb, rm, rv) y = Conv(s, w5)",
    "normalised after a relu, pooled": f"{B} r = Relu(n) s = BatchNormalization(r, bg, bb, rm, rv)"
    " t = GlobalAveragePool(s) f = Flatten(t) y = Gemm(f, k5)",
    "sum": f"{B} {D} r = Relu(m) s = Add(n, r) y = Conv(s, w5)",
    "difference": f"{B} {D} r = Relu(m) s = Sub(n, r) y = Conv(s, w5)",
    "relu of a sum": f"{B} {D} s = Add(n, m) r = Relu(s) y = Conv(r, w5)",
    "average pool": f"{B} r = Relu(n) s = AveragePool<kernel_shape=[2,2]>(r) y = Conv(s, w5)",
    "global average pool": f"{B} r = Relu(n) s = GlobalAveragePool(r) f = Flatten(s) y = Gemm(f, k5)",
    "mean of places": f"{B} r = Relu(n) f = ReduceMean<axes=[2,3], keepdims=0>(r) y = Gemm(f, k5)",
    "flattened": f"{B} r = Relu(n) f = Flatten(r) y = Gemm(f, k80)",
    "reshaped": f"{B} r = Relu(n) f = Reshape(r, flat) y = MatMul(f, k80)",
    "scaled": f"{B} r = Relu(n) s = Mul(r, gain) t = Add(gain, s) y = Conv(t, w5)",
    "scaled in front": f"{B} s = Div(n, gain) r = Relu(s) y = Conv(r, w5)",
    "sliced": f"{B} r = Relu(n) s = Slice(r, begin, end, axes) y = Conv(s, w3)",
    "channels of zeros": f"{B} r = Relu(n) s = Pad(r, channels) y = Conv(s, w10)",
    "side by side": f"{B} {D} r = Relu(n) s = Concat<axis=1>(r, m) y = Conv(s, w10)",
    "identity": f"{B} r = Relu(n) i = Identity(r) y = Conv(i, w5)",
}


def net(body: str, outputs: tuple[str, ...] = ("y",), **more: NDArray) -> onnx.ModelProto:
    read = set(re.findall(r"\w+", body))
    constants = CONSTANTS | more | (behind_relu() if "rm" in read else {})
    return network(body, ("N", 6, SIZE, SIZE), outputs, opset=15, **{k: v for k, v in constants.items() if k in read})


@cache
def behind_relu() -> dict[str, NDArray[np.float32]]:
    """Mean and variance of Relu behind B, as training would have seen them: from a large sample."""
    y = run(net(f"{B} y = Relu(n)"), drawn(1))["y"]
    return {
        "rm": y.mean((0, 2, 3), dtype=np.float64).astype("f4"),
        "rv": y.var((0, 2, 3), dtype=np.float64).astype("f4"),
    }


@cache
def drawn(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    noise = np.random.default_rng(seed).standard_normal((COUNT, 6, SIZE, SIZE))
    return {"x": (noise * STDS[:, None, None] + MEANS[:, None, None]).astype(np.float32)}


def layer(model: Model) -> Node:
    return next(node for node in model.nodes() if node.name == "y")


def really_read(model: Model, node: Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of what a layer reads, by channel, and how far the mean of so large a sample may be from the true one."""
    name, proto = node.inputs[0].name, model.proto()  # type: ignore[union-attr]
    if name not in {value.name for value in proto.graph.input}:
        proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    feeds = drawn()
    read = run(proto, feeds).get(name, feeds.get(name))
    by_channel = np.moveaxis(read, 1, 0).reshape(read.shape[1], -1).astype(np.float64)
    # places of one picture are independent; windows that overlap, four in all, are not
    return by_channel.mean(axis=1), 5 * by_channel.std(axis=1) * 2 / np.sqrt(by_channel.shape[1]) + 1e-5


def check(model: Model) -> None:
    found = input_means_of(layer(model))
    assert not isinstance(found, str), found
    expected, margin = really_read(model, layer(model))
    assert found.shape == expected.shape
    assert np.all(np.abs(found - expected) < margin), (found, expected)


@pytest.mark.parametrize("name", KNOWN)
def test_the_means_are_those_of_a_large_sample(name: str) -> None:
    model = loaded(net(KNOWN[name]))
    set_batchnorm_means(model)
    check(model)


@pytest.mark.parametrize("body", [*KNOWN.values(), f"{B} r = Relu(n) s = Pad(r, places) y = Conv(s, w5)"])
def test_they_are_those_of_what_is_left_after_folding(body: str) -> None:
    """A Pad becomes padding, which counts as if it were more of the same."""
    outputs = ("y", "n") if body == KNOWN["behind a layer"] else ("y",)  # so that both layers do not become one
    model = loaded(net(body, outputs))
    run_float_passes(model)
    assert not any(node.op_type == "BatchNormalization" for node in model.nodes())
    check(model)


@pytest.mark.parametrize("name", ["relu", "depthwise", "flattened", "global average pool"])
def test_scaled_channels_have_scaled_means(name: str) -> None:
    model = loaded(net(KNOWN[name]))
    run_float_passes(model)
    groups = find_scale_groups(model)
    before = input_means_of(layer(model))
    scales = np.where(groups.fixed, 1.0, np.random.default_rng(0).uniform(2, 4, groups.fixed.size))
    apply_scales(model, groups, scales)
    assert not np.allclose(before, input_means_of(layer(model)), rtol=0.3)
    check(model)


def test_a_gain_of_zero_leaves_nothing_to_correct() -> None:
    """The weights of that channel are zero after folding, and stay zero when they are rounded."""
    gamma = CONSTANTS["ag"] * (np.arange(6) > 0)
    model = loaded(net(KNOWN["nothing"], ag=gamma))
    run_float_passes(model)
    found, (expected, margin) = input_means_of(layer(model)), really_read(model, layer(model))
    assert found[0] == 0
    assert np.all(np.abs(found - expected)[1:] < margin[1:])


def test_a_copy_keeps_them_and_a_second_fold_too() -> None:
    model = loaded(net(KNOWN["relu"]))
    run_float_passes(model)
    found = input_means_of(layer(model))
    run_float_passes(model)
    assert np.array_equal(input_means_of(layer(model)), found)
    assert np.array_equal(input_means_of(layer(model.copy())), found)


UNKNOWN = {
    "the network's input": ("y = Conv(x, w6)", "no BatchNormalization follows the network's input"),
    "a layer alone": (f"{B} r = Relu(n) s = Conv(r, e5) y = Conv(s, w5)", "no BatchNormalization follows Conv s"),
    "the largest": (
        f"{B} r = Relu(n) s = MaxPool<kernel_shape=[2,2]>(r) y = Conv(s, w5)",
        "the mean behind MaxPool s does not follow from BatchNormalization",
    ),
    "cut off twice": (f"{B} r = Relu(n) s = Clip(r, zero, six) y = Conv(s, w5)", "Clip s cuts off what is not normal"),
    "cut off after a mean": (
        f"{B} s = GlobalAveragePool(n) r = Relu(s) f = Flatten(r) y = Gemm(f, k5)",
        "Relu r cuts off what is not normal",
    ),
    "padding counted in": (
        f"{B} s = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(n) y = Conv(s, w5)",
        "AveragePool s counts padding in",
    ),
    "a product": (
        f"{B} {D} s = Mul(n, m) y = Conv(s, w5)",
        "the mean behind Mul s of two tensors does not follow from theirs",
    ),
    "no sum that is known": (
        f"{B} e = Conv(x, q) s = Add(n, e) y = Conv(s, w5)",
        "no BatchNormalization follows Conv e",
    ),
    "mixed channels": (f"{B} s = Reshape(n, mixed) y = Conv(s, w5)", "Reshape may mix channels"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_why_means_are_not_known(name: str) -> None:
    body, why = UNKNOWN[name]
    model = loaded(net(body))
    set_batchnorm_means(model)
    assert input_means_of(layer(model)) == why


# -- what comes of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Few, so that means on them are far from the true ones."""
    folder = tmp_path_factory.mktemp("samples")
    for index, x in enumerate(drawn(2)["x"][:48]):
        np.save(folder / f"{index:02}.npy", x)
    return str(folder)


def made(proto: onnx.ModelProto, folder: str, **options: object) -> tuple[Report, bytes]:
    request = make_request({"calib": (folder,), "threads": 1, **options})
    report, made = quantize(Source("m", None, proto.SerializeToString()), None, *request)
    assert made is not None
    return report, made


def moved(proto: onnx.ModelProto, data: bytes) -> float:
    """How far the means of the outputs are from those of the float network, at most; they have a spread of about 10."""
    ref, got = (Session(model).run_all(drawn())[0].astype(np.float64) for model in (proto.SerializeToString(), data))
    axes = (0, *range(2, ref.ndim))
    return float(np.abs((got - ref).mean(axis=axes)).max())


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
@pytest.mark.parametrize("name", ["relu", "clip", "depthwise", "sum", "flattened", "channels of zeros"])
def test_outputs_keep_their_means(name: str, rounding: str, samples: str) -> None:
    """Weights alone are rounded, those of the first Conv to 16 bits: what moves is what rounding y moved."""
    proto = net(KNOWN[name])
    options: dict[str, object] = {"weight_bits": 3, "edge_bits": 2, "activation_bits": 32, "rounding": rounding}
    options["layer_bits"] = (("[cd]", LayerBits(weights=16)),)
    none, analytic = (
        moved(proto, made(proto, samples, bias_correction=kind, **options)[1]) for kind in ("none", "analytic")
    )
    assert none > 0.03
    assert analytic < 0.1 * none


def bias_of(data: bytes) -> NDArray[np.float64]:
    """Of the layer y, as it is added."""
    model = onnx.load_from_string(data)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = next(node for node in model.graph.node if node.name == "y").input[2]
    codes, scale, _ = next(node for node in model.graph.node if name in node.output).input
    return constants[codes].astype(np.float64) * constants[scale]


def test_the_correction_is_the_one_on_many_normal_pictures(tmp_path: Path) -> None:
    """Weights of 4 bits, activations of 8; what is measured is over 512 pictures of 16 places."""
    for index, x in enumerate(drawn(3)["x"][:512]):
        np.save(tmp_path / f"{index:03}.npy", x)
    options = {"weight_bits": 4, "edge_bits": 4, "calibrator": "minmax", "rounding": "nearest", "samples": 512}
    proto = net(f"{B} r = Relu(n) y = Conv(r, w5, k)", k=np.zeros(4, np.float32))
    none, measured, analytic = (
        bias_of(made(proto, str(tmp_path), bias_correction=kind, equalize=False, **options)[1])
        for kind in ("none", "measured", "analytic")
    )
    assert np.abs(analytic - measured).max() < 0.1 * np.abs(none - measured).max()


def test_layers_that_are_left_say_why(samples: str) -> None:
    product = net(f"{B} r = Relu(n) s = Reshape(r, rows) y = MatMul(s, m16)")
    report, _ = made(product, samples, bias_correction="analytic")
    left = {f.where: f.why for f in report.findings if isinstance(f, Skipped) and f.step == "bias"}
    assert left == {"c": "no BatchNormalization follows the network's input", "y": "a MatMul has no bias"}
    assert [text for text in report.warnings if "analytic corrects no layer" in text]
    report, _ = made(net(KNOWN["relu"]), samples, bias_correction="analytic")
    assert not [text for text in report.warnings if "analytic" in text]


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_where_nothing_is_known_biases_stay(rounding: str, samples: str) -> None:
    proto = network("c = Conv(x, p) r = Relu(c) y = Conv(r, w5)", ("N", 6, 4, 4), p=CONSTANTS["p"], w5=CONSTANTS["w5"])
    _, data = made(proto, samples, bias_correction="analytic", rounding=rounding, weight_bits=4, edge_bits=4)
    assert [len(node.input) for node in onnx.load_from_string(data).graph.node if node.op_type == "Conv"] == [2, 2]
