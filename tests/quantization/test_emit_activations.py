"""Relu, Clip and Pad in the file that runs: which node stays, and at which values integers saturate."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.config.choices import Scheme
from tests.support.models import Constant, ints, network
from tests.support.quantized import SAME, Quantized, quantized


def clipped(low: float | None, high: float | None, gain: float, **options: object) -> Quantized:
    """Conv -> Clip -> Conv, the first Conv's output from -gain to gain."""
    constants: dict[str, Constant] = {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1) * np.float32(gain)}
    if low is not None:
        constants["low"] = low
    if high is not None:
        constants["high"] = high
    ends = f"{'low' if low is not None else ''}, {'high' if high is not None else ''}".rstrip(", ")
    body = f"c = Conv(x, w) a = Clip(c, {ends}) y = Conv(a, v)"
    return quantized(network(body, v=(4, 3, 1, 1), **constants), **options)


@pytest.mark.parametrize(
    ("low", "high", "gain", "removed"),
    [
        (0.0, 6.0, 4.0, True),  # values 0 to 4: never above 6
        (0.0, 6.0, 40.0, True),  # values 0 to 6: the codes end where the Clip does
        (-1.0, 1.0, 0.5, True),
        (0.0, None, 3.0, True),
        (1.0, 6.0, 20.0, False),  # the range holds zero, which is below 1
        (-6.0, -1.0, 20.0, False),
    ],
)
def test_a_clip_goes_where_the_codes_saturate_at_its_bounds(
    low: float | None, high: float | None, gain: float, removed: bool
) -> None:
    result = clipped(low, high, gain).check()
    assert result.wiring.count("Clip") == (0 if removed else 1)
    assert result.audit.islands == ()


def test_a_clip_stays_where_the_codes_reach_further() -> None:
    """Symmetric codes of -1 to 6 reach down to -6."""
    result = clipped(-1.0, 6.0, 20.0, activation_scheme=Scheme.SYMMETRIC).check()
    assert result.wiring.count("Clip") == 1
    assert result.audit.islands == ()


def test_a_relu_stays_where_its_result_shares_a_wider_range() -> None:
    """Joined with a tensor that has negative values, its codes can go below zero, and its values must not."""
    body = f"c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(x, v) y = Concat<axis=1>(r, d) z = Conv(y, u)"
    proto = network(body, outputs=("y", "z"), w=(4, 3, 3, 3), v=(4, 3, 3, 3), u=(2, 8, 1, 1))
    result = quantized(proto).check()
    assert result.got["y"][:, :4].min() >= 0 > result.got["y"][:, 4:].min()
    assert result.meant["y"][:, :4].min() >= 0
    assert result.wiring.count("Relu") == 0
    assert result.wiring.count("Clip") == 1
    assert result.audit.islands == ()


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_relu_returns_nothing_below_zero(bits: int) -> None:
    for scheme in Scheme:
        proto = network("c = Conv(x, w) y = Relu(c)", w=(4, 3, 3, 3))
        result = quantized(proto, activation_bits=bits, activation_scheme=scheme, edge_bits=2)
        assert result.got["y"].min() == 0
        assert result.sqnr() > (3 if bits == 2 else 15)


def test_a_layer_with_two_readers_shows_its_values_below_zero() -> None:
    body = "c = Conv(x, w) r = Relu(c) a = Conv(r, v) b = Conv(c, v) y = Add(a, b)"
    result = quantized(network(body, w=(4, 3, 3, 3), v=(4, 4, 1, 1))).check()
    assert result.audit.islands == ()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad_works_on_codes(mode: str, bits: int) -> None:
    body = f'c = Conv(x, w) p = Pad<mode="{mode}">(c, widths) m = MaxPool<kernel_shape=[2,2]>(p) y = Conv(m, v)'
    proto = network(body, w=(4, 3, 3, 3), widths=ints(0, 0, 1, 1, 0, 0, 1, 1), v=(4, 4, 1, 1))
    for scheme in Scheme:
        quantized(proto, activation_bits=bits, activation_scheme=scheme).check(30 if bits > 4 else 12)


def test_pad_with_axes_works_on_codes() -> None:
    body = "c = Conv(x, w) p = Pad(c, widths, , axes) m = MaxPool<kernel_shape=[2,2]>(p) y = Conv(m, v)"
    proto = network(body, opset=18, w=(4, 3, 3, 3), widths=ints(1, 2, 0, 1), axes=ints(2, 3), v=(4, 4, 1, 1))
    assert quantized(proto).check().audit.islands == ()
