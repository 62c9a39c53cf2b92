"""Agreement class by class, worked by hand, and where it appears without anybody's naming it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.metrics.classification import ClassAgreement
from qconv.runtime.outputs import ModelOutput


def one_hot(*classes: int, count: int = 4) -> NDArray[np.float32]:
    return np.eye(count, dtype=np.float32)[list(classes)]


def test_rare_classes_count_like_frequent_ones() -> None:
    """Of eight pictures of class 0 all are kept, of two of class 1 one, of class 2 none; nothing is said of class 3."""
    metric = ClassAgreement(ModelOutput("y", True, (None, 4)))
    metric.update(one_hot(0, 0, 0, 0, 0, 0, 0, 0), one_hot(0, 0, 0, 0, 0, 0, 0, 0))
    metric.update(one_hot(1, 1, 2), one_hot(1, 3, 0))
    score = metric.score(spans=True)
    assert score is not None
    assert score.value == pytest.approx((1 + 0.5 + 0) / 3)


def test_places_of_a_map_are_counted_by_their_class() -> None:
    """Channels last: two places say class 1, of which one is kept, and two class 0, which both are."""
    metric = ClassAgreement(ModelOutput("y", True, (1, 2, 2, 4), (1, 2, 2, 3)))
    metric.update(one_hot(0, 0, 1, 1).reshape(1, 2, 2, 4), one_hot(0, 0, 1, 2).reshape(1, 2, 2, 4))
    score = metric.score(spans=False)
    assert score is not None
    assert score.value == 0.75


def test_a_single_score_has_no_classes() -> None:
    metric = ClassAgreement(ModelOutput("y", True, (None, 1)))
    metric.update(np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32))
    assert metric.score(spans=False) is None
