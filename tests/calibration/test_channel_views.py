"""What single images show of channels. The oracle is a sketch of each image alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.observer import (
    Observer,
    estimate_channel_ranges,
    observe_each_image,
    open_observed_session,
    view_channels,
)
from qconv.calibration.sketch import SketchContents
from qconv.errors import QconvError
from tests.support.models import loaded, network

WANTED = SketchContents.CHANNELS | SketchContents.COLUMNS
MODEL = loaded(
    network("c = Conv(x, w) r = Relu(c) y = MaxPool<kernel_shape=[2,2]>(r)", x=("N", 3, 12, 12), w=(5, 3, 3, 3))
)
OBSERVERS = [
    Observer("x", WANTED),
    Observer("c", WANTED),
    Observer("r", WANTED, never_negative=True, pooled=True, stride=3),
    Observer("y"),
]


def batches(*sizes: int) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((size, 3, 12, 12)).astype(np.float32)} for size in sizes]


@pytest.mark.parametrize("sizes", [(1,) * 30, (4, 4, 4, 3)])
def test_views_give_the_ranges_that_sketches_give(sizes: tuple[int, ...]) -> None:
    """To the last bit, of inputs, of tensors that are returned, and of those that the network pools."""
    session, found = open_observed_session(MODEL, OBSERVERS, 1), batches(*sizes)
    views = estimate_channel_ranges(view_channels(session, OBSERVERS, found))
    sketches = estimate_channel_ranges(observe_each_image(session, OBSERVERS, found))
    assert views.keys() == sketches.keys() == {"x", "c", "r", "y"}
    for name, ranges in views.items():
        for part in ("low", "high", "lowest", "highest", "floor", "mean", "spread", "reach"):
            np.testing.assert_array_equal(getattr(ranges, part), getattr(sketches[name], part), f"{part} of {name}")
    assert views["y"].mean is None
    assert views["c"].mean is not None


def test_what_is_seen_outlives_the_next_image() -> None:
    """The runtime writes each image's outputs over the last one's."""
    session, found = open_observed_session(MODEL, OBSERVERS, 1), batches(*(1,) * 6)
    together = list(view_channels(session, OBSERVERS, found))
    alone = [next(iter(view_channels(session, OBSERVERS, [batch]))) for batch in found]
    for one, other in zip(together, alone, strict=True):
        for name, view in one.items():
            for part in ("lows", "highs", "means", "columns"):
                np.testing.assert_array_equal(getattr(view, part), getattr(other[name], part))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_have_no_range_are_named(bad: float) -> None:
    found = batches(1, 1)
    found[1]["x"][0, 1, 2, 3] = bad
    session = open_observed_session(MODEL, OBSERVERS, 1)
    with pytest.raises(QconvError, match="Tensor 'x' holds NaN or infinite values"):
        list(view_channels(session, OBSERVERS, found))


def test_a_pool_lets_no_nan_through() -> None:
    """The maximum of NaN and a number may be the number; the mean tells."""
    wanted = [Observer("y", never_negative=True, pooled=True)]
    model, found = loaded(network("y = Relu(x)", x=("N", 3, 12, 12))), batches(1)
    found[0]["x"][0, 1, 2, 3] = np.nan
    with pytest.raises(QconvError, match="Tensor 'y' holds NaN"):
        list(view_channels(open_observed_session(model, wanted, 1), wanted, found))


def test_a_tensor_without_elements_counts_in_no_mean() -> None:
    view = Observer("x", WANTED).view([np.zeros((1, 3, 0, 4), np.float32)])
    assert view.count == 0
    model = loaded(network("y = Relu(x)", x=("N", 3, "H", 12)))
    observers = [Observer("x", WANTED)]
    (seen,) = view_channels(
        open_observed_session(model, observers, 1), observers, [{"x": np.zeros((1, 3, 0, 12), np.float32)}]
    )
    assert seen["x"].means.tolist() == [0.0, 0.0, 0.0]
