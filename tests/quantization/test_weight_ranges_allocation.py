"""Bits channel by channel. Oracles: the paper's formula worked by hand, all divisions tried, numpy and ONNX Runtime."""

from __future__ import annotations

import itertools
from typing import Any

import click
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qconv.calibration.sketch import SketchBuilder, SketchContents, TensorView
from qconv.config.choices import NAMED_RECIPES, LayerBits
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.planning.float_reasons import NO_CHANNEL_SCALE_KERNEL
from qconv.quantization import weight_ranges
from qconv.quantization.parameters import make_tensor_rows
from qconv.quantization.saturation import worst_pair_ratio
from qconv.quantization.weight_ranges import allocate_bits, optimal_bits
from qconv.quantizer import PerChannel, PerTensor, QuantParams, QuantSpec
from qconv.runtime.session import Session
from tests.config.test_serialization import asked
from tests.planning.test_plan import Planned
from tests.support.models import network
from tests.support.quantized import quantized, sqnr

FOUR = QuantSpec(4, True, True, PerChannel(0))


def cost(alpha: NDArray[np.float64], bits: NDArray[Any]) -> float:
    return float(np.sum(alpha**2 / 3 / 4.0**bits))


# -- the formula -------------------------------------------------------------------------------------------------------


def test_the_closed_form_by_hand() -> None:
    """8^(2/3) = 4 and 1^(2/3) = 1: of 2 * 2^2 = 8 levels 6.4 and 1.6. 27, 8, 1: of 48 levels 9/14, 4/14 and 1/14."""
    assert optimal_bits(np.array([8.0, 1.0]), 2) == pytest.approx(np.log2([6.4, 1.6]))
    assert optimal_bits(np.array([27.0, 8.0, 1.0]), 4) == pytest.approx(np.log2(np.array([9, 4, 1]) * 48 / 14))


def test_whole_bits_by_hand() -> None:
    """log2 of 6.4 and 1.6 round to 3 and 1. 4.95, 3.78, 1.78 round to 11 bits of 12: the widest has most to gain."""
    assert allocate_bits(np.array([8.0, 1.0]), 2, least=1, most=8).tolist() == [3, 1]
    assert allocate_bits(np.array([27.0, 8.0, 1.0]), 4, least=1, most=8).tolist() == [6, 4, 2]


def test_bounds_hold_and_what_they_take_goes_to_others() -> None:
    """1000^(2/3) = 100: 33.2 of 34 levels, 5 bits, and the rest of 8 * 3 bits is out of the reach of bounds."""
    assert allocate_bits(np.array([1000.0, 1.0]), 4, least=2, most=5).tolist() == [5, 3]
    assert allocate_bits(np.array([1000.0, 1.0, 1.0]), 2, least=2, most=8).tolist() == [2, 2, 2]


def test_channels_without_a_range() -> None:
    assert allocate_bits(np.zeros(3), 4, least=2, most=8).tolist() == [4, 4, 4]
    assert allocate_bits(np.array([0.0, 1.0, 1.0]), 4, least=2, most=8).tolist() == [2, 5, 5]


ALPHAS = st.lists(st.floats(0, 1e6) | st.floats(0.1, 10), min_size=1, max_size=6)


@given(ALPHAS, st.integers(2, 8), st.sampled_from([1, 2]))
def test_the_mean_is_kept_and_nothing_is_lost(alphas: list[float], mean: int, least: int) -> None:
    alpha = np.array(alphas)
    bits = allocate_bits(alpha, mean, least=least, most=8)
    assert bits.sum() == len(alpha) * mean
    assert bits.min() >= least
    assert bits.max() <= 8
    assert cost(alpha, bits) <= cost(alpha, np.full(len(alpha), mean)) * (1 + 1e-9)
    levels = optimal_bits(alpha, mean)
    assert np.sum(2.0**levels) == pytest.approx(len(alpha) * 2**mean)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=4))
def test_it_is_near_the_best_of_all_divisions(alphas: list[float]) -> None:
    """The formula has its optimum at a fixed number of levels, not of bits: it is not the best, but not far."""
    alpha = np.array(alphas)
    tried = itertools.product(range(1, 9), repeat=len(alpha))
    best = min(cost(alpha, np.array(bits)) for bits in tried if sum(bits) == 4 * len(alpha))
    assert cost(alpha, allocate_bits(alpha, 4, least=1, most=8)) <= 3 * best


