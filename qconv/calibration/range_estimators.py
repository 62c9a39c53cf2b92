"""Estimates quantization ranges from sketches: each calibrator is one function and one line in CALIBRATORS.

    mse         least expected squared error of the tensor, sum over bins of share * E[(fake(x) - x)^2], x evenly spread
                inside each bin, searched from the full range inwards: Sung et al. 2015, arXiv 1511.06488; Nagel et al.
                2021, arXiv 2106.08295, section 3.1
    aciq        closed-form optimum of a fitted Laplace or Gaussian density: Banner et al. 2019, arXiv 1810.05723,
                section 4; the Gaussian optimum also in Max 1960
    entropy     least KL(P || Q) = sum p log(p / q), as TensorRT's calibrator: Migacz 2017, GTC
    output-mse  least error at the outputs of the layers that read the tensor: Nahshan et al. 2019, arXiv 1911.07190;
                leaving the mean to the bias: Nagel et al. 2019, arXiv 1906.04721, section 4.2

    error(range) = sqrt(tails) * sum over c of |w_c|^2 * (Var[e_c] + MEAN_ERROR_WEIGHT E[e_c]^2),   e = fake(x) - x
    tails = expected square of e by the histogram / mean square of e on the columns

fake is `fake_quantize`, the very quantizer that will be used, with its rounded zero point and its narrow or full range
of codes.

|w_c|^2: sum of squares of the weights that channel c meets. Var and E are taken over the columns of the sketch. Errors
of different channels and places count as independent, and a channel with small weights may be clipped. The columns are
few and miss most of the tails, which the histogram has. Over all models at 8, 6 and 4 bits, no factor for the tails
agrees better on some networks and loses much on others, and `tails` itself is the tensor's own error again; sqrt(tails)
serves all. The covariance between channels was tried and changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import Histogram, Sketch, SketchContents
from qconv.config.choices import PERCENTILE
from qconv.config.recipe import Recipe
from qconv.ir.layers import Layer
from qconv.quantizer import SMALLEST_SCALE, QuantParams, QuantSpec

Float64 = NDArray[np.float64]

Range = tuple[float, float]

ErrorFunction = Callable[[Float64, Float64], Float64]
"""Expected error of every pair of lower and upper ends, (K,), (K,) -> (K,)."""

STEPS_AT_ONCE, FINER_STEPS, MOST_ROUNDS = 8, 8, 3

SEARCH_BINS = 256

SHRINK_FACTOR = 2.0**-0.25

LEAST_RANGE_SHARE = 2.0**-16

NARROW_BIN = 1e-2
"""Bins narrower than this share of a step count at their centre: differences of their ends would be all rounding."""


def expected_squared_error(histogram: Histogram, params: QuantParams) -> Float64:
    """E[(fake(x) - x)^2] of each of K quantizers, (K,). params: of K scales and zero points, (K,) each."""
    scale = params.scale.astype(np.float64)[:, None]  # (K, 1)
    zero = params.zero_point.astype(np.float64)[:, None]
    low, high = params.spec.qmin - zero, params.spec.qmax - zero
    left, right = histogram.edges[0] / scale, histogram.edges[1] / scale  # (K, B), in steps
    width = right - left
    middle = (left + right) / 2
    at_centre = (np.clip(np.rint(middle), low, high) - middle) ** 2
    wide = width > NARROW_BIN
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (_integrate_squared_error(right, low, high) - _integrate_squared_error(left, low, high)) / width
    error: Float64 = np.where(wide, spread, at_centre) @ histogram.shares * scale[:, 0] ** 2
    return error


def _integrate_squared_error(t: Float64, low: Float64, high: Float64) -> Float64:
    """The integral of the squared error from 0 to t, in steps: cells around codes, cubes outside the outermost."""
    inside = np.clip(t, low - 0.5, high + 0.5)
    cell = np.rint(inside)
    above, below = np.maximum(t - high, 0.5), np.maximum(low - t, 0.5)
    found: Float64 = cell / 12 + (_cube(inside - cell) + _cube(above) - _cube(below)) / 3
    return found


def _cube(x: Float64) -> Float64:
    return x * x * x  # a power takes twenty times as long


def search_least_squares(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> Range:
    """The range inside [low, high] with the least expected squared error.

    Bins much narrower than a step are joined for the search, and where it ends far inside, it begins again from there.
    """
    while True:
        coarse = histogram.coarse(max(-low, high, SMALLEST_SCALE) / SEARCH_BINS)
        found = search_range(partial(_expected_errors, coarse, spec), spec, low, high)
        if found[1] - found[0] > (high - low) / 2 or found == (low, high):
            return found
        low, high = found


def _expected_errors(histogram: Histogram, spec: QuantSpec, lows: Float64, highs: Float64) -> Float64:
    return expected_squared_error(histogram, spec.from_range(lows, highs))


def search_range(error: ErrorFunction, spec: QuantSpec, low: float, high: float) -> Range:
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
            shares[end] = _best_share(_error_along_end(error, (low, high), shares, end))
        found = float(error(low * shares[:1], high * shares[1:])[0])
        if not found < least * 0.995:
            break
        least = found
    return low * float(shares[0]), high * float(shares[1])


def _error_along_end(error: ErrorFunction, ends: Range, shares: Float64, moved: int) -> Callable[[Float64], Float64]:
    """The error as a function of one end's share, with the other end fixed."""

    def at(candidates: Float64) -> Float64:
        both = [np.full(len(candidates), share) for share in shares]
        both[moved] = candidates
        return error(ends[0] * both[0], ends[1] * both[1])

    return at


