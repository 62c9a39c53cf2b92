"""Biases in the file that runs: their scale, and values beyond int32."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.config.choices import WeightGranularity
from qconv.errors import Change
from tests.support.models import network
from tests.support.quantized import LAYERS, net, quantized


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("granularity", [WeightGranularity.PER_TENSOR, WeightGranularity.PER_CHANNEL])
def test_the_bias_scale_is_the_product(granularity: WeightGranularity, activation_bits: int) -> None:
    """Exactly, as float32 numbers: ONNX Runtime ignores a scale that is a little off."""
    wiring = net(weight_granularity=granularity, activation_bits=activation_bits).wiring
    layers = wiring.all("Conv", "Gemm")
    assert len(layers) == len(LAYERS)
    for node in layers:
        data, _ = wiring.parameters(node.input[0])
        weight, _ = wiring.parameters(node.input[1])
        scale, zero = wiring.parameters(node.input[2])
        np.testing.assert_array_equal(scale, data * weight)
        assert scale.dtype == np.float32
        assert wiring.codes(node.input[2]).data_type == onnx.TensorProto.INT32
        assert not zero.any()


def test_blocks_leave_the_bias_float() -> None:
    """There is no one scale of the weights that it could share."""
    wiring = net(weight_granularity=WeightGranularity.PER_BLOCK, block_size=4).wiring
    for node in wiring.all("Conv", "Gemm"):
        assert wiring.constants[node.input[2]].dtype == np.float32


HUGE_BIAS = np.float32([3.0, 0.5, -3.0, 0.0])


def small_weights() -> NDArray[np.float32]:
    """Channels 0 and 2 are a million times smaller than their bias."""
    weight = np.random.default_rng(0).uniform(-1, 1, (4, 3, 3, 3)).astype(np.float32)
    weight[[0, 2]] *= np.float32(1e-7)
    return weight


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 4), (16, 16), (8, 16), (16, 8), (8, 32)]
)
def test_a_bias_beyond_int32_keeps_its_value(
    granularity: WeightGranularity, weight_bits: int, activation_bits: int
) -> None:
    """3.0 / (s_x * s_w) is 10^11. The output of such a channel is the bias, whatever its weights become."""
    proto = network("y = Conv(x, w, b)", w=small_weights(), b=HUGE_BIAS)
    result = quantized(
        proto,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=2,
        weight_granularity=granularity,
        block_size=2,
    )
    step = 0.0 if activation_bits == 32 else float(result.wiring.parameters("y")[0])
    for found in (result.got["y"], result.meant["y"]):
        for channel in (0, 2):
            assert np.abs(found[:, channel] - HUGE_BIAS[channel]).max() <= 0.51 * step + 1e-5


def test_a_bias_beyond_int32_widens_its_own_channel_and_says_so() -> None:
    proto = network("y = Conv(x, w, b)", w=small_weights(), b=HUGE_BIAS)
    result = quantized(proto, activation_bits=7, edge_bits=7).check(25)  # 8 bits may widen for another reason
    (said,) = [f for f in result.findings if isinstance(f, Change) and "widened" in f.what]
    assert said.where == "y"
    assert said.what == "weight scale of 2 channels widened, so that the bias fits into int32"
    (layer,) = result.params.layers
    tightest = np.abs(small_weights()).max(axis=(1, 2, 3)) / 127
    assert (layer.weight.scale > tightest * 1.001).tolist() == [True, False, True, False]
    codes = onnx.numpy_helper.to_array(result.wiring.codes(result.wiring.all("Conv")[0].input[2]))
    assert np.abs(codes.astype(np.int64)).max() <= 2**30 * 1.001


def test_a_gemms_bias_beyond_int32_keeps_its_value() -> None:
    weight = np.random.default_rng(1).uniform(-1e-7, 1e-7, (5, 4)).astype(np.float32)
    proto = network("a = Relu(x) y = Gemm(a, w, b)", x=(2, 5), w=weight, b=HUGE_BIAS)
    for granularity in WeightGranularity:
        result = quantized(proto, weight_granularity=granularity, block_size=2)
        np.testing.assert_allclose(result.got["y"], result.expected["y"], atol=1e-5)
        np.testing.assert_allclose(result.meant["y"], result.expected["y"], atol=1e-5)


def test_a_dead_channel_gives_its_bias() -> None:
    weight = small_weights()
    weight[0] = 0
    result = quantized(network("y = Conv(x, w, b)", w=weight, b=HUGE_BIAS))
    step = float(result.wiring.parameters("y")[0])
    assert np.abs(result.got["y"][:, 0] - 3).max() <= 0.51 * step


@pytest.mark.parametrize("granularity", WeightGranularity)
def test_weights_that_are_all_zero(granularity: WeightGranularity) -> None:
    proto = network(
        "c = Conv(x, w, b) y = Conv(c, v)", w=np.zeros((4, 3, 3, 3), np.float32), b=HUGE_BIAS, v=(2, 4, 1, 1)
    )
    quantized(proto, weight_granularity=granularity).check()
