"""Sums of float32 numbers that do not depend on the order in which the numbers came.

Floating-point addition is not associative, so that pictures in another order, or in four shards instead of one run,
would give other last bits. Here a number is cut at fixed binary places into a few whole numbers, which are added as
integers: exactly. Sums of sums are as exact.

    x = integer * 2^(32 k - 149 + offset),  offset in 0..31;  limb k collects integer * 2^offset

149 is where float32 ends; every float32 fits into one limb of 55 bits before carrying.

Source: Kulisch's long accumulator; Kulisch and Miranker 1981, Computer Arithmetic in Theory and Practice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LIMBS, LIMB_BITS = 10, 32
LEAST_EXPONENT = -149
DIGITS = 24
MOST_AT_ONCE = 128
"""Numbers of 55 bits that one int64 adds up before it must carry."""


@dataclass(slots=True)
class ExactSum:
    """Sums of C series of numbers. limbs: (LIMBS, C) int64, all but the last in 0 .. 2^32 - 1."""

    limbs: NDArray[np.int64]

    @classmethod
    def zeros(cls, count: int) -> ExactSum:
        """Nothing added yet to `count` series."""
        return cls(np.zeros((LIMBS, count), np.int64))

    def add(self, rows: ArrayLike) -> None:
        """Add float32 numbers (n, C), row by row. Raises ValueError where one is not finite."""
        numbers = np.asarray(rows, np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError("only finite numbers have an exact sum")
        for start in range(0, len(numbers), MOST_AT_ONCE):
            self._add(numbers[start : start + MOST_AT_ONCE])
            self._carry()

    def _add(self, numbers: NDArray[np.float32]) -> None:
        _, exponents = np.frexp(numbers)
        places = np.maximum(exponents - DIGITS, LEAST_EXPONENT) - LEAST_EXPONENT  # (n, C), of the last digit
        limb, offset = places >> 5, places & 31
        # float64, in which neither the digits nor the shift lose anything
        shifted = np.ldexp(numbers.astype(np.float64), offset - places - LEAST_EXPONENT).astype(np.int64)
        for k in range(int(limb.min(initial=LIMBS)), int(limb.max(initial=-1)) + 1):
            self.limbs[k] += np.where(limb == k, shifted, 0).sum(axis=0)

    def _carry(self) -> None:
        for k in range(LIMBS - 1):
            over = self.limbs[k] >> LIMB_BITS
            self.limbs[k] -= over << LIMB_BITS
            self.limbs[k + 1] += over

    def merge(self, other: ExactSum) -> ExactSum:
        """The sums of both together."""
        both = ExactSum(self.limbs + other.limbs)
        both._carry()
        return both

    def overall(self) -> ExactSum:
        """One sum of all series."""
        total = ExactSum(np.zeros((LIMBS, 1), np.int64))
        for column in range(self.limbs.shape[1]):
            total = total.merge(ExactSum(self.limbs[:, column : column + 1]))
        return total

    @property
    def values(self) -> NDArray[np.float64]:
        """The sums, (C,)."""
        weights = np.ldexp(1.0, LIMB_BITS * np.arange(LIMBS) + LEAST_EXPONENT)  # (LIMBS,)
        total = np.zeros(self.limbs.shape[1])
        # from the top, where a negative sum has its sign: the rest only adds to it
        for weight, limb in zip(weights[::-1], self.limbs[::-1], strict=True):
            total += weight * limb
        return total
