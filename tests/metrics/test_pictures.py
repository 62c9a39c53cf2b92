"""PSNR and SSIM against scikit-image 0.25.2, and the relative error worked by hand.

The numbers of scikit-image are those of `peak_signal_noise_ratio(a, b, data_range=R)` and of `structural_similarity(a,
b, data_range=R, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0)` for the pictures that
`pictures` makes; of single planes without `channel_axis`.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.metrics.pictures import Psnr, RelativeError, Ssim, compute_ssim, find_data_range, is_picture
from qconv.runtime.outputs import ModelOutput

PUBLISHED = {1.0: (25.217766470516302, 0.896977143695366), 255.0: (25.345259934171143, 0.8988334267291687)}
"""PSNR and SSIM by R."""

PLANES = (0.91407343051409, 0.8996715768337279, 0.8771864237382802)
"""SSIM of the three planes for R = 1."""


def pictures(span: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A picture of waves, and the same with others over it, (3, 24, 31)."""
    y, x = np.mgrid[:24, :31]
    a = np.stack([np.sin(x / 3 + c) * np.cos(y / (4 + c)) * 0.5 + 0.5 for c in range(3)])
    b = a + 0.08 * np.sin(x * y / 7) + 0.02 * np.cos(x + y)
    return (a, b) if span == 1 else (255 * a, np.clip(255 * b, 0, 255))


@pytest.mark.parametrize("span", [1.0, 255.0])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_as_scikit_image_measures_it(span: float, layout: str) -> None:
    ref, got = (picture[None] for picture in pictures(span))
    image: tuple[int, ...] = (1, 3, 24, 31)
    if layout == "channels last":
        ref, got, image = np.moveaxis(ref, 1, 3), np.moveaxis(got, 1, 3), (1, 24, 31, 3)
    found = []
    for make in (Psnr, Ssim):
        metric = make(ModelOutput("y", True, ref.shape, image))
        metric.update(ref, got)
        score = metric.score(spans=False)
        assert score is not None
        assert score.metric.label.endswith(f"(R = {span:g})")
        found.append(score.value)
    assert found == pytest.approx(PUBLISHED[span], rel=1e-9)


@pytest.mark.parametrize("plane", range(3))
def test_planes_as_scikit_image_measures_them(plane: int) -> None:
    a, b = pictures(1.0)
    assert compute_ssim(a[plane], b[plane], 1.0) == pytest.approx(PLANES[plane], rel=1e-9)


def test_equal_pictures_show_no_difference() -> None:
    a = pictures(1.0)[0][None].astype(np.float32)
    for make in (Psnr, Ssim, RelativeError):
        metric = make(ModelOutput("y", True, a.shape, a.shape))
        metric.update(a, a)
        score = metric.score(spans=True)
        assert score is not None
        assert score.shows_no_difference


def test_a_window_needs_eleven_places() -> None:
    small = np.ones((1, 3, 10, 31), np.float32)
    metric = Ssim(ModelOutput("y", True, small.shape, small.shape))
    metric.update(small, small)
    assert metric.score(spans=False) is None


@pytest.mark.parametrize(
    ("shape", "image", "known"),
    [
        ((1, 3, 24, 31), (1, 3, 24, 31), True),
        ((1, 3, 48, 62), (1, 3, None, None), True),  # twice as large
        ((1, 1, 24, 31), (1, 1, 24, 31), True),
        ((1, 1, 24, 31), (1, 3, 24, 31), False),  # a depth
        ((1, 3, 12, 16), (1, 3, 24, 31), False),
        ((1, 4, 24, 31), (1, 3, 24, 31), False),
        ((1, 3), (1, 3, 24, 31), False),
        ((1, 3, 24, 31), (1, 100), False),
    ],
)
def test_what_is_a_picture(shape: tuple[int, ...], image: tuple[int | None, ...], known: bool) -> None:
    assert is_picture(ModelOutput("y", True, shape, image)) is known


@pytest.mark.parametrize(
    ("low", "high", "span"), [(0, 1, 1), (-0.1, 1.2, 1), (-1, 1, 2), (0, 255, 255), (-20, 280, 255), (0, 1000, 1000)]
)
def test_the_range_of_pixels(low: float, high: float, span: float) -> None:
    assert find_data_range(np.array([low, high, np.nan])) == span


def test_the_relative_error() -> None:
    """Off by 1, 0 and 2 of 10 in all, over two batches; what is no number counts as 0."""
    metric = RelativeError(ModelOutput("y", True, (1, 2)))
    metric.update(np.array([[4.0, -4.0]]), np.array([[5.0, -4.0]]))
    metric.update(np.array([[2.0, np.inf]]), np.array([[np.nan, 1.0]]))
    score = metric.score(spans=False)
    assert score is not None
    assert score.value == pytest.approx(0.3)
    assert not score.higher_is_better
