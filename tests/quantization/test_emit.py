"""From a float network to the file that runs: every combination of bits and granularity, and numbers by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import Session
from tests.support.libraries import MOVES_CODES, needs
from tests.support.models import network
from tests.support.quantized import LAYERS, NET, SAME, Quantized, joined, net, pictures, quantized, sqnr

GRID = [
    (weight, activation, granularity, weight_bits, activation_bits)
    for index, (weight, activation, granularity, weight_bits, activation_bits) in enumerate(
        product(Scheme, Scheme, WeightGranularity, (2, 3, 4, 5, 8, 16), (2, 4, 8, 16, 32))
    )
    if weight_bits == activation_bits == 8 or index % 4 == 0
]


@pytest.mark.parametrize(("weight", "activation", "granularity", "weight_bits", "activation_bits"), GRID)
def test_every_combination_means_what_it_says_and_runs(
    weight: Scheme,
    activation: Scheme,
    granularity: WeightGranularity,
    weight_bits: int,
    activation_bits: int,
) -> None:
    """The optimized graph is within a few steps of the plain one; the step is that of the last quantized tensor."""
    result = net(
        weight_scheme=weight,
        activation_scheme=activation,
        weight_granularity=granularity,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        block_size=4,
        edge_bits=2,
    )
    assert len(result.plan.layers) == len(LAYERS)
    got, meant = result.got["y"], result.meant["y"]
    if activation_bits == 32:
        np.testing.assert_allclose(got, meant, rtol=1e-4, atol=1e-4)
        return
    wiring = result.wiring
    gemm = next(node for node in wiring.proto.graph.node if node.name == "y")
    step, _ = wiring.parameters(gemm.input[0])
    reach = np.abs(onnx.numpy_helper.to_array(NET.graph.initializer[6])).sum(axis=1)  # of one step in every feature
    assert np.abs(got - meant).max() <= 2 * float(step) * reach.max() + 1e-4
    assert sqnr(meant, got) > 20


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize("scheme", Scheme)
def test_a_bit_of_the_weights_is_worth_6_db(granularity: WeightGranularity, scheme: Scheme) -> None:
    """Halving the step halves the error: 20 log10(2) = 6.02 dB."""
    measured = [
        net(
            weight_bits=bits,
            activation_bits=16,
            edge_bits=2,
            weight_granularity=granularity,
            weight_scheme=scheme,
            block_size=4,
        ).sqnr()
        for bits in (2, 3, 4, 5, 8)
    ]
    assert np.all(np.diff(measured) > 0), measured
    assert (measured[-1] - measured[1]) / 5 == pytest.approx(6.02, abs=1.5)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_bit_of_the_activations_is_worth_6_db(scheme: Scheme) -> None:
    measured = [
        net(weight_bits=16, activation_bits=bits, edge_bits=2, activation_scheme=scheme).sqnr() for bits in (2, 4, 8)
    ]
    assert np.all(np.diff(measured) > 0), measured
    assert (measured[-1] - measured[-2]) / 4 == pytest.approx(6.02, abs=1.5)


def test_16_bits_are_as_good_as_float() -> None:
    assert net(weight_bits=16, activation_bits=16).sqnr() > 70
    assert net(weight_bits=16, activation_bits=32).sqnr() > 80


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_8_bits_leave_nothing_in_float() -> None:
    result = net()
    assert result.audit.islands == ()
    assert result.audit.integer >= 8
    assert not {"Conv", "FusedConv", "Gemm", "Add", "GlobalAveragePool"} & set(
        result.runs
    )  # MaxPool takes codes as it is
    assert result.runs.count("QLinearConv") == 3


CONCAT = network(
    f"a = Conv<{SAME}>(x, w1) b = Conv<{SAME}>(x, w2) c = AveragePool<kernel_shape=[3,3], {SAME}>(x) "
    "k = Concat<axis=1>(a, b, c) y = Conv(k, w3)",
    w1=(4, 3, 3, 3),
    w2=(2, 3, 3, 3),
    w3=(5, 9, 1, 1),
)


def test_a_concat_of_three_is_a_copy_of_codes() -> None:
    result = quantized(CONCAT).check()
    assert result.audit.islands == ()
    assert "Concat" in result.runs or "QLinearConcat" in result.runs
    (join,) = result.wiring.all("Concat")
    shared = {tuple(float(p) for p in result.wiring.parameters(name)) for name in join.input}
    assert len(shared) == 1
    assert shared == {tuple(float(p) for p in result.wiring.parameters(q)) for q in dequantized(result, join.output[0])}


def dequantized(result: Quantized, name: str) -> list[str]:
    """What a tensor is called behind its quantizer."""
    found = [name]
    for kind in ("QuantizeLinear", "Clip", "DequantizeLinear"):
        following = [node.output[0] for n in found for node in result.wiring.readers(n) if node.op_type == kind]
        found = following or found
    return found


@pytest.mark.parametrize(
    ("own", "options", "needed"),
    [
        (11, {}, 13),
        (13, {}, 13),
        (17, {"weight_bits": 4}, 17),
        (17, {"activation_bits": 32}, 17),
        (17, {"weight_bits": 4, "pack": True}, 21),
        (17, {"weight_bits": 16}, 21),
        (17, {"activation_bits": 16}, 21),
        (17, {"weight_granularity": WeightGranularity.PER_BLOCK}, 21),
        (22, {}, 22),
        (17, {"opset": 19}, 19),
    ],
)
def test_the_opset_is_the_models_own_or_the_lowest_needed(own: int, options: dict[str, object], needed: int) -> None:
    proto = network("c = Conv(x, w) r = Relu(c) y = Conv(r, v)", opset=own, w=(4, 3, 3, 3), v=(4, 4, 1, 1))
    proto.ir_version = 10
    result = quantized(proto, **options).check(10)
    assert result.proto.opset_import[0].version == needed


def test_one_conv_by_hand() -> None:
    """x from 0 to 255 in steps of 1, weights 1 and -2 of one channel each: every code is the number itself."""
    weight = np.float32([127, -64]).reshape(2, 1, 1, 1)
    proto = network("y = Conv(x, w)", x=(1, 1, 16, 16), w=weight)
    x = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    result = quantized(proto, [{"x": x}], calibrator="minmax")
    wiring = result.wiring
    (conv,) = wiring.all("Conv")
    scale, zero = wiring.parameters(conv.input[0])
    assert (float(scale), int(zero)) == (1.0, 0)
    scales, _ = wiring.parameters(conv.input[1])
    np.testing.assert_array_equal(scales, np.float32([127 / 127, 64 / 127]))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(wiring.codes(conv.input[1])).ravel(), [127, -127])
    scale, zero = wiring.parameters("y")
    step = (255 * 127 + 255 * 64) / 255  # 191
    assert (float(scale), int(zero)) == (step, 85)  # -255 * 64 / 191 = -85.4
    expected = np.clip(np.rint(result.expected["y"] / 191) + 85, 0, 255)
    np.testing.assert_array_equal(np.rint(result.got["y"] / step + 85), expected)


def test_the_mean_stays_where_weights_are_coarse() -> None:
    """Bias correction: 3-bit weights move a channel's mean by much more than what is left of it."""
    weight = np.random.default_rng(3).uniform(0, 1, (4, 8, 1, 1)).astype(np.float32)
    proto = network("y = Conv(x, w)", x=(8, 8, 6, 6), w=weight)
    samples = pictures((8, 8, 6, 6), low=0.0)
    result = quantized(proto, samples, weight_bits=3, edge_bits=2, activation_bits=16)
    moved = np.abs((result.got["y"] - result.expected["y"]).mean(axis=(0, 2, 3)))
    codes = result.params.layers[0]
    error = weight - codes.weight.dequantize(codes.codes)
    mean = np.concatenate([feeds["x"] for feeds in samples]).mean(axis=(0, 2, 3))
    uncorrected = np.abs(np.einsum("oi,i->o", error[:, :, 0, 0], mean))
    assert uncorrected.max() > 0.05
    assert moved.max() < 1e-3


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_the_whole_story_agrees_with_its_parts(tmp_path: Path) -> None:
    """The file that `quantize` writes from samples on disk gives what the parts gave, bit for bit."""
    (tmp_path / "calib").mkdir()
    samples = pictures((1, 3, 8, 8))
    for index, feeds in enumerate(samples):
        np.save(tmp_path / "calib" / f"{index}.npy", feeds["x"][0])
    onnx.save(NET, tmp_path / "net.onnx")
    recipe, data = Recipe(threads=1, effort="fast"), DataOptions((str(tmp_path / "calib"),))
    report, _ = quantize(tmp_path / "net.onnx", tmp_path / "out.onnx", recipe, data)
    assert (report.audit.float, report.opset) == (0, 17)
    written = joined(Session(str(tmp_path / "out.onnx"), optimize=False, threads=1), samples)
    parts = quantized(NET, samples)
    np.testing.assert_array_equal(written["y"], parts.meant["y"])
    assert report.verify.sqnr_db == pytest.approx(parts.sqnr(), abs=0.01)
    assert report.quantized_bytes == (tmp_path / "out.onnx").stat().st_size