# -- weights -----------------------------------------------------------------------------------------------------------


def laplace(scales: list[float], count: int = 2000) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    return np.stack([rng.laplace(0, scale, count) for scale in scales]).astype(np.float32)


@pytest.mark.parametrize("calibrator", ["max", "mse", "aciq"])
@pytest.mark.parametrize("axis", [0, 1])
def test_of_laplace_weights_less_is_lost_than_with_the_same_bits_for_all(calibrator: str, axis: int) -> None:
    weight = laplace([0.1, 0.2, 0.5, 1.0, 4.0, 8.0])
    spec = QuantSpec(4, True, True, PerChannel(axis))
    stored = weight if axis == 0 else weight.T
    params = weight_ranges.make_weight_channel_params(stored, spec, calibrator)
    assert params.bits is not None
    assert params.bits.mean() == 4
    assert np.all(np.diff(params.bits) >= 0)
    plain = spec.from_range(*weight_ranges.WEIGHT_RANGE_ESTIMATORS[calibrator](stored, spec))
    own, same = (np.sum((p.fake_quantize(stored).astype(np.float64) - stored) ** 2) for p in (params, plain))
    assert own < 0.5 * same


def test_codes_keep_to_the_bits_of_their_channel() -> None:
    weight = laplace([0.1, 1.0, 10.0])
    params = weight_ranges.make_weight_channel_params(weight, FOUR, "max")
    assert params.bits is not None
    codes = params.quantize(weight)
    assert np.abs(codes).max(axis=1).tolist() == [2 ** (bits - 1) - 1 for bits in params.bits]
    low, high = params.code_range()
    assert np.allclose(high, np.abs(weight).max(axis=1))
    assert np.allclose(low, -high)
    assert params.widest == params.bits.max() > 4
    assert np.array_equal(params.with_scale(params.scale * 2).limits[1], params.limits[1])


def test_every_channel_is_quantized_as_alone() -> None:
    weight = laplace([0.1, 1.0, 10.0])
    params = weight_ranges.make_weight_channel_params(weight, FOUR, "aciq")
    assert params.bits is not None
    for index, bits in enumerate(params.bits):
        alone = QuantSpec(int(bits), True, True, PerTensor())
        expected = QuantParams(alone, params.scale[index], params.zero_point[index]).fake_quantize(weight[index])
        assert np.array_equal(params.fake_quantize(weight)[index], expected)


# -- activations -------------------------------------------------------------------------------------------------------


def sketch_of(x: NDArray[np.float32]) -> Any:
    """Of pictures (P, C, X)."""
    sketcher = SketchBuilder(SketchContents.ALL)
    for key, rows in enumerate(x):
        sketcher.add(TensorView(rows.min(axis=1), rows.max(axis=1), rows.sum(axis=1), rows.shape[1], rows), key)
    return sketcher.sketch()


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_of_laplace_tensors_less_is_lost_than_with_the_same_bits_for_all(clips: bool, half: bool) -> None:
    scales = [0.1, 0.2, 0.5, 1.0, 4.0, 8.0]
    x = np.stack([laplace(scales, 4000)[:, start::8] for start in range(8)])  # (8, 6, 500)
    x = np.maximum(x, 0) if half else x
    spec = QuantSpec(4, False, False, PerChannel(1))
    params = weight_ranges.make_activation_channel_params(sketch_of(x), spec, 6, clips=clips)
    assert params.bits is not None
    assert params.bits.mean() == 4
    whole = QuantSpec(4, False, False).from_range(x.min(), x.max())
    same = spec.from_range(x.min(axis=(0, 2)), x.max(axis=(0, 2)))
    own, by_channel, by_tensor = (
        np.sum((p.fake_quantize(x).astype(np.float64) - x) ** 2) for p in (params, same, whole)
    )
    assert own < 0.6 * by_channel < 0.6 * by_tensor


