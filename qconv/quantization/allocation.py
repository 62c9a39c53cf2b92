"""How many bits each channel gets where their mean is given: the wider its range, the more.

Rounding to 2^M_i codes over a range of half-width alpha_i costs alpha_i^2 / (3 * 4^M_i) an element. With B levels in
all the sum over channels is least at

    M_i = log2( alpha_i^(2/3) / sum over j of alpha_j^(2/3) * B ),      B = C * 2^M

This is rounded to whole bits, kept within bounds, and then single bits are moved until their mean is M: given where one
gains most by the formula of the cost, taken where one loses least. What clipping costs does not count here: it falls
with rounding where ranges are the optimal ones for their bits.

Source: Banner et al. 2019, arXiv 1810.05723, section 5, equation 14; moving the remainder is not theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def closed_form(alpha: Float64, mean_bits: float) -> Float64:
    """M_i of each channel, not rounded; minus infinity for a channel without a range. alpha: half-widths, (C,)."""
    share = np.cbrt(np.asarray(alpha, np.float64)) ** 2
    total = share.sum()
    if not total > 0:
        return np.full(share.shape, float(mean_bits))
    with np.errstate(divide="ignore"):
        return np.asarray(np.log2(share / total * (len(share) * 2.0**mean_bits)))


def allocate(alpha: Float64, mean_bits: int, *, least: int, most: int) -> NDArray[np.int64]:
    """Whole bits of each channel, (C,), within [least, most] and C * mean_bits in all. alpha: half-widths, (C,)."""
    alpha = np.asarray(alpha, np.float64)
    bits = np.clip(np.rint(closed_form(alpha, mean_bits)), least, most).astype(np.int64)
    spare = len(bits) * mean_bits - int(bits.sum())
    while spare:
        # a bit more saves, a bit less costs, a fixed multiple of this
        weight = alpha**2 * 4.0**-bits
        free = bits < most if spare > 0 else bits > least
        if not free.any():
            break
        if spare > 0:
            bits[np.argmax(np.where(free, weight, -1.0))] += 1
            spare -= 1
        else:
            bits[np.argmin(np.where(free, weight, np.inf))] -= 1
            spare += 1
    return bits
