"""HardSigmoid as a sum of codes and a constant. Oracle: its definition by ONNX, max(0, min(1, alpha * x + beta))."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qconv.ir.model import Model
from qconv.planning.saturating_line import find_saturating_line
from qconv.quantizer import QuantSpec
from tests.support.models import loaded, network

LINES = list(product([0.05, 1 / 6, 0.2, 1.0, 7.0], [-0.4, 0.0, 0.1, 0.5, 1.0, 1.3]))
CODES = np.arange(256, dtype=np.uint8)


def gate(alpha: float, beta: float) -> Model:
    return loaded(network(f"y = HardSigmoid<alpha={alpha:.9f}, beta={beta:.9f}>(x)", x=("N", 8)))


@pytest.mark.parametrize(("alpha", "beta"), LINES)
@pytest.mark.parametrize("ends", [(-3.0, 8.0), (-40.0, 0.0), (0.0, 1.3), (-0.2, 0.3)])
def test_every_code_comes_within_half_a_code_and_both_ends_are_exact(
    alpha: float, beta: float, ends: tuple[float, float]
) -> None:
    """Half a code, and float32's last bits."""
    (node,) = gate(alpha, beta).nodes()
    line = find_saturating_line(node)
    assert line is not None
    spec = QuantSpec(8, signed=False, symmetric=False)
    read, result = spec.from_range(*ends), spec.from_range(0.0, 1.0)
    x = read.dequantize(CODES).astype(np.float64)
    found = result.dequantize(result.quantize(line.read(read).dequantize(CODES) + np.float32(line.shift)))
    exact = np.clip(np.float32(alpha) * x + np.float32(beta), 0, 1)
    assert np.abs(found - exact).max() <= 0.501 / 255
    assert np.all(found[np.float32(alpha) * x + np.float32(beta) >= 1] == 1)
    assert np.all(found[np.float32(alpha) * x + np.float32(beta) <= 0] == 0)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.2, 0.5), (0.0, 0.5)])
def test_lines_that_do_not_rise_are_refused(alpha: float, beta: float) -> None:
    (node,) = gate(alpha, beta).nodes()
    assert find_saturating_line(node) is None
