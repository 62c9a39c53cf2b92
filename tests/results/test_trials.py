"""How trials are ranked, on trials made by hand."""

from __future__ import annotations

import math

import pytest

from qconv.results.scores import (
    AGREEMENT,
    BOXES,
    MAP,
    PART_SQNR,
    SQNR,
    LabelledScores,
    Metric,
    Score,
)
from qconv.results.trials import Trial, find_ranking, list_trial_metrics, name_ranking, pareto_mask


def trial(boxes: float | None, sqnr: float | None, parts: float | None = None, size: int = 10) -> Trial:
    scores = [Score(BOXES, boxes), Score(SQNR, sqnr), *([] if parts is None else [Score(PART_SQNR, parts)])]
    return Trial("", (), scores=tuple(scores), ranked_by=BOXES, size=size)


def labelled(value: float | None, sqnr: float = 20.0, before: float = 0.35, span: float | None = None) -> Trial:
    differs = None if value is None else value - before
    interval = None if span is None or differs is None else (differs - span, differs + span)
    own = LabelledScores("", 9, (Score(MAP, value),), (Score(MAP, before),), (Score(MAP, differs, interval),))
    return Trial("", (), scores=(Score(MAP, value), Score(SQNR, sqnr)), ranked_by=MAP, labelled=own)


def test_boxes_come_before_sqnr_which_breaks_ties() -> None:
    worst, lost, noisy, best = trial(0.8, 40), trial(0.9, 12), trial(1.0, 9), trial(1.0, 11)
    failed = Trial("", (), failed="no", ranked_by=BOXES)
    assert sorted((best, failed, worst, noisy, lost), key=lambda t: t.rank) == [failed, worst, lost, noisy, best]


def test_ties_are_broken_by_parts_where_there_are_some() -> None:
    """A box that is a pixel off weighs more in one SQNR than all scores."""
    assert trial(0.9, 26, parts=5).rank < trial(0.9, 20, parts=15).rank


@pytest.mark.parametrize(
    ("lost", "decibel"),
    [(0.5, 3.01), (0.1, 10), (0.05, 13.01), (0.01, 20), (0.005, 23.01), (0.004, 23.01), (0.0, 23.01), (1.0, 0)],
)
def test_shares_as_decibels(lost: float, decibel: float) -> None:
    assert trial(1 - lost, 20).task_db == pytest.approx(decibel, abs=0.01)


def test_what_is_lost_by_labels() -> None:
    """Float has 35%; a file that has 36 by chance is not ranked above one that has 35."""
    assert labelled(0.30).lost == pytest.approx(0.05)
    assert labelled(0.30).task_db == pytest.approx(13.01, abs=0.01)
    assert labelled(0.36, sqnr=10).rank < labelled(0.35, sqnr=12).rank
    assert labelled(0.30, sqnr=30).rank < labelled(0.31, sqnr=10).rank
    assert labelled(0.30, span=0.04).surely_lost == pytest.approx(0.01)
    assert labelled(0.30).surely_lost == pytest.approx(0.05)
    assert labelled(None).lost is None


def test_a_share_of_few_pictures_is_surely_less() -> None:
    """15 of 16: Wilson's interval at 95% is 0.717 to 0.989."""
    own = Trial("", (), scores=(Score(AGREEMENT, 15 / 16, (0.717, 0.989)), Score(SQNR, 30)), ranked_by=AGREEMENT)
    assert own.lost == pytest.approx(1 / 16)
    assert own.surely_lost == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("own", "other", "gain"),
    [
        (trial(0.9, 20), trial(0.9, 15), 5),  # a tie
        (trial(0.9, 15), trial(0.6, 14), 6.02),  # a quarter of what was lost
        (trial(0.9, 30), trial(0.6, 14), 16),
        (trial(0.9, 10), trial(0.6, 14), 6.02),
        (trial(0.6, 20), trial(0.9, 14), -6.02),
        (trial(0.6, 4), trial(0.9, 14), -10),
        (trial(1.0, None), trial(1.0, 35), 5),  # above 40 dB there is nothing to gain
        (trial(1.0, None), trial(1.0, None), 0),
        (trial(None, 20), trial(None, 15), 5),  # the float model shows no box at all
    ],
)
def test_gains(own: Trial, other: Trial, gain: float) -> None:
    assert own.gain_over(other, 40.0) == pytest.approx(gain, abs=0.01)


def test_a_failed_trial_gains_nothing() -> None:
    assert Trial("", (), failed="no").gain_over(trial(0.1, 1), 40.0) == -math.inf


def test_pareto_by_boxes() -> None:
    """The second has fewer decibels and finds more; the third is like the first, and larger."""
    trials = (trial(0.8, 30), trial(0.9, 20), trial(0.8, 30, size=20), trial(0.9, 20, size=20))
    assert pareto_mask(trials) == (False, True, False, False)


def names(metrics: tuple[Metric, ...]) -> list[str]:
    return [metric.name for metric in metrics]


def test_tables_show_first_what_trials_are_ranked_by() -> None:
    scores = (Score(SQNR, 20.0), Score(AGREEMENT, 0.9), Score(PART_SQNR, 15.0), Score(BOXES, 0.8))
    found = [Trial("", (), scores=scores, ranked_by=BOXES)]
    assert names(list_trial_metrics(found)) == ["boxes", "sqnr_db", "part_sqnr_db", "agreement"]
    assert name_ranking(found) == "boxes"
    plain = [Trial("", (), scores=(Score(SQNR, 20.0),))]
    assert (find_ranking(plain), name_ranking(plain), names(list_trial_metrics(plain))) == (
        None,
        "sqnr_db",
        ["sqnr_db"],
    )
