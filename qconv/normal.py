"""What cutting off does to a normal variable: such are BatchNormalization's outputs, about, and Relu and Clip cut them.

    x ~ N(m, s^2),  y = min(max(x, a), b),  A = (a - m) / s,  B = (b - m) / s

    E[y]   = m + s e,     e = A P(A) + B (1 - P(B)) + p(A) - p(B)
    Var[y] = s^2 (A^2 P(A) + B^2 (1 - P(B)) + P(B) - P(A) + A p(A) - B p(B) - e^2)

p, P: density and distribution function of N(0, 1). m is BatchNormalization's beta, s the size of its gamma.

Parts of a sum are taken for independent. A sum with a part that was never cut off counts as normal again: Relu behind
the Add of a residual network needs that. On ResNet-20 the means behind such a Relu are 9 to 22 % away from those on
pictures, and behind a Relu that reads a single BatchNormalization 9 to 32 %.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.1 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
FAR = 40.0
"""Standard deviations beyond which float64 has no probability left; so infinite bounds need no case of their own."""

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


@dataclass(frozen=True, slots=True, eq=False)
class Normal:
    """Channels of a tensor. mean, std: (C,) both; std is None where it is not known.

    cut: values were cut off, so that the channels are no longer normal.
    """

    mean: Float64
    std: Float64 | None = None
    cut: bool = False

    def scaled(self, gain: Float64, shift: Float64) -> Normal:
        """gain * x + shift, both (C,) or (1,)."""
        return Normal(self.mean * gain + shift, None if self.std is None else self.std * np.abs(gain), self.cut)

    def plus(self, other: Normal) -> Normal:
        """The sum with another tensor, as if independent of it."""
        known = self.std is not None and other.std is not None
        std = np.hypot(self.std, other.std) if known else None  # type: ignore[arg-type]
        return Normal(self.mean + other.mean, std, self.cut and other.cut)

    def of(self, channels: NDArray[np.int64]) -> Normal:
        """Some of the channels, or some several times."""
        return Normal(self.mean[channels], None if self.std is None else self.std[channels], self.cut)

    @classmethod
    def joined(cls, parts: Sequence[Normal]) -> Normal:
        """Channels side by side."""
        stds = [part.std for part in parts if part.std is not None]
        std = np.concatenate(stds) if len(stds) == len(parts) else None
        return cls(np.concatenate([part.mean for part in parts]), std, any(part.cut for part in parts))

    def averaged(self) -> Normal:
        """Means over places: how far these vary depends on how alike neighbours are."""
        return Normal(self.mean, None, cut=True)

    def clipped(self, low: float, high: float) -> Normal:
        """Cut off at two bounds, which may be infinite. What this needs: std, and not cut off before."""
        assert self.std is not None
        assert not self.cut
        mean, deviation = self.mean, self.std
        certain = deviation == 0
        scale = np.where(certain, 1.0, deviation)
        with np.errstate(over="ignore"):
            a, b = (np.clip((bound - mean) / scale, -FAR, FAR) for bound in (low, high))
        below, above = _tail(-a), _tail(b)  # P(A), 1 - P(B)
        rises = a * below + b * above + _density(a) - _density(b)
        squares = a * a * below + b * b * above + (1 - below - above) + a * _density(a) - b * _density(b)
        spread = scale * np.sqrt(np.maximum(squares - rises * rises, 0))
        moved = np.clip(np.where(certain, mean, mean + scale * rises), low, high)
        return Normal(moved, np.where(certain, 0.0, spread), cut=True)


def _density(z: Float64) -> Float64:
    return np.asarray(np.exp(-z * z / 2) / math.sqrt(2 * math.pi))


def _tail(z: Float64) -> Float64:
    """The probability of more than z."""
    return np.asarray(_erfc(z / math.sqrt(2)) / 2)
