"""Compares numbers, and pictures that a network paints, with those of the float model.

    relative error  = sum |ref - got| / sum |ref|
    PSNR            = 10 log10(R^2 / mean (ref - got)^2), over all pictures together
    SSIM            = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))

SSIM is Wang et al. 2004 (IEEE Transactions on Image Processing 13.4), with C1 = (0.01 R)^2 and C2 = (0.03 R)^2: means,
variances and covariance under a Gaussian window of 11x11 places and sigma 1.5 that lies wholly in the picture; the mean
over places, channels and pictures. R is the range of pixels, as the float model's first batch tells it: 1 for numbers
from about 0 to 1, 2 for -1 to 1, 255 for 0 to 255, else what they span. The labels of both say it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.metrics.similarity import LARGEST_NOISE, bootstrap_interval, compute_sqnr_db, measure_error
from qconv.results.scores import PSNR, RELATIVE_ERROR, SSIM, Metric, Score
from qconv.runtime.outputs import ModelOutput

Float64 = NDArray[np.float64]

WINDOW, SIGMA = 11, 1.5

C1, C2 = 0.01**2, 0.03**2

RANGES = ((-0.25, 1.5, 1.0), (-1.5, 1.5, 2.0), (-64.0, 320.0, 255.0))
"""From where to where pixels go, those of a network that overshoots included, and what R is then."""


def find_data_range(pixels: NDArray[Any]) -> float:
    """R of pixels as they are usually coded."""
    finite = pixels[np.isfinite(pixels)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return next((span for least, most, span in RANGES if least <= low and high <= most), high - low)


def is_picture(output: ModelOutput) -> bool:
    """Whether an output of numbers is a picture: three channels, or the input's, in its size or a multiple of it."""
    if len(output.shape) != 4 or not output.input_size:
        return False
    channels = output.shape[output.axis]
    sides = zip(output.size, output.input_size, strict=True)
    whole = not any(have is not None and had is not None and have % had for have, had in sides)
    return whole and (channels == 3 or channels == output.input_channels == 1)


@dataclass(slots=True)
class RelativeError:
    """Relative error of an output. rows: sums of differences and of the reference, of each batch."""

    output: ModelOutput
    rows: list[tuple[float, float]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch. Where the reference is no number nothing counts; where the other is not, it counts as 0."""
        finite = np.isfinite(reference)
        ref, other = reference[finite].astype(np.float64), got[finite].astype(np.float64)
        other = np.where(np.isfinite(other), other, 0.0)
        self.rows.append((float(np.abs(ref - other).sum()), float(np.abs(ref).sum())))

    def score(self, *, spans: bool) -> Score | None:
        """None where the reference is zero. The interval is the bootstrap's over batches."""
        off, whole = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0.0, 0.0)
        if not whole:
            return None
        rows = np.array(self.rows)
        span = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return Score(RELATIVE_ERROR, off / whole, span)


@dataclass(slots=True)
class Psnr:
    """PSNR of a picture. span: R, 0 before the first batch. rows: squared differences and pixels of each batch."""

    output: ModelOutput
    span: float = 0.0
    rows: list[tuple[float, float]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch."""
        if is_picture(self.output):
            self.span = self.span or find_data_range(reference)
            _, noise = measure_error(reference, got)
            self.rows.append((min(noise, LARGEST_NOISE), float(np.isfinite(reference).sum())))

    def score(self, *, spans: bool) -> Score | None:
        """None of what is no picture; without a value where nothing differs. The interval is the bootstrap's."""
        noise, pixels = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0.0, 0.0)
        if not (pixels and self.span):
            return None
        power = self.span**2
        value = compute_sqnr_db(power * pixels, noise)
        known = spans and value is not None
        rows = np.array(self.rows)
        interval = (
            bootstrap_interval(rows, lambda sums: 10 * np.log10(power * sums[:, 1] / sums[:, 0])) if known else None
        )
        return Score(_of_range(PSNR, self.span), value, interval)


@dataclass(slots=True)
class Ssim:
    """SSIM of a picture. span: R, 0 before the first batch. rows: the sum over planes, and planes, of each batch."""

    output: ModelOutput
    span: float = 0.0
    rows: list[tuple[float, float]] = field(default_factory=list)

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch. What is no number counts as 0."""
        if not is_picture(self.output) or min(np.moveaxis(reference, self.output.axis, 1).shape[2:]) < WINDOW:
            return
        self.span = self.span or find_data_range(reference)
        finite = np.isfinite(reference)
        planes = [
            np.moveaxis(np.where(finite & np.isfinite(x), x, 0), self.output.axis, 1).astype(np.float64)
            for x in (reference, got)
        ]
        found = [compute_ssim(x, y, self.span) for x, y in zip(*map(_as_planes, planes), strict=True)]
        self.rows.append((sum(found), len(found)))

    def score(self, *, spans: bool) -> Score | None:
        """None of what is no picture, or smaller than the window. The interval is the bootstrap's over batches."""
        total, planes = (sum(column) for column in zip(*self.rows, strict=True)) if self.rows else (0.0, 0.0)
        if not (planes and self.span):
            return None
        rows = np.array(self.rows)
        interval = bootstrap_interval(rows, lambda sums: sums[:, 0] / sums[:, 1]) if spans else None
        return Score(_of_range(SSIM, self.span), total / planes, interval)


def _of_range(metric: Metric, span: float) -> Metric:
    return replace(metric, label=f"{metric.label} (R = {span:g})")


def _as_planes(pictures: Float64) -> Float64:
    return pictures.reshape(-1, *pictures.shape[2:])


def compute_ssim(x: NDArray[Any], y: NDArray[Any], span: float) -> float:
    """Mean SSIM of two planes (H, W) of 11 places a side or more. span: R."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    c1, c2 = C1 * span**2, C2 * span**2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((above / below).mean())


def _blur(plane: Float64) -> Float64:
    """Gaussian means over the windows that lie wholly in the plane, (H - 10, W - 10)."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        plane = np.lib.stride_tricks.sliding_window_view(plane, WINDOW, axis=axis) @ weights
    return plane
