"""No pair of products may exceed 16 bits. Oracles: all corners tried; exact integers beside ONNX Runtime."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qconv.quantization.saturation import widen_scales
from qconv.quantizer import PerChannel, QuantParams, QuantSpec, group_extremes
from qconv.runtime.session import Session

Limits = tuple[NDArray[np.int64], NDArray[np.int64]]


def params_of(weight: NDArray[np.float32], axis: int = 0, symmetric: bool = True) -> QuantParams:
    granularity = PerChannel(axis)
    return QuantSpec(8, signed=True, symmetric=symmetric, granularity=granularity).from_range(
        *group_extremes(weight, granularity)
    )


def full(channels: int) -> Limits:
    return np.zeros(channels, np.int64), np.full(channels, 255)


def kernel_rows(codes: NDArray[np.integer], groups: int, limits: Limits) -> list[list[tuple[int, int, int]]]:
    """For each output (code, low, high) in the order kernel row, kernel column, input channel; in plain loops."""
    outputs, per_group, height, width = codes.shape
    low, high = limits
    rows = []
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        rows.append(
            [
                (int(codes[o, c, i, j]), int(low[first + c]), int(high[first + c]))
                for i, j, c in product(range(height), range(width), range(per_group))
            ]
        )
    return rows


def worst(row: list[tuple[int, int, int]]) -> int:
    """The largest magnitude of a neighbouring pair's sum, by trying both ends of every activation."""
    row = [*row, (0, 0, 0)] if len(row) % 2 else row
    pairs = zip(row[::2], row[1::2], strict=True)
    return max(abs(a * w + b * v) for (w, *x), (v, *y) in pairs for a in x for b in y)


weights = st.builds(
    lambda seed, outputs, per_group, area, spread: (
        np.random.default_rng(seed).standard_t(spread, (outputs, per_group, *area)).astype(np.float32)
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4]),
    st.integers(2, 5),
    st.sampled_from([(1, 1), (1, 3), (3, 3)]),
    st.sampled_from([1, 3, 100]),
)


@given(weights, st.sampled_from([1, 2]), st.integers(0, 2**32 - 1), st.booleans())
def test_no_pair_exceeds_16_bits(weight: NDArray[np.float32], groups: int, seed: int, symmetric: bool) -> None:
    ends = np.sort(np.random.default_rng(seed).integers(0, 256, (2, weight.shape[1] * groups)), axis=0)
    limits = ends[0], ends[1]
    before = params_of(weight, symmetric=symmetric)
    after = widen_scales(before, weight, *limits, output_axis=0)
    rows_before = kernel_rows(before.quantize(weight), groups, limits)
    rows_after = kernel_rows(after.quantize(weight), groups, limits)
    for index, (row_before, row_after) in enumerate(zip(rows_before, rows_after, strict=True)):
        assert worst(row_after) <= 32767
        if worst(row_before) <= 32767:
            assert after.scale[index] == before.scale[index]
        else:
            assert after.scale[index] > before.scale[index]


def test_two_full_products_by_hand() -> None:
    """2 * 255 * 127 = 64770 is 1.98 times too much: 64 * 255 * 2 = 32640 is the most that fits."""
    weight = np.full((1, 2, 1, 1), 1.27, np.float32)
    after = widen_scales(params_of(weight), weight, *full(2), output_axis=0)
    assert after.quantize(weight).ravel().tolist() == [64, 64]
    assert after.spec == params_of(weight).spec


def test_no_more_is_given_up_than_needed() -> None:
    """Half a code in 127 for each pair that rounding left over: never below 63 of the 64 that fit."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.9, 1.0, (500, 16, 1, 1)).astype(np.float32)
    codes = widen_scales(params_of(weight), weight, *full(16), output_axis=0).quantize(weight)
    assert codes.max(axis=(1, 2, 3)).min() >= 63


def test_nothing_changes_where_nothing_saturates() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    params = params_of(weight)
    assert (
        widen_scales(params, weight, np.zeros(3, np.int64), np.full(3, 128), output_axis=0) is params
    )  # 2 * 128 * 127


def test_neighbours_of_opposite_sign_do_not_add_up() -> None:
    """255 * 127 - 0 is the most that [127, -127] reaches."""
    weight = np.float32([1, -1, -1, 1]).reshape(1, 4, 1, 1)
    params = params_of(weight)
    assert widen_scales(params, weight, *full(4), output_axis=0) is params


def test_the_odd_one_at_the_end_has_no_neighbour() -> None:
    """Three channels: (c0, c1), (c2, nothing)."""
    weight = np.float32([0, 1, 1]).reshape(1, 3, 1, 1)
    params = params_of(weight)
    assert widen_scales(params, weight, *full(3), output_axis=0) is params
    crossed = np.float32([1, 1, 0]).reshape(1, 3, 1, 1)
    assert widen_scales(params, crossed, *full(3), output_axis=0) is not params


def test_neighbours_follow_the_kernels_order() -> None:
    """With 2 columns and 2 channels the pairs are the channels at one place, not the places of one channel."""
    by_channel = np.zeros((1, 2, 1, 2), np.float32)
    by_channel[0, 0] = 1  # channel 0 at both places
    params = params_of(by_channel)
    assert widen_scales(params, by_channel, *full(2), output_axis=0) is params
    by_place = by_channel.transpose(0, 3, 2, 1)  # both channels at place 0
    assert widen_scales(params, by_place, *full(2), output_axis=0) is not params


def test_limits_go_with_the_channels_of_the_group() -> None:
    """The second group's channels never exceed 10: only the first group is widened."""
    weight = np.ones((2, 2, 1, 1), np.float32)
    params = params_of(weight)
    after = widen_scales(params, weight, np.zeros(4, np.int64), np.array([255, 255, 10, 10]), output_axis=0)
    assert (after.scale > params.scale).tolist() == [True, False]


