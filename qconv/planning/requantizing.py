"""HardSigmoid on codes: a line that a quantizer draws, because codes end where the line does.

With codes q of x, scale s and zero point z, and L = 255,

    HardSigmoid(x) = max(0, min(1, alpha * x + beta))
                  ~= clip(round(L * alpha * s * (q - z)) + Z, 0, L) / L        Z = round(L * beta)

so that codes of x, read with the scale alpha * s and quantized with 1 / L and Z, are codes of the result with the scale
1 / L and zero point 0. That is within half a code for the rounding and half a code for Z, and exact at both ends; a
scale of 1 / 256, for which beta = 0.5 has a whole Z, would end at 255 / 256 and make all that passes smaller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qconv.ir.model import Node, attribute
from qconv.quantizer import QuantParams

LAST_CODE = 255


@dataclass(frozen=True, slots=True)
class Requantizer:
    """The quantizer between codes. factor: of the scale to read with; zero_point: to quantize with."""

    factor: float
    zero_point: int

    def read(self, codes: QuantParams) -> QuantParams:
        """The parameters to read codes of x with, by those that they have."""
        return replace(codes, scale=np.asarray(codes.scale * np.float32(self.factor)))

    def write(self, result: QuantParams) -> QuantParams:
        """The parameters to quantize with, by those that the result is read with."""
        return replace(result, zero_point=np.asarray(self.zero_point, result.zero_point.dtype))


def find_requantizer(node: Node) -> Requantizer | None:
    """The quantizer that does what a HardSigmoid does; None where its line falls, or starts outside of 0 to 1."""
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    return Requantizer(alpha, round(LAST_CODE * beta)) if alpha > 0 and 0 <= beta <= 1 else None
