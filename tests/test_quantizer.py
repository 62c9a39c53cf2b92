"""Scales, zero points and codes. Oracles: ONNX Runtime's operators, closed forms, examples worked by hand."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from qconv.errors import QconvError
from qconv.quantizer import (
    SMALLEST_SCALE,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantParams,
    QuantSpec,
    bias_params,
    group_extremes,
)
from qconv.runtime.session import Session
from tests.support.libraries import has

TYPES = {
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int16": onnx.TensorProto.INT16,
    "uint16": onnx.TensorProto.UINT16,
}
SHAPE = (6, 5, 4)
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), PerBlock(0, 3), PerBlock(1, 2)]


@lru_cache
def runtime(dtype: str, granularity: Granularity) -> Session:
    """QuantizeLinear and DequantizeLinear in one model: x, scale, zero -> codes, real."""
    attributes = {}
    if isinstance(granularity, PerChannel | PerBlock):
        attributes["axis"] = granularity.axis
    if isinstance(granularity, PerBlock):
        attributes["block_size"] = granularity.size
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["real"], **attributes),
        ],
        "round_trip",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("zero", TYPES[dtype], None),
        ],
        [
            helper.make_tensor_value_info("codes", TYPES[dtype], None),
            helper.make_tensor_value_info("real", onnx.TensorProto.FLOAT, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Session(model.SerializeToString(), optimize=False, threads=1)


def by_runtime(params: QuantParams, x: NDArray[np.float32]) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
    session = runtime(str(params.spec.dtype), params.spec.granularity)
    codes, real = session.run(["codes", "real"], {"x": x, "scale": params.scale, "zero": params.zero_point})
    return codes, real


def assert_like_runtime(params: QuantParams, x: NDArray[np.float32]) -> None:
    codes, real = by_runtime(params, x)
    # the narrow range of symmetric codes is ours alone: ONNX saturates at the type's own end
    codes = np.maximum(codes, params.spec.qmin)
    assert params.quantize(x).dtype == codes.dtype
    np.testing.assert_array_equal(params.quantize(x), codes)
    if params.spec.qmin == np.iinfo(codes.dtype).min:
        np.testing.assert_array_equal(params.fake_quantize(x), real)
        assert params.fake_quantize(x).dtype == np.float32


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_codes_and_numbers_equal_onnx_runtime_bit_for_bit(
    dtype: str, granularity: Granularity, symmetric: bool
) -> None:
    info = np.iinfo(dtype)
    spec = QuantSpec(info.bits, info.min < 0, symmetric, granularity)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-3, 3, SHAPE)).astype(np.float32)
    params = spec.from_range(*group_extremes(x, granularity))
    assert_like_runtime(params, x)
    assert_like_runtime(params, x * 3)  # out of range
    if isinstance(granularity, PerBlock) and not has("onnxruntime", "1.32"):
        return  # older ones make of infinity what the conversion of their compiler does
    flat = x.reshape(-1)
    flat[:6] = [np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).min, 0.0, -0.0]
    assert_like_runtime(params, x)


@pytest.mark.parametrize("dtype", TYPES)
def test_ties_equal_onnx_runtime(dtype: str) -> None:
    """Every half step of the range, and some beyond its ends: with a scale of 1/4 all quotients are exact."""
    info = np.iinfo(dtype)
    spec = QuantSpec(info.bits, info.min < 0, symmetric=False)
    params = QuantParams(spec, np.array(0.25, np.float32), np.array(3, dtype))
    steps = np.arange(info.min - 8, info.max + 8, 1 if info.bits == 8 else 97) + np.float32(0.5)
    assert_like_runtime(params, (steps * 0.25).astype(np.float32))


def test_ties_go_to_even() -> None:
    """ONNX says: 2.5 -> 2, 3.5 -> 4, -0.5 -> 0."""
    params = QuantParams(QuantSpec(8, signed=True, symmetric=True), np.array(1, np.float32), np.array(0, np.int8))
    assert params.quantize(np.float32([2.5, 3.5, -0.5, -1.5, 126.5, 127.5])).tolist() == [2, 4, 0, -2, 126, 127]


# -- the ends of the code range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "signed", "symmetric", "expected"),
    [
        (8, True, False, (-128, 127, "int8")),
        (8, True, True, (-127, 127, "int8")),
        (8, False, False, (0, 255, "uint8")),
        (8, False, True, (0, 255, "uint8")),
        (4, True, True, (-7, 7, "int8")),
        (4, True, False, (-8, 7, "int8")),
        (3, False, False, (0, 7, "uint8")),
        (2, True, True, (-1, 1, "int8")),
        (16, True, True, (-32767, 32767, "int16")),
        (16, False, False, (0, 65535, "uint16")),
        (32, True, True, (-(2**31) + 1, 2**31 - 1, "int32")),
    ],
)
def test_code_ranges(bits: int, signed: bool, symmetric: bool, expected: tuple[int, int, str]) -> None:
    spec = QuantSpec(bits, signed, symmetric)
    assert (spec.qmin, spec.qmax, str(spec.dtype)) == expected


def test_asymmetric_by_hand() -> None:
    """[-1, 1.55]: 255 steps of 0.01, zero a hundred steps up."""
    params = QuantSpec(8, signed=False, symmetric=False).from_range(-1.0, 1.55)
    assert float(params.scale) == pytest.approx(0.01)
    assert int(params.zero_point) == 100
    assert params.quantize(np.float32([-1, 0, 1.55, 9])).tolist() == [0, 100, 255, 255]


def test_symmetric_by_hand() -> None:
    """[-1.27, 0.3]: 127 steps of 0.01 either way; -128 is never used."""
    params = QuantSpec(8, signed=True, symmetric=True).from_range(-1.27, 0.3)
    assert float(params.scale) == pytest.approx(0.01)
    assert int(params.zero_point) == 0
    assert params.quantize(np.float32([-5, -1.27, 0, 0.3])).tolist() == [-127, -127, 0, 30]


def test_unsigned_symmetric_has_its_zero_at_the_end_or_in_the_middle() -> None:
    """[0, 2.55]: all 255 steps serve it. [-1.27, 1]: 127 of 0.01 above the middle code 128."""
    spec = QuantSpec(8, signed=False, symmetric=True, granularity=PerChannel(0))
    params = spec.from_range([0.0, -1.27, 0.5], [2.55, 1.0, 2.55])
    assert params.zero_point.tolist() == [0, 128, 0]
    np.testing.assert_allclose(params.scale, 0.01, rtol=1e-6)


@pytest.mark.parametrize("low", [0.5, -0.5])
def test_ranges_are_widened_to_contain_zero(low: float) -> None:
    params = QuantSpec(8, signed=False, symmetric=False).from_range(low, low + 0.1)
    bottom, top = params.code_range()
    assert bottom <= 0 <= top
    assert float(params.scale) == pytest.approx((max(low + 0.1, 0) - min(low, 0)) / 255)


@pytest.mark.parametrize(("signed", "symmetric"), list(product([True, False], repeat=2)))
def test_an_all_zero_tensor_stays_zero(signed: bool, symmetric: bool) -> None:
    spec = QuantSpec(8, signed, symmetric, PerChannel(0))
    params = spec.from_range(np.zeros(3), np.zeros(3))
    assert params.scale.tolist() == [1, 1, 1]
    assert params.fake_quantize(np.zeros((3, 2), np.float32)).tolist() == np.zeros((3, 2)).tolist()


@pytest.mark.parametrize("high", [1e-45, 1e-40, 1e-38, 3e-36])
@pytest.mark.parametrize("symmetric", [False, True])
def test_denormal_ranges_get_a_normal_scale(high: float, symmetric: bool) -> None:
    """Runtimes flush denormal scales to zero and would divide by it."""
    params = QuantSpec(8, signed=False, symmetric=symmetric).from_range(-high, high)
    assert float(params.scale) >= SMALLEST_SCALE
    np.testing.assert_array_equal(params.fake_quantize(np.float32([0])), [0])
    assert abs(float(params.fake_quantize(np.float32(high))) - high) <= float(params.scale) / 2


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1), (0, np.nan), (-np.inf, 0), (0, np.inf), ([0, np.nan], [1, 1])])
def test_a_range_must_be_finite(low: float, high: float) -> None:
    with pytest.raises(QconvError, match="NaN or infinite"):
        QuantSpec(8, signed=False, symmetric=False).from_range(low, high)


# -- the promise of a grid ---------------------------------------------------------------------------------------------

edges = st.floats(-(2.0**96), 2.0**96, width=32)
specs = st.builds(QuantSpec, st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]), signed=st.booleans(), symmetric=st.booleans())


@given(specs, edges, edges, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_rounding_is_off_by_half_a_step_at_most(spec: QuantSpec, low: float, high: float, shares: list[float]) -> None:
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    params = spec.from_range(low, high)
    x = np.float32([low + (high - low) * share for share in shares] + [low, high])
    # a zero point is a whole number, so that the end of the codes may fall half a step short of the end of the range
    bottom, top = params.code_range()
    step = float(params.scale)
    assert bottom <= low + step / 2 * (1 + 1e-3)
    assert top >= high - step / 2 * (1 + 1e-3)
    error = np.abs(params.fake_quantize(x).astype(np.float64) - x)
    assert np.all(error <= step / 2 + 2 * np.spacing(np.abs(x)))


@given(specs, edges, edges)
def test_zero_is_exact(spec: QuantSpec, low: float, high: float) -> None:
    params = spec.from_range(min(low, high), max(low, high))
    assert params.fake_quantize(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    assert spec.qmin <= int(params.zero_point) <= spec.qmax


@given(specs, edges, edges)
def test_rounding_twice_changes_nothing(spec: QuantSpec, low: float, high: float) -> None:
    params = spec.from_range(min(low, high), max(low, high))
    codes = np.arange(spec.qmin, spec.qmax + 1, max(1, 2 ** (spec.bits - 8))).astype(spec.dtype)
    np.testing.assert_array_equal(params.quantize(params.dequantize(codes)), codes)


def test_the_whole_of_float32_can_be_a_range() -> None:
    big = float(np.finfo(np.float32).max)
    for symmetric in (True, False):
        params = QuantSpec(2, signed=False, symmetric=symmetric).from_range(-big, big)
        assert np.isfinite(params.scale)
        assert np.isfinite(params.fake_quantize(np.float32([big / 2, 0]))).all()


# -- groups ------------------------------------------------------------------------------------------------------------


def test_a_short_last_block_by_hand() -> None:
    """Five numbers in blocks of two: the last block is the 100 alone."""
    x = np.float32([[1, -2, 3, 4, 100]])
    granularity = PerBlock(1, 2)
    low, high = group_extremes(x, granularity)
    assert (low.tolist(), high.tolist()) == ([[-2, 3, 100]], [[1, 4, 100]])
    params = QuantSpec(8, signed=True, symmetric=True, granularity=granularity).from_range(low, high)
    np.testing.assert_allclose(params.scale, [[2 / 127, 4 / 127, 100 / 127]], rtol=1e-6)
    assert params.quantize(x).tolist() == [[64, -127, 95, 127, 127]]


@pytest.mark.parametrize("granularity", [*GRANULARITIES, PerBlock(2, 3), PerBlock(1, 100)], ids=str)
def test_extremes_equal_the_naive_ones(granularity: Granularity) -> None:
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    low, high = group_extremes(x, granularity)
    match granularity:
        case PerTensor():
            parts = {(): x}
        case PerChannel(axis):
            parts = {(i,): x.take(i, axis) for i in range(SHAPE[axis])}
        case PerBlock(axis, size):
            moved = np.moveaxis(x, axis, 0)
            assert low.shape == tuple(-(-n // size) if i == axis else n for i, n in enumerate(SHAPE))
            low, high = np.moveaxis(low, axis, 0), np.moveaxis(high, axis, 0)
            others = list(np.ndindex(moved.shape[1:]))
            parts = {
                (b, *rest): moved[(slice(b * size, (b + 1) * size), *rest)] for b in range(len(low)) for rest in others
            }
    assert len(parts) == low.size == high.size
    for index, part in parts.items():
        assert (low[index], high[index]) == (min(part.reshape(-1)), max(part.reshape(-1)))


# -- biases ------------------------------------------------------------------------------------------------------------


def test_a_bias_keeps_digits_that_float32_does_not_have() -> None:
    """2^24 + 1 steps of 1: float32 would make it 2^24."""
    params = bias_params(np.float32([1.0, 0.5]))
    assert params.quantize(np.float64([2**24 + 1, -(2**24) - 1])).tolist() == [2**24 + 1, -(2**25) - 2]
    assert params.zero_point.tolist() == [0, 0]
    assert params.zero_point.dtype == np.int32


def test_a_bias_saturates_instead_of_wrapping() -> None:
    params = bias_params(np.array(1, np.float32))
    assert params.quantize(np.float32([1e20, -1e20])).tolist() == [2**31 - 1, -(2**31) + 1]


def test_a_bias_rounds_to_the_nearest_step() -> None:
    """In exact fractions: no code is nearer to the bias than the chosen one."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-7, 1e-3, 50).astype(np.float32)
    bias = rng.normal(0, 10, 50).astype(np.float32)
    codes = bias_params(scale).quantize(bias)
    for code, number, step in zip(codes.tolist(), bias.tolist(), scale.tolist(), strict=True):
        assert abs(Fraction(number) / Fraction(step) - code) <= Fraction(1, 2) + Fraction(1, 2**20)


def test_with_scale_keeps_spec_and_zero_point() -> None:
    params = QuantSpec(8, signed=False, symmetric=False).from_range(-1.0, 1.55)
    twice = params.with_scale(params.scale * 2)
    assert isinstance(twice.scale, np.ndarray)
    assert twice.quantize(np.float32([0, 0.4])).tolist() == [100, 120]