@pytest.mark.parametrize("output_axis", [0, 1])
def test_matrices_of_either_orientation(output_axis: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 7)).astype(np.float32)
    weight = weight if output_axis == 0 else np.ascontiguousarray(weight.T)
    params = params_of(weight, axis=output_axis)
    after = widen_scales(params, weight, *full(7), output_axis=output_axis)
    rows = np.moveaxis(after.quantize(weight), output_axis, 0)
    assert all(worst([(int(code), 0, 255) for code in row]) <= 32767 for row in rows)
    straight = weight if output_axis == 0 else weight.T
    expected = widen_scales(params_of(straight), straight, *full(7), output_axis=0)
    np.testing.assert_array_equal(after.scale, expected.scale)


def test_asymmetric_weights_keep_their_precision() -> None:
    """All-positive weights have their zero point at -128, the code of 0: widening alone could not make that smaller."""
    weight = np.random.default_rng(2).uniform(0, 1, (3, 8, 3, 3)).astype(np.float32)
    params = params_of(weight, symmetric=False)
    after = widen_scales(params, weight, *full(8), output_axis=0)
    assert np.all(after.scale <= params.scale * 2.1)
    assert np.abs(after.fake_quantize(weight) - weight).max() <= after.scale.max() / 2 * 1.001


# -- what it is for: the runtime computes exactly ----------------------------------------------------------------------


def integer_conv(weight: NDArray[np.float32], params: QuantParams, group: int) -> onnx.ModelProto:
    """u8 codes -> Conv with s8 weights and a step of 1 everywhere -> u8 codes, as one fused integer kernel."""
    out_scale = np.float32(2.0**15)
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "ones": np.ones(len(weight), np.float32),
        "codes": params.quantize(weight),
        "out_scale": out_scale,
        "middle": np.uint8(128),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "one", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "ones", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["a", "w"], ["c"], group=group),
        helper.make_node("QuantizeLinear", ["c", "out_scale", "middle"], ["y"]),
    ]
    constants["zeros"] = params.zero_point
    shape = (1, weight.shape[1] * group, 6, 6)
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def exact(weight: NDArray[np.integer], x: NDArray[np.uint8], group: int) -> NDArray[np.int64]:
    """The convolution in Python's own integers' width."""
    outputs, per_group, height, width = weight.shape
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64), (height, width), axis=(2, 3))
    rows = []
    for o in range(outputs):
        first = o // (outputs // group) * per_group
        rows.append(np.einsum("nchwij,cij->nhw", windows[:, first : first + per_group], weight[o].astype(np.int64)))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize(("kernel", "group"), [(3, 1), (1, 1), (3, 2)])
def test_onnx_runtime_is_exact_after_widening(kernel: int, group: int) -> None:
    """On any CPU, on the inputs that saturate most: 255 everywhere, and 255 where the weights are positive."""
    rng = np.random.default_rng(kernel)
    weight = np.abs(rng.standard_normal((16, 16, kernel, kernel))).astype(np.float32)
    weight[::2] *= -1
    params = widen_scales(params_of(weight), weight, *full(16 * group), output_axis=0)
    codes = params.quantize(weight)
    session = Session(integer_conv(weight, params, group).SerializeToString(), threads=1)
    shape = (1, 16 * group, 6, 6)
    for x in (np.full(shape, 255), rng.integers(0, 256, shape), 255 * rng.integers(0, 2, shape)):
        x = x.astype(np.uint8)
        (got,) = session.run_all({"x": x})
        expected = np.clip(np.rint(exact(codes, x, group) / 2.0**15) + 128, 0, 255)
        np.testing.assert_array_equal(got, expected)