def _best_share(error: Callable[[Float64], Float64]) -> float:
    """The share of the full range with the least error: coarse steps inwards until it rises, then two finer rounds."""
    best, least, share = 1.0, math.inf, 1.0
    while share > LEAST_RANGE_SHARE:
        shares = share * SHRINK_FACTOR ** np.arange(STEPS_AT_ONCE, dtype=np.float64)
        found = error(shares)
        at = int(found.argmin())
        if found[at] < least:
            best, least = float(shares[at]), float(found[at])
        if at < STEPS_AT_ONCE - 1:
            break
        share = float(shares[-1])
    reach = 1.0
    for _ in range(2):
        ends = best * SHRINK_FACTOR**reach, min(1.0, best / SHRINK_FACTOR**reach)
        shares = np.linspace(*ends, FINER_STEPS, dtype=np.float64)
        found = error(shares)
        at = int(found.argmin())
        if found[at] < least:
            best, least = float(shares[at]), float(found[at])
        reach *= 2 / FINER_STEPS
    return best


# -- ACIQ --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FittedDensity:
    """A Laplace or Gaussian density. scale: E|x - centre| of Laplace's, the standard deviation of Gauss's."""

    laplace: bool
    centre: float
    scale: float


def laplace_clipping_factor(bits: int, *, one_sided: bool) -> float:
    """alpha / b that minimises 2 b^2 exp(-alpha/b) + alpha^2 / (3 * 4^bits), Banner et al. 2019, equation 8.

    Its derivative is zero where (alpha/b) exp(alpha/b) = 3 * 4^bits: 2.83, 3.89 and 5.03 for 2, 3 and 4 bits. Behind a
    ReLU the same codes cover half the width, which is one bit more.
    """
    target = math.log(3.0) + (bits + one_sided) * math.log(4.0)
    x = target
    for _ in range(50):  # x + log x = target, by Newton
        x -= (x + math.log(x) - target) / (1 + 1 / x)
    return x


def gauss_clipping_factor(bits: int, *, one_sided: bool) -> float:
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


def fit_density(histogram: Histogram, *, one_sided: bool) -> FittedDensity:
    """Laplace's or Gauss's density, whichever gives the elements the greater likelihood.

    one_sided: zeros are left out and the rest counts as the right half of a density around zero, as behind a ReLU.
    """
    x, shares = histogram.centres, histogram.shares
    if one_sided:
        kept = x > np.finfo(np.float32).tiny  # the bin of zero reaches a little beyond it
        x, shares = x[kept], shares[kept] / max(float(shares[kept].sum()), math.ulp(0.0))
    if not x.size:
        return FittedDensity(True, 0.0, 0.0)
    centre = 0.0 if one_sided else float(x @ shares)
    spread = float(np.abs(x - centre) @ shares)
    deviation = math.sqrt(float((x - centre) ** 2 @ shares))
    laplace = bool(is_laplace_likelier(np.asarray(spread), np.asarray(deviation)))
    return FittedDensity(laplace, centre, spread if laplace else deviation)


