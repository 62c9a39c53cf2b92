"""What of a layer's outputs reaches whoever reads them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qconv.quantization.effective_range import UNBOUNDED, EffectiveRange
from qconv.quantization.input_moments import accumulate_moments
from qconv.quantizer import QuantParams, QuantSpec
from tests.support.models import loaded, network

UINT8 = QuantSpec(8, False, symmetric=False)
CODES = QuantParams(UINT8, np.array(0.1, np.float32), np.array(20, np.uint8))  # -2 to 23.5


@pytest.mark.parametrize(
    ("body", "bounds", "with_codes"),
    [
        ("y = Conv(x, w)", UNBOUNDED, ["y"]),
        ("a = Conv(x, w) y = Relu(a)", (0.0, math.inf), ["y"]),
        ("a = Conv(x, w) y = Clip(a, l, h)", (0.0, 6.0), ["y"]),
        ("a = Conv(x, w) y = Sigmoid(a)", UNBOUNDED, ["a"]),
        ("a = Conv(x, w) b = Relu(a) y = Add(a, b)", UNBOUNDED, ["a"]),  # somebody else reads it
        ("a = Conv(x, w) y = Relu(a)", UNBOUNDED, ["a", "y"]),  # rounded before it is cut
    ],
)
def test_bounds_and_codes(body: str, bounds: tuple[float, float], with_codes: list[str]) -> None:
    ends = {name: np.array(end, np.float32) for name, end in (("l", 0), ("h", 6)) if f", {name}" in body}
    model = loaded(network(body, (1, 3, 4, 4), w=(4, 3, 1, 1), **ends))
    values = {value.name: value for node in model.nodes() for value in node.outputs}
    effective_range = EffectiveRange.of_consumers(model.nodes()[0], {values[name]: CODES for name in with_codes})
    assert effective_range.bounds == bounds
    assert effective_range.codes == pytest.approx((-2.0, 23.5))
    assert EffectiveRange.of_consumers(model.nodes()[0], {}).codes == UNBOUNDED


def test_what_is_seen_of_both_networks() -> None:
    outputs = np.array([-9.0, -1, 3, 9], np.float32).reshape(1, 4, 1)
    effective_range = EffectiveRange((0.0, 6.0), (-2.0, 5.0))
    assert effective_range.of_float(outputs).ravel().tolist() == [0, 0, 3, 6]
    assert effective_range.of_rounded(outputs).ravel().tolist() == [0, 0, 3, 5]
    assert EffectiveRange(codes=(-2.0, 5.0)).of_rounded(outputs).ravel().tolist() == [-2, -1, 3, 5]


def test_means_and_bias_come_back() -> None:
    """Rows less their mean, times weights, and the centre: what the layer makes of the rows."""
    rng = np.random.default_rng(0)
    rows, bias = rng.normal(2, 1, (1, 50, 3)).astype(np.float32), np.array([1, -2], np.float32)
    model = loaded(network("y = Gemm<transB=1>(x, w, b)", (1, 3), w=(2, 3), b=bias))
    (node,) = model.nodes()
    weight = rng.standard_normal((1, 2, 3)).astype(np.float32)
    seen = accumulate_moments([(rows, rows)])
    effective_range = EffectiveRange().around(node, weight, seen)
    centred = (rows - seen.float_mean[:, None].astype(np.float32)) @ np.swapaxes(weight, 1, 2)
    np.testing.assert_allclose(effective_range.of_float(centred)[0], rows[0] @ weight[0].T + bias, atol=1e-5)