def test_the_density_of_each_channel_gives_the_papers_ends() -> None:
    """Laplace's optimum for 4 bits is 5.03 b, Gauss's 2.55 sigma; behind a ReLU for one bit more: 6.2 b."""
    rng = np.random.default_rng(0)
    count = 20000
    x = np.stack([rng.laplace(0, 2, count), rng.normal(0, 2, count), np.maximum(rng.laplace(0, 2, count), 0)])
    spec = QuantSpec(4, False, False, PerChannel(1))
    columns, ends = x.T.astype(np.float32), (x.min(axis=1), x.max(axis=1))
    density = weight_ranges._ChannelDensities(columns, *ends, signed=False)
    low, high = density.ranges(np.arange(3), spec)
    assert high == pytest.approx([5.03 * 2, 2.55 * 2, 6.2 * 2], rel=0.03)
    assert low == pytest.approx([-5.03 * 2, -2.55 * 2, 0], rel=0.03)


def test_a_channel_that_was_zero_in_the_columns_keeps_its_extremes() -> None:
    columns = np.zeros((10, 2), np.float32)
    density = weight_ranges._ChannelDensities(columns, np.zeros(2), np.array([3.0, 0.0]), signed=False)
    assert [ends.tolist() for ends in density.ranges(np.arange(2), FOUR)] == [[0, 0], [3, 0]]


# -- the file ----------------------------------------------------------------------------------------------------------

SAME = "pads=[1,1,1,1]"
LOUD = np.float32(2.0 ** np.arange(-4, 4)).reshape(8, 1, 1, 1)
CHAIN = network(
    f"""
    c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(r, v) e = Clip(d, zero, six) s = Add(e, r) t = Relu(s)
    p = MaxPool<kernel_shape=[2,2]>(t) f = Conv(p, v, k) h = LeakyRelu(f) g = GlobalAveragePool(h) y = Conv(g, o)
    """,
    x=("N", 3, 8, 8),
    w=np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32) * LOUD,
    v=np.random.default_rng(1).standard_normal((8, 8, 3, 3)).astype(np.float32) * LOUD,
    k=(8,),
    o=(5, 8, 1, 1),
    zero=0.0,
    six=6.0,
)
BOTH = {"weight_bits": 4, "activation_bits": 4, "calibrator": "aciq", "bit_allocation": "both"}


@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("calibrator", ["aciq", "minmax"])
def test_the_runtime_computes_what_numpy_does(target: str, scheme: str, calibrator: str) -> None:
    """Each tensor between its limit and its dequantizer, bit for bit; optimized and node by node alike."""
    options = {**BOTH, "calibrator": calibrator, "activation_scheme": scheme, "target": target}
    result = quantized(CHAIN, **options)
    values = {value.name: params for value, params in result.params.activations.items() if params.bits is not None}
    assert {"r", "t"} & set(values)
    limits = {node.name.removesuffix("_limited"): node for node in result.wiring.all("Min")}
    assert set(limits) == set(values)
    proto = onnx.ModelProto.FromString(result.proto.SerializeToString())
    wanted = [name for key in values for name in (limits[key].input[0], f"{key}_as_float")]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    for optimize in (False, True):
        session = Session(proto.SerializeToString(), threads=1, optimize=optimize)
        found = dict(zip(session.outputs, session.run_all(result.samples[0]), strict=True))
        for name, params in values.items():
            assert np.array_equal(found[f"{name}_as_float"], params.fake_quantize(found[limits[name].input[0]])), name
    assert sqnr(result.meant["y"], result.got["y"]) > 60


def test_channels_of_their_own_run_in_float_and_say_why() -> None:
    result = quantized(CHAIN, **BOTH)
    told = {island.node: island.why for island in result.audit.islands}
    assert {told[name] for name in ("c", "d", "s", "r_limited")} == {NO_CHANNEL_SCALE_KERNEL}
    plain = quantized(CHAIN, **{**BOTH, "bit_allocation": "weights"})
    assert plain.audit.islands == ()
    assert NO_CHANNEL_SCALE_KERNEL not in {choice.why for choice in plain.plan.kept.values()}


def test_it_is_worth_it() -> None:
    """Channels 128 times as loud as others: bits by channel save what one scale for all loses."""
    found = {kind: quantized(CHAIN, **{**BOTH, "bit_allocation": kind}).sqnr() for kind in ("none", "both")}
    assert found["both"] > found["none"] + 2


