"""Embeddings in the plane, whose cosines are those of angles that are written down here."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.metrics.embeddings import Nearest, PictureCosine
from qconv.runtime.outputs import ModelOutput

OUTPUT = ModelOutput("y", True, (None, 2), task="embed")


def at(*degrees: float) -> NDArray[np.float32]:
    """Vectors (N, 2) at these angles, of length 3."""
    angles = np.deg2rad(degrees)
    return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_mean_cosine_of_pictures() -> None:
    """Turned by 60, 0 and 90 degrees, whatever the lengths: 1/2, 1 and 0."""
    metric = PictureCosine(OUTPUT)
    metric.update(at(0, 10), np.float32([[0.2], [5]]) * at(60, 10))
    metric.update(at(20), at(110))
    score = metric.score(spans=True)
    assert score is not None
    assert score.value == pytest.approx(0.5, abs=1e-6)
    assert score.interval is not None
    assert score.interval[0] < 0.5 < score.interval[1]


def test_equal_embeddings_show_no_difference() -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(50, 37)).astype(np.float32)
    for metric in (PictureCosine(OUTPUT), Nearest(OUTPUT)):
        metric.update(array, array)
        score = metric.score(spans=False)
        assert score is not None
        assert score.shows_no_difference


def test_zeros_and_numbers_that_are_none() -> None:
    """A picture for which float gives zeros does not count; one that is lost has a cosine of 0."""
    metric = PictureCosine(OUTPUT)
    metric.update(np.concatenate([at(0, 0), 0 * at(0)]), np.concatenate([at(0), np.nan * at(0), at(0)]))
    score = metric.score(spans=False)
    assert score is not None
    assert score.value == pytest.approx(0.5)


def test_pictures_are_found_by_their_nearest_neighbour() -> None:
    """At 0, 90 and 180 degrees: turned by 40 a picture is still its own, by 50 the next one's."""
    metric = Nearest(OUTPUT)
    metric.update(at(0, 90), at(40, 140))
    metric.update(at(180), at(175))
    score = metric.score(spans=True)
    assert score is not None
    assert score.value == pytest.approx(2 / 3)
    # Wilson's interval of 2 of 3, by his formula with z = 1.96
    assert score.interval == pytest.approx((0.2077, 0.9385), abs=1e-4)


def test_pictures_that_are_alike_are_no_mistake_and_lost_ones_are() -> None:
    metric = Nearest(OUTPUT)
    metric.update(at(30, 30, 80), np.concatenate([at(30, 30), 0 * at(0)]))
    score = metric.score(spans=False)
    assert score is not None
    assert score.value == pytest.approx(2 / 3)


def test_one_picture_has_no_neighbours() -> None:
    metric = Nearest(OUTPUT)
    metric.update(at(0), at(180))
    assert metric.score(spans=False) is None
