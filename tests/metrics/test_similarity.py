"""Intervals and the paired test: against published values, hand-worked ones, and what they promise, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qconv.metrics.similarity import bootstrap_interval, difference_interval, mcnemar_p_value, share_interval


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(hits: int, count: int, low: float, high: float) -> None:
    """R's binom.wilson prints these."""
    assert share_interval(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_has_no_interval() -> None:
    assert share_interval(0, 0) is None
    assert difference_interval(0, 0, 0) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_interval_holds_the_truth_95_times_of_100(share: float) -> None:
    hits = np.random.default_rng(1).binomial(200, share, 4000)
    held = [low <= share <= high for low, high in (share_interval(int(n), 200) or (0, 0) for n in hits)]
    assert 0.93 <= np.mean(held) <= 0.975


def test_the_difference_holds_the_truth_95_times_of_100() -> None:
    """Of 300 pictures 6 % are won and 3 % are lost on average: the truth is 3 points."""
    counts = np.random.default_rng(2).multinomial(300, [0.06, 0.03, 0.91], 4000)
    spans = (difference_interval(int(won), int(lost), 300) or (0, 0) for won, lost, _ in counts)
    assert 0.93 <= np.mean([low <= 0.03 <= high for low, high in spans]) <= 0.975


def test_the_difference_by_hand() -> None:
    """10 won, 5 lost of 100, half a picture more in each cell: 5 / 102 +- z sqrt(16 - 25 / 102) / 102."""
    half = 1.959964 * math.sqrt(16 - 25 / 102) / 102
    assert difference_interval(10, 5, 100) == pytest.approx((5 / 102 - half, 5 / 102 + half), abs=1e-6)


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (0, 6, 2 / 64)]
)
def test_mcnemar(won: int, lost: int, p: float) -> None:
    """1 of 10: twice (1 + 10) / 2^10."""
    assert mcnemar_p_value(won, lost) == pytest.approx(p)


def test_mcnemar_of_thousands() -> None:
    assert mcnemar_p_value(3000, 3000) == 1.0
    assert 0 <= mcnemar_p_value(5000, 4000) < 1e-20


def test_the_bootstrap_of_a_mean_is_that_of_the_normal_distribution() -> None:
    """+- 1.96 sigma / sqrt(n)."""
    x = np.random.default_rng(3).normal(5, 2, 400)
    span = bootstrap_interval(np.stack([x, np.ones(400)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])
    assert span is not None
    assert span == pytest.approx((x.mean() - 0.196, x.mean() + 0.196), abs=0.03)


def test_the_bootstrap_of_what_never_varies_has_no_width() -> None:
    span = bootstrap_interval(np.full((20, 2), 3.0), lambda sums: sums[:, 0] / sums[:, 1])
    assert span == (1.0, 1.0)
    assert bootstrap_interval(np.ones((1, 2)), lambda sums: sums[:, 0]) is None
    assert bootstrap_interval(np.zeros((5, 2)), lambda sums: sums[:, 0] / sums[:, 1]) is None
