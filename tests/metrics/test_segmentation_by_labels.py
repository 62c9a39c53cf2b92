"""mIoU and pixel accuracy by labels, against the definition class by class."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.metrics.segmentation import LabelledMiou
from qconv.metrics.similarity import iter_resamples
from qconv.results.scores import MIOU, PIXEL_ACCURACY, find_score, value_of

IGNORED = -1
CLASSES = 5


def drawn(seed: int, pictures: int = 12) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels of classes 0 to 3, a few of them ignored, and maps that are mostly right and may say class 4."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(pictures):
        expected = rng.integers(0, 4, (9, 7))
        got = np.where(rng.random(expected.shape) < 0.7, expected, rng.integers(0, CLASSES, expected.shape))
        found.append((np.where(rng.random(expected.shape) < 0.1, IGNORED, expected), got))
    return found


def by_definition(pictures: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    expected, got = (np.concatenate([pair[side].reshape(-1) for pair in pictures]) for side in (0, 1))
    known = expected != IGNORED
    expected, got = expected[known], got[known]
    iou = [np.sum((expected == c) & (got == c)) / np.sum((expected == c) | (got == c)) for c in np.unique(expected)]
    return float(np.mean(iou)), float(np.mean(expected == got))


def measured(pictures: list[tuple[np.ndarray, np.ndarray]]) -> LabelledMiou:
    totals = LabelledMiou()
    for expected, got in pictures:
        totals.add(expected, got, CLASSES, IGNORED)
    return totals


@pytest.mark.parametrize("seed", range(3))
def test_as_defined(seed: int) -> None:
    """A class that no label has does not count, though a map says it."""
    pictures = drawn(seed)
    scores = measured(pictures).scores()
    assert (value_of(scores, MIOU), value_of(scores, PIXEL_ACCURACY)) == pytest.approx(by_definition(pictures))


def test_intervals_are_of_pictures_drawn_again() -> None:
    pictures = drawn(0)
    score = find_score(measured(pictures).scores(), MIOU)
    assert score is not None
    again = [
        by_definition([picture for picture, times in zip(pictures, draws, strict=True) for _ in range(times)])[0]
        for draws in iter_resamples(len(pictures))
    ]
    assert score.interval == pytest.approx(np.percentile(again, (2.5, 97.5)))


def test_differences_are_paired() -> None:
    """Both models are wrong in the same pictures: the difference is known better than either number."""
    pictures = drawn(1)
    worse = [(expected, np.where(np.arange(7) == 0, 0, got)) for expected, got in pictures]
    own, other = measured(worse), measured(pictures)
    for metric, before, after in zip(
        (MIOU, PIXEL_ACCURACY), by_definition(pictures), by_definition(worse), strict=True
    ):
        score = find_score(own.differences(other), metric)
        assert score is not None
        assert score.interval is not None
        assert score.value == pytest.approx(after - before)
        assert score.interval[1] < 0
    assert [(s.value, s.interval) for s in own.differences(own)] == [(0, (0, 0))] * 2


def test_nothing_counts() -> None:
    totals = LabelledMiou()
    totals.add(np.full((2, 2), IGNORED), np.zeros((2, 2), int), 2, IGNORED)
    assert [score.value for score in totals.scores()] == [None, None]


def test_class_numbers_that_grow() -> None:
    """Maps of class numbers do not say how many there are."""
    totals = LabelledMiou()
    totals.add(np.array([[0, 1]]), np.array([[0, 1]]), 0, IGNORED)
    totals.add(np.array([[2, 2]]), np.array([[2, 7]]), 0, IGNORED)
    assert value_of(totals.scores(), MIOU) == pytest.approx((1 + 1 + 1 / 2) / 3)