def is_laplace_likelier(spread: Float64, deviation: Float64) -> NDArray[np.bool_]:
    """Whether Laplace's density makes numbers of this mean distance and this standard deviation likelier than Gauss's.

    Mean log-likelihoods: -log(2 b) - 1 and -log(sigma sqrt(2 pi)) - 1/2.
    """
    return np.asarray(2 * spread * math.e <= deviation * math.sqrt(2 * math.pi * math.e))


def aciq_closed_form(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> Range:
    """The closed-form range around the mean, no wider than [low, high]."""
    low, high = min(low, 0.0), max(high, 0.0)
    one_sided = low == 0 and not spec.signed
    density = fit_density(histogram, one_sided=one_sided)
    factor = laplace_clipping_factor if density.laplace else gauss_clipping_factor
    alpha = factor(spec.bits, one_sided=one_sided) * density.scale
    return max(low, density.centre - alpha), min(high, density.centre + alpha)


EVEN_BINS = 2048

CANDIDATE_THRESHOLDS = 64

MOST_ENTROPY_BITS = 8


def search_least_divergence(histogram: Histogram, spec: QuantSpec, low: float, high: float) -> tuple[float, float]:
    """The range inside [low, high] with the least KL(P || Q) between the histogram and its quantized form.

    P is the histogram in EVEN_BINS bins of one width, with what lies outside the range in its outermost bins. Q is P
    squeezed into as many bins as there are codes and spread out again over the bins that P fills. CANDIDATE_THRESHOLDS
    thresholds on |x| are tried. Zeros, which a ReLU makes in masses and which always have a code of their own, are left
    out, as TensorRT does. Above MOST_ENTROPY_BITS bits codes are finer than bins, and nothing is clipped.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    largest = max(-low, high)
    if spec.bits > MOST_ENTROPY_BITS or largest < np.finfo(np.float32).tiny:
        return low, high
    levels = spec.qmax - spec.qmin + 1
    counts = rebin_evenly(_drop_zeros(histogram), low, high)
    width = (high - low) / EVEN_BINS
    zero = -low / width  # where zero lies, in bins
    best, least = (low, high), math.inf
    for threshold in np.linspace(largest, largest * levels / EVEN_BINS, CANDIDATE_THRESHOLDS):
        first, last = max(0, math.floor(zero - threshold / width)), min(EVEN_BINS, math.ceil(zero + threshold / width))
        if last - first < levels:
            break
        found = kl_divergence(*clip_bins(counts, first, last), levels)
        if found < least:
            best, least = (max(low, -threshold), min(high, threshold)), found
    return best


def _drop_zeros(histogram: Histogram) -> Histogram:
    kept = np.abs(histogram.edges).max(axis=0) > np.finfo(np.float32).tiny
    return Histogram(histogram.edges[:, kept], histogram.counts[kept])


def rebin_evenly(histogram: Histogram, low: float, high: float) -> Float64:
    """Shares in EVEN_BINS bins of one width over [low, high]; elements are spread evenly inside each old bin."""
    left, right = histogram.edges
    cumulated = np.concatenate([[0.0], np.cumsum(histogram.shares)])
    grid = np.linspace(low, high, EVEN_BINS + 1)
    # the share of elements below x: what lies in whole bins, and a part of the bin that x is in
    at = np.searchsorted(left, grid, side="right") - 1
    inside = np.maximum(at, 0)
    width = np.maximum(right - left, np.finfo(np.float64).tiny)
    part = np.clip((grid - left[inside]) / width[inside], 0.0, 1.0)
    below = np.where(at < 0, 0.0, cumulated[inside] + part * histogram.shares[inside])
    below[-1] = cumulated[-1]
    return np.asarray(np.diff(below))


def clip_bins(counts: Float64, first: int, last: int) -> tuple[Float64, Float64]:
    """The bins first to last: P, with all that lies outside in the outermost ones, and the same without."""
    inside = counts[first:last]
    reference = inside.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    return reference, inside


def kl_divergence(reference: Float64, inside: Float64, levels: int) -> float:
    """KL(P || Q) of P = reference, Q = `inside` squeezed into so many levels and spread out again; infinite where Q is
    zero and P is not."""
    starts = np.arange(levels) * len(reference) // levels
    filled = reference > 0
    sums, used = np.add.reduceat(inside, starts), np.add.reduceat(filled.astype(np.float64), starts)
    spread = np.repeat(sums / np.maximum(used, 1), np.diff([*starts, len(reference)])) * filled
    p, q = reference[filled] / reference.sum(), spread[filled] / max(float(spread.sum()), math.ulp(0.0))
    if (q == 0).any():
        return math.inf
    return float(np.sum(p * np.log(p / q)))


MEAN_ERROR_WEIGHT = 0.1
"""Share of a mean shift that counts although bias correction removes it: other images have other means."""


def input_channel_powers(layer: Layer) -> Float64:
    """Sum of squares of the weights that each input channel meets, (I,)."""
    weight = layer.weight.astype(np.float32, copy=False)
    found: Float64 = np.einsum("goik,goik->gi", weight, weight).reshape(-1).astype(np.float64)
    return found


def search_least_output_error(
    columns: NDArray[np.float32], histogram: Histogram, readers: Sequence[Layer], spec: QuantSpec, ends: Range
) -> Range:
    """The range inside `ends` with the least error at the readers' outputs.

    columns: (n, C) values of the tensor. histogram: of many more of them.
    """
    coarse = histogram.coarse(max(-ends[0], ends[1], SMALLEST_SCALE) / SEARCH_BINS)
    powers = np.sum([input_channel_powers(reader) for reader in readers], axis=0)  # (C,)

    def error(lows: Float64, highs: Float64) -> Float64:
        tried = spec.from_range(lows, highs)
        with np.errstate(over="ignore", invalid="ignore"):  # squares of numbers near the end of float32
            squares, means = _column_errors(columns, tried)
            found = (squares - (1 - MEAN_ERROR_WEIGHT) * means * means) @ powers
            own = squares.mean(axis=1)
            tails = np.divide(expected_squared_error(coarse, tried), own, out=np.ones_like(own), where=own > 0)
            return np.asarray(found * np.sqrt(tails))

    return search_range(error, spec, *ends)


def _column_errors(columns: NDArray[np.float32], params: QuantParams) -> tuple[Float64, Float64]:
    """E[e^2] and E[e] of each channel of columns (n, C) under each of K quantizers, (K, C) both."""
    spec, count = params.spec, len(columns)
    squares, means = np.empty((2, len(params.scale), columns.shape[1]))
    ones = np.ones(count, np.float32)
    lost = np.empty_like(columns)
    for k, (scale, zero) in enumerate(zip(params.scale, params.zero_point.astype(np.float32), strict=True)):
        # what `fake_quantize` does, in place: this is the innermost loop
        np.divide(columns, scale, out=lost)
        np.rint(lost, out=lost)
        np.clip(lost, spec.qmin - zero, spec.qmax - zero, out=lost)
        lost *= scale
        lost -= columns
        squares[k] = np.einsum("nc,nc->c", lost, lost) / count
        means[k] = ones @ lost / count
    return squares, means


EMA_MOMENTUM = 0.01
"""Share of each new picture in a moving average of extremes, as in PyTorch's MovingAverageMinMaxObserver."""


@dataclass(frozen=True, slots=True)
class CalibrationHints:
    """What a calibrator may know beyond the sketch.

    percentile: share of elements inside the range, in percent.
    readers: the layers that read the tensor.
    is_input: the tensor is the network's input: pixels end at black and white, and have no tails.
    """

    percentile: float = PERCENTILE
    readers: Sequence[Layer] = ()
    is_input: bool = False


@dataclass(frozen=True, slots=True)
class Calibrator:
    """A range estimator for activations.

    choose: maps sketch, spec and hints to a range, which is widened to hold zero afterwards.
    want: what the sketch must keep for it.
    """

    choose: Callable[[Sketch, QuantSpec, CalibrationHints], Range]
    want: SketchContents

    def find(self, sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
        """Same as `choose`, found once for each sketch: one network is quantized several times in a search."""
        read = b"".join(input_channel_powers(reader).tobytes() for reader in hints.readers)
        key = self.choose, spec, hints.percentile, hints.is_input, hashlib.sha256(read).digest()
        if key not in sketch.ranges:
            sketch.ranges[key] = self.choose(sketch, spec, hints)
        return sketch.ranges[key]


def minmax_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The exact extremes, without clipping. Krishnamoorthi 2018, arXiv 1806.08342, section 3.1."""
    return sketch.low, sketch.high


def ema_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """A moving average of each picture's extremes, begun at the first picture's: Jacob et al. 2017, arXiv 1712.05877,
    section 3.1. Pictures come in the order of their keys, so that files and shards may come in any."""
    low, high = map(float, sketch.pictures[0])
    for least, largest in sketch.pictures[1:]:
        low += EMA_MOMENTUM * (float(least) - low)
        high += EMA_MOMENTUM * (float(largest) - high)
    return low, high


def mean_extremes_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The mean of each picture's extremes, as NNCF's default for activations. Summed exactly, in any order."""
    low, high = (math.fsum(map(float, ends)) / len(ends) for ends in sketch.pictures.T)
    return low, high


def percentile_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The range that holds so many percent of the elements, as many cut off on either side; where nothing is negative,
    all of them above. McKinstry et al. 2018, arXiv 1809.04191, section 3.2."""
    cut = 1 - hints.percentile / 100
    if sketch.low >= 0:
        return sketch.low, histogram_quantile(sketch.histogram(), 1 - cut)
    low, high = (histogram_quantile(sketch.histogram(), share) for share in (cut / 2, 1 - cut / 2))
    return low, high


def entropy_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The range with the least KL divergence: see `search_least_divergence`."""
    return search_least_divergence(sketch.histogram(), spec, sketch.low, sketch.high)


def mse_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The range with the least expected squared error of the tensor itself: see `search_least_squares`."""
    return search_least_squares(sketch.histogram(), spec, sketch.low, sketch.high)


def aciq_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The closed-form optimum of a fitted density: see `aciq_closed_form`."""
    return aciq_closed_form(sketch.histogram(), spec, sketch.low, sketch.high)


def output_mse_range(sketch: Sketch, spec: QuantSpec, hints: CalibrationHints) -> Range:
    """The range with the least error at the outputs of the layers that read the tensor.

    A tensor that no layer reads, or whose channels vary in number, gets the least squared error of its own. The
    network's input keeps its extremes.
    """
    if hints.is_input:
        return sketch.low, sketch.high
    if not (hints.readers and sketch.columns.size) or {r.inputs for r in hints.readers} != {sketch.columns.shape[2]}:
        return mse_range(sketch, spec, hints)
    columns = sketch.columns.reshape(-1, sketch.columns.shape[2])
    return search_least_output_error(columns, sketch.histogram(), hints.readers, spec, (sketch.low, sketch.high))


def histogram_quantile(histogram: Histogram, share: float) -> float:
    """The number below which so large a share of the elements lies; evenly spread inside a bin."""
    left, right = histogram.edges
    total = np.cumsum(histogram.shares)
    at = min(int(np.searchsorted(total, share)), len(total) - 1)
    before = float(total[at - 1]) if at else 0.0
    part = min(1.0, max(0.0, (share - before) / float(histogram.shares[at])))
    return float(left[at] + part * (right[at] - left[at]))


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": Calibrator(minmax_range, SketchContents.EXTREMES),
    "ema": Calibrator(ema_range, SketchContents.EXTREMES),
    "mean-extremes": Calibrator(mean_extremes_range, SketchContents.EXTREMES),
    "percentile": Calibrator(percentile_range, SketchContents.BINS),
    "entropy": Calibrator(entropy_range, SketchContents.BINS),
    "mse": Calibrator(mse_range, SketchContents.BINS),
    "output-mse": Calibrator(output_mse_range, SketchContents.BINS | SketchContents.COLUMNS),
    "aciq": Calibrator(aciq_range, SketchContents.BINS),
}


def sketch_contents_for(recipe: Recipe) -> SketchContents:
    """What sketches must keep for a recipe."""
    want = CALIBRATORS[recipe.calibrator].want
    # a density for each channel is fitted to columns: histograms are of all channels together
    return want | SketchContents.COLUMNS if recipe.allocates_activations and recipe.calibrator == "aciq" else want