def test_tensors_that_stay_whole() -> None:
    """At 8 bits there is nothing to give out; a MatMul does not sum over channels; what is tied shares its scale."""
    planned = Planned(CHAIN, Recipe(**BOTH))  # type: ignore[arg-type]
    own = {value.name for value in planned.plan.by_channel()}
    assert own == {"r"}
    assert not planned.plan.has_channel_scales(planned.value("x"))
    wide = Planned(CHAIN, Recipe(**BOTH, layer_bits=(("*", LayerBits(8, 8)),)))  # type: ignore[arg-type]
    assert wide.plan.by_channel() == []
    assert not any(layer.own_bits for layer in wide.plan.layers)
    product = network("c = Conv(x, w) d = MatMul(c, m) y = MatMul(d, m)", w=(4, 3, 3, 3), m=(4, 4))
    assert Planned(product, Recipe(**BOTH)).plan.by_channel() == []  # type: ignore[arg-type]


def test_channels_of_8_bits_in_integers_fit_into_16_bits() -> None:
    """A layer of 7 bits on average has channels of 8, whose pairs could overflow on CPUs without VNNI."""
    options = {"weight_bits": 7, "edge_bits": 2, "bit_allocation": "weights", "saturation_safe": True}
    result = quantized(CHAIN, **options)
    (layer,) = (found for found in result.params.layers if found.layer.node.name == "d")
    assert layer.weight.widest == 8
    assert worst_pair_ratio(layer.codes, 0).max() <= 1


def test_the_report_lists_the_bits() -> None:
    result = quantized(CHAIN, **BOTH)
    rows = {row.why: row.bits for row in make_tensor_rows(result.plan, result.params) if row.kind == "weight"}
    assert rows["weights of c"] == 8  # an edge
    assert np.mean(rows["weights of d"]) == 4  # type: ignore[arg-type]
    (row,) = (row for row in make_tensor_rows(result.plan, result.params) if row.name == "r")
    assert len(row.bits) == len(row.scale) == 8  # type: ignore[arg-type]
    kinds = {finding.kind for finding in result.findings if hasattr(finding, "kind")}
    assert {f"{what}: bits given out channel by channel" for what in ("weights", "activations")} <= kinds


# -- what is asked for -------------------------------------------------------------------------------------------------


FEW: dict[str, Any] = {"weight_bits": 4}


@pytest.mark.parametrize(
    ("options", "fact", "fix"),
    [
        ({"bit_allocation": "some"}, "--bit-allocation some", "none, weights"),
        ({"bit_allocation": "weights", "weight_bits": 16}, "--weight-bits 16", "2 to 7"),
        ({"bit_allocation": "weights"}, "--weight-bits 8", "2 to 7"),
        (FEW | {"bit_allocation": "weights", "weight_granularity": "per-tensor"}, "per-tensor", "per-channel"),
        ({"bit_allocation": "weights", "weight_bits": 4, "pack": True}, "--pack", "up to 8 bits"),
        ({"bit_allocation": "activations"}, "--calibrator output-mse", "aciq"),
        (BOTH | {"activation_bits": 16}, "--activation-bits 16", "2 to 8"),
        (BOTH | {"activation_bits": 32}, "--activation-bits 32", "stay float"),
        (BOTH | {"target": "openvino"}, "--target openvino", "ort-cpu"),
        ({"bias_correction": "some"}, "--bias-correction some", "measured"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], fact: str, fix: str) -> None:
    with pytest.raises(QconvError) as caught:
        Recipe(**options)
    assert fact in caught.value.message
    assert fix in caught.value.hint


def test_a_named_recipe_and_what_is_said_beside_it() -> None:
    named = asked("--recipe-name", "aciq-w4a4")
    fields = NAMED_RECIPES["aciq-w4a4"]
    assert {name: getattr(named, name) for name in fields} == fields
    other = asked("--recipe-name", "aciq-w4a4", "--weight-bits", "8", "--bit-allocation", "activations")
    assert (other.weight_bits, other.activation_bits, other.calibrator) == (8, 4, "aciq")
    assert other.bit_allocation == "activations"
    with pytest.raises(click.UsageError, match="--calibrator mse"):
        asked("--recipe-name", "aciq-w4a4", "--calibrator", "mse")


def test_without_bias_correction_the_bias_stays() -> None:
    for kind, same in (("none", True), ("measured", False)):
        result = quantized(CHAIN, weight_bits=3, bias_correction=kind)
        (layer,) = (found for found in result.params.layers if found.layer.node.name == "f")
        bias = next(onnx.numpy_helper.to_array(t) for t in CHAIN.graph.initializer if t.name == "k")
        assert layer.bias is not None
        assert np.array_equal(layer.bias, bias) is same
