"""HardSigmoid on codes: a line that ends where codes end, so that a sum with a constant draws it.

With codes q of x, scale s and zero point z, and L = 255,

    HardSigmoid(x) = max(0, min(1, alpha * x + beta)) ~= clip(round(L * (alpha * s * (q - z) + beta)), 0, L) / L

so that codes of x, read with the scale alpha * s, plus beta and quantized with scale 1 / L and zero point 0 are codes
of the result, within half a code. A quantizer alone would do, with round(L * beta) as its zero point, but takes longer
than ONNX Runtime's integer Add of a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

import numpy as np

from qconv.ir.model import Node, attribute
from qconv.quantizer import QuantParams


@dataclass(frozen=True, slots=True)
class SaturatingLine:
    """A line that a HardSigmoid cuts off at 0 and 1."""

    slope: float
    shift: float

    def read(self, codes: QuantParams) -> QuantParams:
        """The parameters to read codes of x with, by those that they have."""
        return replace(codes, scale=np.asarray(codes.scale * np.float32(self.slope)))


def find_saturating_line(node: Node) -> SaturatingLine | None:
    """The line of a HardSigmoid; None where it does not rise."""
    line = SaturatingLine(float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5)))
    return line if isfinite(line.slope) and line.slope > 0 and isfinite(line.shift) else None
