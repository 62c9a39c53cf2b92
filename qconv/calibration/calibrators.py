"""Calibrators: from what is remembered of a tensor to the range that gets codes.

Each is a function and a line in CALIBRATORS; nothing else knows their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qconv.calibration import clipping, entropy
from qconv.calibration.clipping import Range
from qconv.calibration.readers import least_at_outputs
from qconv.calibration.sketch import Histogram, Sketch, Want
from qconv.config.choices import PERCENTILE
from qconv.config.recipe import Recipe
from qconv.ir.layers import Layer
from qconv.quantizer import QuantSpec

AVERAGING = 0.01
"""Share of each new picture in a moving average of extremes, as in PyTorch's MovingAverageMinMaxObserver."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a calibrator may know beyond the tensor.

    percentile: share of elements inside the range, in percent. readers: the layers that read the tensor. is_input:
    whether it is the network's input: pixels end at black and white, and have no tails.
    """

    percentile: float = PERCENTILE
    readers: Sequence[Layer] = ()
    is_input: bool = False


@dataclass(frozen=True, slots=True)
class Calibrator:
    """choose: from sketch, spec and hints to a range, which is widened to hold zero afterwards. want: what the sketch
    must remember for it."""

    choose: Callable[[Sketch, QuantSpec, Hints], Range]
    want: Want


def minmax(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The exact extremes: nothing is clipped. Krishnamoorthi 2018, arXiv 1806.08342, section 3.1."""
    return sketch.low, sketch.high


def ema(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """A moving average of each picture's extremes, begun at the first picture's: Jacob et al. 2017, arXiv 1712.05877,
    section 3.1. Pictures come in the order of their keys, so that files and shards may come in any."""
    low, high = map(float, sketch.pictures[0])
    for least, largest in sketch.pictures[1:]:
        low += AVERAGING * (float(least) - low)
        high += AVERAGING * (float(largest) - high)
    return low, high


def mean_extremes(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The mean of each picture's extremes, as NNCF's default for activations. Summed exactly, in any order."""
    low, high = (math.fsum(map(float, ends)) / len(ends) for ends in sketch.pictures.T)
    return low, high


def percentile(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The range that holds so many percent of the elements, as many cut off on either side; where nothing is negative,
    all of them above. McKinstry et al. 2018, arXiv 1809.04191, section 3.2."""
    cut = 1 - hints.percentile / 100
    if sketch.low >= 0:
        return sketch.low, quantile(sketch.histogram(), 1 - cut)
    low, high = (quantile(sketch.histogram(), share) for share in (cut / 2, 1 - cut / 2))
    return low, high


def kl(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The range whose codes keep the most information: see entropy.py."""
    return entropy.least_divergence(sketch.histogram(), spec, sketch.low, sketch.high)


def mse(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The range with the least expected squared error of the tensor itself: see clipping.py."""
    return clipping.least_squares(sketch.histogram(), spec, sketch.low, sketch.high)


def aciq(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The closed-form optimum of a fitted density: see clipping.py."""
    return clipping.aciq(sketch.histogram(), spec, sketch.low, sketch.high)


def output_mse(sketch: Sketch, spec: QuantSpec, hints: Hints) -> Range:
    """The range with the least error at the outputs of the layers that read the tensor: see readers.py.

    Of a tensor that no layer reads, and of one whose channels changed with the picture: its own least squared error. Of
    the network's input: its extremes.
    """
    if hints.is_input:
        return sketch.low, sketch.high
    if not (hints.readers and sketch.columns.size):
        return mse(sketch, spec, hints)
    columns = sketch.columns.reshape(-1, sketch.columns.shape[2])
    return least_at_outputs(columns, sketch.histogram(), hints.readers, spec, (sketch.low, sketch.high))


def quantile(histogram: Histogram, share: float) -> float:
    """The number below which so large a share of the elements lies; evenly spread inside a bin."""
    left, right = histogram.edges
    total = np.cumsum(histogram.shares)
    at = min(int(np.searchsorted(total, share)), len(total) - 1)
    before = float(total[at - 1]) if at else 0.0
    part = min(1.0, max(0.0, (share - before) / float(histogram.shares[at])))
    return float(left[at] + part * (right[at] - left[at]))


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": Calibrator(minmax, Want.EXTREMES),
    "ema": Calibrator(ema, Want.EXTREMES),
    "mean-extremes": Calibrator(mean_extremes, Want.EXTREMES),
    "percentile": Calibrator(percentile, Want.BINS),
    "entropy": Calibrator(kl, Want.BINS),
    "mse": Calibrator(mse, Want.BINS),
    "output-mse": Calibrator(output_mse, Want.BINS | Want.COLUMNS),
    "aciq": Calibrator(aciq, Want.BINS),
}


def want_of(recipe: Recipe) -> Want:
    """What sketches must remember for a recipe."""
    want = CALIBRATORS[recipe.calibrator].want
    # a density for each channel is fitted to columns: histograms are of all channels together
    return want | Want.COLUMNS if recipe.allocates_activations and recipe.calibrator == "aciq" else want
