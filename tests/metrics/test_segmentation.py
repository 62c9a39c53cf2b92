"""Intersection over union, worked by hand on ten places."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.metrics.segmentation import ConfusionMatrix, FloatMiou
from qconv.runtime.output_origins import OutputOrigin
from qconv.runtime.outputs import ModelOutput

EXPECTED = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 0])
GOT = np.array([0, 1, 0, 1, 2, 2, 2, 0, 3, 4])

MIOU = (2 / 5 + 1 / 3 + 2 / 4 + 1) / 4
"""Class 4 is never expected; each fraction is of places where both say a class, and where either does."""

FLOAT_MIOU = (2 * 2 / 5 + 2**0.5 / 3 + 3**0.5 * 2 / 4 + 1) / (2 + 2**0.5 + 3**0.5 + 1)
"""The same fractions, weighed by the square roots of 4, 2, 3 and 1 places."""

IDS = OutputOrigin(("ArgMax", "Conv"), 1)


def scores_of(classes: NDArray[np.int64], count: int = 5) -> NDArray[np.float32]:
    """Class scores (1, C, 2, 5) of which the highest are these."""
    one_hot = np.eye(count, dtype=np.float32)[classes.reshape(1, 2, 5)]
    return np.moveaxis(one_hot, 3, 1)


def test_a_confusion_matrix_adds_up() -> None:
    """In two parts, the second with more classes than the first."""
    matrix = ConfusionMatrix()
    matrix.add(EXPECTED[:4], GOT[:4], 2)
    matrix.add(EXPECTED[4:], GOT[4:], 5)
    assert matrix.miou() == pytest.approx(MIOU)
    assert matrix.accuracy() == pytest.approx(6 / 10)
    assert matrix.counts[0].tolist() == [2, 1, 0, 0, 1]


def test_ignored_places_do_not_count() -> None:
    """Without the two places of class 3 and of what is taken for 4: 2/4, 1/3 and 2/4."""
    matrix = ConfusionMatrix()
    expected = np.where((EXPECTED == 3) | (GOT == 4), 255, EXPECTED)
    matrix.add(expected, GOT, 5, ignore=255)
    assert matrix.miou() == pytest.approx((2 / 4 + 1 / 3 + 2 / 4) / 3)
    assert matrix.accuracy() == pytest.approx(5 / 8)


def test_nothing_has_no_measure() -> None:
    matrix = ConfusionMatrix()
    assert (matrix.miou(), matrix.accuracy()) == (None, None)


@pytest.mark.parametrize("form", ["scores", "ids", "bytes", "ids with an axis"])
def test_a_map_beside_the_float_models(form: str) -> None:
    """Class numbers behind ArgMax are measured as the scores in front of it."""
    if form == "scores":
        output, arrays = ModelOutput("y", True, (1, 5, 2, 5)), [scores_of(EXPECTED), scores_of(GOT)]
    else:
        shape = (1, 1, 2, 5) if form == "ids with an axis" else (1, 2, 5)
        output = ModelOutput("y", False, shape, origin=IDS)
        kind = np.uint8 if form == "bytes" else np.int64
        arrays = [EXPECTED.reshape(shape).astype(kind), GOT.reshape(shape).astype(kind)]
    metric = FloatMiou(output)
    metric.update(*arrays)
    score = metric.score(spans=True)
    assert score is not None
    assert score.value == pytest.approx(FLOAT_MIOU)
    assert score.interval is None  # a single batch tells no spread


def test_the_interval_is_the_bootstraps_over_batches() -> None:
    """Of two pictures, one equal and one wrong everywhere: a quarter of the draws takes either one alone."""
    metric = FloatMiou(ModelOutput("y", True, (1, 2, 2, 5)))
    ones = np.ones(10, np.int64)
    metric.update(scores_of(ones, 2), scores_of(ones, 2))
    metric.update(scores_of(ones, 2), scores_of(0 * ones, 2))
    score = metric.score(spans=True)
    assert score is not None
    assert score.value == 0.5
    assert score.interval == (0.0, 1.0)


def test_few_places_of_a_class_weigh_little() -> None:
    """Of 2000 places 16 are of a class that is lost: its root is 4 beside 44.5, half as much as of 64 places."""
    for places, lost in ((16, 4 / (4 + 1984**0.5)), (64, 8 / (8 + 1936**0.5))):
        ref = np.zeros((1, 1, 40, 50), np.int64)
        ref.reshape(-1)[:places] = 1
        metric = FloatMiou(ModelOutput("y", False, ref.shape, origin=IDS))
        metric.update(ref, np.zeros_like(ref))
        score = metric.score(spans=False)
        assert score is not None
        assert score.value == pytest.approx((1 - lost) * (1 - places / 2000))


def test_integers_that_are_no_class_numbers_have_no_miou() -> None:
    metric = FloatMiou(ModelOutput("y", False, (1, 2, 5), task="segment"))
    metric.update(EXPECTED.reshape(1, 2, 5) * 10**9, GOT.reshape(1, 2, 5))
    assert metric.score(spans=False) is None
