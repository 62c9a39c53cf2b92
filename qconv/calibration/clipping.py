"""Ranges that clip the largest values, so that all others get finer steps: by search and in closed form.

    expected squared error = sum over bins of share * E[(fake(x) - x)^2],   x evenly spread inside each bin

`fake` is the very quantizer that will be used, its rounded zero point and its narrow or full range of codes included.

    MSE     the range with the least expected squared error, searched from the full one inwards
    ACIQ    alpha = the optimum for a Laplace or Gaussian density of the scale that was measured, in closed form

Sources: MSE: Sung et al. 2015, arXiv 1511.06488; Nagel et al. 2021, arXiv 2106.08295, section 3.1.
ACIQ: Banner et al. 2019, arXiv 1810.05723, section 4; the Gaussian optimum also in Max 1960.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Histogram
from qconv.quantizer import SMALLEST_SCALE, QuantParams, QuantSpec

Float64 = NDArray[np.float64]
Range = tuple[float, float]
Error = Callable[[Float64, Float64], Float64]
"""Expected error of every pair of lower and upper ends, (K,), (K,) -> (K,)."""

STEPS_AT_ONCE, FINER, MOST_ROUNDS = 8, 8, 3
INTERVALS = 256
SHRINK = 2.0**-0.25
LEAST_SHARE = 2.0**-16
NARROW = 1e-2
"""Bins narrower than this share of a step count at their centre: differences of their ends would be all rounding."""


def expected_error(histogram: Histogram, params: QuantParams) -> Float64:
    """E[(fake(x) - x)^2] of each of K quantizers, (K,). params: of K scales and zero points, (K,) each."""
    scale = params.scale.astype(np.float64)[:, None]  # (K, 1)
    zero = params.zero_point.astype(np.float64)[:, None]
    low, high = params.spec.qmin - zero, params.spec.qmax - zero
    left, right = histogram.edges[0] / scale, histogram.edges[1] / scale  # (K, B), in steps
    width = right - left
    middle = (left + right) / 2
    at_centre = (np.clip(np.rint(middle), low, high) - middle) ** 2
    wide = width > NARROW
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (_integral(right, low, high) - _integral(left, low, high)) / width
    error: Float64 = np.where(wide, spread, at_centre) @ histogram.shares * scale[:, 0] ** 2
    return error


def _integral(t: Float64, low: Float64, high: Float64) -> Float64:
    """Of the squared error from 0 to t, in steps: a cell around each code, cubes outside the first and the last."""
    inside = np.clip(t, low - 0.5, high + 0.5)
    cell = np.rint(inside)
    above, below = np.maximum(t - high, 0.5), np.maximum(low - t, 0.5)
    found: Float64 = cell / 12 + (_cube(inside - cell) + _cube(above) - _cube(below)) / 3
    return found


def _cube(x: Float64) -> Float64:
    return x * x * x  # a power takes twenty times as long


def least_squares(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> Range:
    """The range inside [low, high] with the least expected squared error.

    Bins much narrower than a step are joined for the search, and where it ends far inside, it begins again from there.
    """
    while True:
        coarse = histogram.coarse(max(-low, high, SMALLEST_SCALE) / INTERVALS)
        found = search(partial(_expected, coarse, spec), spec, low, high)
        if found[1] - found[0] > (high - low) / 2 or found == (low, high):
            return found
        low, high = found


def _expected(histogram: Histogram, spec: QuantSpec, lows: Float64, highs: Float64) -> Float64:
    return expected_error(histogram, spec.from_range(lows, highs))


def search(error: Error, spec: QuantSpec, low: float, high: float) -> Range:
    """The range inside [low, high] with the least error. Both ends together for a symmetric spec, else one by one."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric or low == 0 or high == 0:
        share = _best_share(lambda shares: error(low * shares, high * shares))
        return low * share, high * share
    # both together first: with few codes, one end alone seems stuck, because the zero point's rounding moves the other
    shares = np.full(2, _best_share(lambda candidates: error(low * candidates, high * candidates)))
    least = float(error(low * shares[:1], high * shares[1:])[0])
    for _ in range(MOST_ROUNDS):
        for end in (0, 1):
            shares[end] = _best_share(_along(error, (low, high), shares, end))
        found = float(error(low * shares[:1], high * shares[1:])[0])
        if not found < least * 0.995:
            break
        least = found
    return low * float(shares[0]), high * float(shares[1])


def _along(error: Error, ends: Range, shares: Float64, moved: int) -> Callable[[Float64], Float64]:
    """The error as a function of one end's share, the other one held."""

    def at(candidates: Float64) -> Float64:
        both = [np.full(len(candidates), share) for share in shares]
        both[moved] = candidates
        return error(ends[0] * both[0], ends[1] * both[1])

    return at


