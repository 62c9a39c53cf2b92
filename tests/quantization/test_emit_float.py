"""What stays float in the file that runs, which ONNX Runtime on its own would move or fuse."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.config.choices import WeightGranularity
from tests.support.libraries import MOVES_CODES, needs, skip_without
from tests.support.models import network
from tests.support.quantized import SAME, net, quantized

CHAIN_OF_THREE = "a = Conv(x, w) r = Relu(a) b = {node} s = Relu(b) y = Conv(s, u)"
TINY = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32) * 1e-4
LARGE = np.float32([3, 4, 5, 6]) * 1000


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("node", ["Conv(r, v, k)", "ConvTranspose<strides=[2,2]>(r, v, k)"])
def test_layers_between_codes_that_stay_float_are_left_alone(node: str, bits: int) -> None:
    """ONNX Runtime 1.32 rounds the weights of such a layer to one int8 scale, and lets its bias overflow."""
    proto = network(CHAIN_OF_THREE.format(node=node), x=(1, 3, 10, 10), w=(4, 3, 3, 3), v=TINY, k=LARGE, u=(4, 4, 3, 3))
    result = quantized(proto, keep_float=("b",), weight_bits=bits, activation_bits=bits).check(45 if bits == 8 else 80)
    assert any(name in result.runs for name in ("Conv", "FusedConv", "ConvTranspose"))
    reasons = {island.node: island.why for island in result.audit.islands}
    assert reasons["b"] == "kept float by --keep-float"


@pytest.mark.parametrize("between", ["MaxPool<kernel_shape=[2,2]>", "Transpose<perm=[0,1,3,2]>", "Relu"])
@pytest.mark.parametrize("node", ["Conv(r, v, k)", "AveragePool<kernel_shape=[2,2]>(r)"])
def test_what_moves_values_lets_no_quantizer_up(node: str, between: str) -> None:
    """ONNX Runtime takes a quantizer to the front of a MaxPool or Transpose, and would find the kept node there."""
    body = f"a = Conv(x, w) r = Relu(a) b = {node} s = {between}(b) y = Conv(s, u)"
    numbers = {"v": TINY, "k": LARGE} if "Conv" in node else {}
    proto = network(body, x=(1, 3, 12, 12), w=(4, 3, 3, 3), u=(4, 4, 3, 3), **numbers)
    result = quantized(proto, keep_float=("b",)).check()
    assert "b" in {island.node for island in result.audit.islands}


@pytest.mark.parametrize("node", ["Add(r, r)", "AveragePool<kernel_shape=[2,2]>(r)", "Sigmoid(r)"])
def test_a_wish_for_float_holds_for_operators_without_weights(node: str) -> None:
    proto = network(CHAIN_OF_THREE.format(node=node), x=(1, 3, 10, 10), w=(4, 3, 3, 3), u=(4, 4, 3, 3))
    result = quantized(proto, keep_float=("b",)).check()
    assert result.audit.float >= 1
    assert "kept float by --keep-float" in {island.why for island in result.audit.islands}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("kernel_shape=[2,2], strides=[2,2], ceil_mode=1, count_include_pad=1", 9),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1", 10),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[3,3], strides=[2,2], count_include_pad=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[2,2], dilations=[2,2]", 9),
    ],
)
def test_average_pools_divide_by_the_same_numbers(attributes: str, size: int) -> None:
    if "ceil_mode=1, count_include_pad=1" in attributes and "pads" not in attributes:
        skip_without("onnxruntime", "1.21", "older ones count what lies beyond the padding")
    body = f"c = Conv<{SAME}>(x, w) a = AveragePool<{attributes}>(c) y = Conv(a, v)"
    quantized(network(body, x=(1, 3, size, size), opset=19, w=(4, 3, 3, 3), v=(4, 4, 1, 1))).check()


def test_a_mean_that_cancels_runs() -> None:
    """ONNX Runtime refuses to multiply by 256 or more: the map's step over the mean's step and the map's size."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 3, 3))
    weight = (weight - weight.mean((2, 3), keepdims=True)).astype(np.float32)  # all that it writes sums to zero
    body = "a = Conv<pads=[2,2,2,2]>(x, w) p = GlobalAveragePool(a) y = Conv(p, u)"
    x = np.zeros((1, 3, 10, 10), np.float32)
    x[:, :, 3:7, 3:7] = rng.normal(size=(3, 4, 4))
    result = quantized(network(body, x=(1, 3, 10, 10), w=weight, u=(4, 4, 1, 1)), [{"x": x}])
    assert np.isfinite(result.got["y"]).all()
    np.testing.assert_allclose(result.got["y"], result.meant["y"], atol=1e-3)


