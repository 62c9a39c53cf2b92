"""Nodes on 16 bits beside others on 8, in the file. Oracle: every rounding by hand, in NumPy.

Weights are one on the diagonal, which 8 bits hold, and ranges are those of the float tensors (minmax).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.config.choices import LayerBits
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from tests.support.models import Constant, network
from tests.support.quantized import Quantized, pictures, quantized

EYE = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
TOLERANCE = 2e-4
"""Some steps of 16 bits; one of 8 bits is 8e-3 and more."""


def divided(body: str, wide: str, **constants: Constant) -> Quantized:
    """The network with these nodes on 16 bits."""
    wishes = tuple((name, LayerBits(None, 16)) for name in wide.split())
    return quantized(
        network(body, x=(2, 3, 6, 6), w=EYE, **constants),
        pictures(),
        target="generic",
        calibrator="minmax",
        layer_bits=wishes,
        rounding="nearest",
    )


def rounded(x: NDArray, bits: int, *seen: NDArray) -> NDArray:
    """x on the grid of so many bits that spans all that was seen, or x itself."""
    low, high = min(0.0, *(s.min() for s in seen or (x,))), max(0.0, *(s.max() for s in seen or (x,)))
    scale = np.float32((high - low) / (2**bits - 1))
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def sigmoid(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def conversions(found: Quantized) -> list[onnx.NodeProto]:
    """The quantizers behind dequantizers."""
    writers = found.wiring.writers
    behind = found.wiring.all("QuantizeLinear")
    return [n for n in behind if n.input[0] in writers and writers[n.input[0]].op_type == "DequantizeLinear"]


def code_types(found: Quantized) -> Mapping[str, int]:
    """The types of codes, by the names of what writes them."""
    constants = {tensor.name: tensor.data_type for tensor in found.proto.graph.initializer}
    return {node.name.removesuffix("_q"): constants[node.input[2]] for node in found.wiring.all("QuantizeLinear")}


@pytest.fixture
def x() -> NDArray:
    return np.concatenate([feeds["x"] for feeds in pictures()])


def test_a_chain_with_a_border(x: NDArray) -> None:
    found = divided("a = Conv(x, w) g = Sigmoid(a) y = Conv(g, w)", "a")
    a = rounded(rounded(x, 16), 16, x)
    g = rounded(sigmoid(rounded(a, 8, x)), 8, sigmoid(x))
    np.testing.assert_allclose(found.meant["y"], g, atol=TOLERANCE)
    assert [node.name for node in conversions(found)] == ["a_8_bits_q"]
    assert found.wiring.count("Identity") == 0
    wide, narrow = onnx.TensorProto.UINT16, onnx.TensorProto.UINT8
    assert code_types(found) == {"x": wide, "a": wide, "a_8_bits": narrow, "g": narrow, "y": narrow}
    assert found.proto.opset_import[0].version == 21


def test_a_border_the_other_way(x: NDArray) -> None:
    """What 8 bits have lost does not come back, and nothing more is lost."""
    found = divided("a = Conv(x, w) g = Sigmoid(a) y = Conv(g, w)", "g y")
    np.testing.assert_allclose(found.meant["y"], sigmoid(rounded(x, 8)), atol=TOLERANCE)
    assert [node.name for node in conversions(found)] == ["a_16_bits_q"]


def test_a_residual_add_with_unlike_writers(x: NDArray) -> None:
    """b is depthwise and has three taps, so that no layer stands for both."""
    half = np.zeros((3, 1, 1, 3), np.float32)
    half[..., 1] = 0.5
    body = "a = Conv(x, w) b = Conv<group=3, pads=[0,1,0,1]>(x, v) s = Add(a, b) y = Conv(s, w)"
    found = divided(body, "b", v=half)
    a, b = rounded(rounded(x, 8), 8, x), rounded(rounded(x / 2, 16), 8, x / 2)
    np.testing.assert_allclose(found.meant["y"], rounded(a + b, 8, 1.5 * x), atol=TOLERANCE)
    assert {node.name for node in conversions(found)} == {"x_8_bits_q", "b_8_bits_q"}


def test_a_concat_of_unlike_widths(x: NDArray) -> None:
    """b reaches half as far as a; both share the parameters of what they are joined to."""
    body, half = "a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u)", EYE * np.float32(0.5)
    found = divided(body, "a", v=half, u=np.eye(6, dtype=np.float32).reshape(6, 6, 1, 1))
    joined = np.concatenate([rounded(x, 8), rounded(rounded(x, 8) / 2, 8, x)], axis=1)
    np.testing.assert_allclose(found.meant["y"], joined, atol=TOLERANCE)
    scales = {node.name: node.input[1] for node in found.wiring.all("QuantizeLinear")}
    assert scales["a_8_bits_q"] == scales["b_q"] == scales["c_q"]


def test_a_branch_that_both_kinds_read_is_converted_once(x: NDArray) -> None:
    body = "a = Conv(x, w) g = Sigmoid(a) h = Tanh(a) b = Conv(a, w) c = Conv(a, w) s = Add(b, c) t = Mul(s, g)"
    found = divided(f"{body} y = Conv(t, w)", "a g")
    assert sorted(node.name for node in conversions(found)) == ["a_8_bits_q", "g_8_bits_q"]
    b = rounded(rounded(rounded(x, 16), 8, x), 8, x)
    s, g = rounded(2 * b, 8, 2 * x), rounded(rounded(sigmoid(x), 16), 8)
    np.testing.assert_allclose(found.meant["y"], rounded(rounded(s * g, 8, 2 * x * sigmoid(x)), 8), atol=TOLERANCE)


def test_constants_have_the_bits_of_their_node(x: NDArray) -> None:
    """0.311 and 1 on 8 bits of 1/255 are 0.310 and 1; on 16 bits they are what they are."""
    k = np.float32([0.311, 1, 0.724, 0.311, 1, 0.724])  # along the rows, where it is no weight of a layer
    found = divided("a = Conv(x, w) b = Mul(a, k) c = Mul(a, k) s = Add(b, c) y = Conv(s, w)", "a b s y", k=k)
    b, c = x * k, rounded(rounded(x, 8) * rounded(k, 8), 8, x * k)
    np.testing.assert_allclose(found.meant["y"], rounded(b + c, 16, 2 * x * k), atol=TOLERANCE)


def test_a_bias_fits_into_int32_beside_16_bits(x: NDArray) -> None:
    """s_x s_w is about 2 / 65535 / 127: 10000 would be 4e10 steps, which int32 does not hold; the scale is widened."""
    found = divided("a = Conv(x, w, n) y = Sigmoid(a) z = Conv(y, w)", "a", n=np.float32([1e4, -1e4, 0]))
    assert any("so that the bias fits into int32" in str(finding) for finding in found.findings)
    signs = np.broadcast_to(np.float32([1, 0, 0.5]).reshape(1, 3, 1, 1), x.shape)
    np.testing.assert_allclose(found.meant["y"][:, :2], signs[:, :2], atol=0.01)


def test_a_target_without_16_bits_refuses_them() -> None:
    with pytest.raises(QconvError, match="activations of 16 bits and --target openvino"):
        Recipe(target="openvino", layer_bits=(("a", LayerBits(None, 16)),))