def _best_share(error: Callable[[Float64], Float64]) -> float:
    """The share of the full range with the least error: coarse steps inwards until it rises, then two finer rounds."""
    best, least, share = 1.0, math.inf, 1.0
    while share > LEAST_SHARE:
        shares = share * SHRINK ** np.arange(STEPS_AT_ONCE, dtype=np.float64)
        found = error(shares)
        at = int(found.argmin())
        if found[at] < least:
            best, least = float(shares[at]), float(found[at])
        if at < STEPS_AT_ONCE - 1:
            break
        share = float(shares[-1])
    reach = 1.0
    for _ in range(2):
        ends = best * SHRINK**reach, min(1.0, best / SHRINK**reach)
        shares = np.linspace(*ends, FINER, dtype=np.float64)
        found = error(shares)
        at = int(found.argmin())
        if found[at] < least:
            best, least = float(shares[at]), float(found[at])
        reach *= 2 / FINER
    return best


# -- ACIQ --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Density:
    """A bell: where its middle is, and its scale: E|x - centre| of Laplace's, the standard deviation of Gauss's."""

    laplace: bool
    centre: float
    scale: float


def laplace_factor(bits: int, *, one_sided: bool) -> float:
    """alpha / b that minimises 2 b^2 exp(-alpha/b) + alpha^2 / (3 * 4^bits), Banner et al. 2019, equation 8.

    Its derivative is zero where (alpha/b) exp(alpha/b) = 3 * 4^bits: 2.83, 3.89 and 5.03 for 2, 3 and 4 bits. Behind a
    ReLU the same codes cover half the width, which is one bit more.
    """
    target = math.log(3.0) + (bits + one_sided) * math.log(4.0)
    x = target
    for _ in range(50):  # x + log x = target, by Newton
        x -= (x + math.log(x) - target) / (1 + 1 / x)
    return x


def gauss_factor(bits: int, *, one_sided: bool) -> float:
    """alpha / sigma that minimises the clipping and rounding error of a Gaussian, Banner et al. 2019, equation 11.

    Clipping costs 2 * integral from alpha of (x - alpha)^2 phi(x), whose derivative is 4 (alpha Q(alpha) - phi(alpha));
    rounding costs alpha^2 / (3 * 4^bits): 1.71, 2.15 and 2.55 for 2, 3 and 4 bits.
    """
    rounding = 2 / (3 * 4.0 ** (bits + one_sided))

    def slope(alpha: float) -> float:
        density = math.exp(-alpha * alpha / 2) / math.sqrt(2 * math.pi)
        tail = math.erfc(alpha / math.sqrt(2)) / 2
        return 4 * (alpha * tail - density) + rounding * alpha

    inside, outside = 0.0, 40.0
    for _ in range(100):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if slope(middle) < 0 else (inside, middle)
    return inside


def fitted(histogram: Histogram, *, one_sided: bool) -> Density:
    """Laplace's or Gauss's density, whichever gives the elements the greater likelihood.

    one_sided: zeros are left out and the rest counts as the right half of a density around zero, as behind a ReLU.
    """
    x, shares = histogram.centres, histogram.shares
    if one_sided:
        kept = x > np.finfo(np.float32).tiny  # the bin of zero reaches a little beyond it
        x, shares = x[kept], shares[kept] / max(float(shares[kept].sum()), math.ulp(0.0))
    if not x.size:
        return Density(True, 0.0, 0.0)
    centre = 0.0 if one_sided else float(x @ shares)
    spread = float(np.abs(x - centre) @ shares)
    deviation = math.sqrt(float((x - centre) ** 2 @ shares))
    laplace = bool(fits_laplace(np.asarray(spread), np.asarray(deviation)))
    return Density(laplace, centre, spread if laplace else deviation)


def fits_laplace(spread: Float64, deviation: Float64) -> NDArray[np.bool_]:
    """Whether Laplace's density makes numbers of this mean distance and this standard deviation likelier than Gauss's.

    Mean log-likelihoods: -log(2 b) - 1 and -log(sigma sqrt(2 pi)) - 1/2.
    """
    return np.asarray(2 * spread * math.e <= deviation * math.sqrt(2 * math.pi * math.e))


def aciq(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> Range:
    """The closed-form range around the mean, no wider than [low, high]."""
    low, high = min(low, 0.0), max(high, 0.0)
    one_sided = low == 0 and not spec.signed
    density = fitted(histogram, one_sided=one_sided)
    factor = laplace_factor if density.laplace else gauss_factor
    alpha = factor(spec.bits, one_sided=one_sided) * density.scale
    return max(low, density.centre - alpha), min(high, density.centre + alpha)