def test_constants_shared_by_data_and_bounds() -> None:
    """One number is added, and is the bound of a Clip; one list is multiplied with, and is a Resize's scales."""
    body = (
        "c = Conv(x, w) r = Relu(c) a = Add(r, c) e = Mul(a, one) b = Clip(e, zero, one) y = Conv(b, v) z = Conv(e, v)"
    )
    numbers = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1), "one": 1.0, "zero": 0.0}
    quantized(network(body, outputs=("y", "z"), **numbers)).check(25)
    body = 'c = Conv(x, w) m = Resize<mode="nearest">(c, , k) d = Mul(m, k) y = Conv(d, v)'
    scales = np.float32([1, 1, 2, 2])
    quantized(network(body, x=(1, 3, 4, 4), w=(4, 3, 3, 3), k=scales, v=(4, 4, 1, 1))).check()


def test_a_mask_is_no_data() -> None:
    """What is added to shut positions out of a Softmax would leave one code for everything else."""
    mask = np.zeros((1, 4, 4, 4), np.float32)
    mask[:, :, :, 2:] = -1e9
    body = "c = Conv(x, w) a = Add(c, mask) s = Softmax<axis=-1>(a) y = Conv(s, v)"
    result = quantized(network(body, x=(1, 3, 6, 6), w=(4, 3, 3, 3), mask=mask, v=(4, 4, 1, 1))).check(25)
    assert "Add" in result.islands


def test_a_matmul_knows_nothing_of_single_channels() -> None:
    """Axis 1 of (N, S, K) is no channel, not even where S = K: pairs must fit for all codes."""
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 0.05, (8, 64, 64)).astype(np.float32)
    x[:, 0] = 1
    weight = rng.uniform(0.8, 1, (64, 16)).astype(np.float32)
    result = quantized(
        network("c = MatMul(x, w) r = Relu(c) y = MatMul(r, v)", x=(8, 64, 64), w=weight, v=(16, 8)), [{"x": x}]
    )
    codes = result.params.layers[0].codes.astype(np.int64)
    assert (255 * np.abs(codes[0::2] + codes[1::2])).max() <= 32767


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep_float_op": ("Conv",)}, "kept float by --keep-float-op"),
        ({"activation_bits": 32}, "only weights are quantized"),
        ({"activation_bits": 16}, "codes of 16 bits have no integer kernel"),
        (
            {"weight_granularity": WeightGranularity.PER_BLOCK},
            "weights with a scale for each block have no integer kernel",
        ),
    ],
)
def test_every_convolution_in_float_says_why(options: dict[str, object], why: str) -> None:
    """Under its own name, however ONNX Runtime calls the node it made of it."""
    found = {island.node: island.why for island in net(**options).audit.islands}
    assert {name: found.get(name) for name in "cdp"} == dict.fromkeys("cdp", why)


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_what_follows_a_result_in_float_is_counted_as_float() -> None:
    """QGemm without a quantizer behind it gives floats, so the Softmax works on floats."""
    body = "c = Conv(x, w) r = Relu(c) f = Flatten(r) g = Gemm(f, v) y = Softmax(g)"
    result = quantized(network(body, x=(2, 3, 6, 6), w=(4, 3, 3, 3), v=(64, 5)))
    assert "QGemm" in result.runs
    assert [(island.op, island.why) for island in result.audit.islands] == [
        ("Softmax", "behind the last layer with weights, where float keeps precision and costs little")
    ]
