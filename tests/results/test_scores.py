"""Scores say how they are called, compared and printed, so that whoever prints them need not know what they measure."""

from __future__ import annotations

import pytest

from qconv.analysis.evaluation import Evaluation
from qconv.config.recipe import Recipe
from qconv.metrics.demands import GATES, check_gates
from qconv.report.text import format_evaluation, format_trials
from qconv.results.quantize import OutputScore, Verification
from qconv.results.scores import (
    AGREEMENT,
    COSINE,
    DECIBEL,
    FLOAT_MIOU,
    PCK,
    SQNR,
    Metric,
    Score,
    as_values,
    by_rank,
    worst_scores,
)
from qconv.results.trials import Trial
from tests.support.scores import scores

ERROR = Metric("error_px", "error", "", higher_is_better=False, equal=0.0)
"""Something that nothing of the code knows, and the lower the better."""


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [(SQNR, 25.06, "25.1 dB"), (SQNR, None, "equal"), (AGREEMENT, 0.984, "98.4%"), (COSINE, 0.99956, "0.99956")],
)
def test_a_value_is_printed_with_its_unit(metric: Metric, value: float | None, text: str) -> None:
    assert metric.format(value) == text


def test_the_worst_of_several_outputs() -> None:
    """The lowest of what is better high, the highest of what is better low; equal outputs count where all are."""
    outputs = [(Score(SQNR, None), Score(ERROR, 2.0)), (Score(SQNR, 30.0), Score(ERROR, 5.0)), (Score(SQNR, 40.0),)]
    assert as_values(worst_scores(outputs)) == {"sqnr_db": 30.0, "agreement": None, "error_px": 5.0}
    assert as_values(worst_scores([(Score(SQNR, None),)])) == {"sqnr_db": None, "agreement": None}


def test_what_a_task_is_judged_by_comes_first_then_sqnr() -> None:
    found = by_rank([Score(COSINE, 1.0), Score(SQNR, 1.0), Score(FLOAT_MIOU, 1.0), Score(AGREEMENT, 1.0)])
    assert [score.name for score in found] == ["float_miou", "agreement", "sqnr_db", "cosine"]


def test_the_worst_score_of_each_metric_is_told_by_its_rank() -> None:
    outputs = (
        OutputScore("a", (Score(SQNR, 30.0), Score(PCK, 0.99))),
        OutputScore("b", (Score(SQNR, 20.0), Score(PCK, 0.98))),
    )
    assert Verification(4, outputs).in_words == "PCK 98.0%, SQNR 20.0 dB"


def test_a_metric_that_nobody_knows_is_told_everywhere() -> None:
    near = (*scores(20.0, 0.9), Score(ERROR, 3.0, (2.0, 4.0)))
    found = Evaluation("m", 4, "", "", (), other="f", outputs=(OutputScore("y", near),))
    assert "error" in format_evaluation(found, verbose=False)
    assert "3.00000  (2.0 .. 4.0)" in format_evaluation(found, verbose=False)
    told = found.as_dict()
    assert told["against"]["error_px"] == told["against"]["outputs"][0]["error_px"] == 3.0
    assert told["intervals"]["error_px"] == [2.0, 4.0]
    (row,) = [row for row in found.rows() if row["measure"] == "error_px"]
    assert (row["value"], row["low"], row["high"]) == (3.0, 2.0, 4.0)
    trial = Trial("t", (), scores=near)
    assert "3.00000" in format_trials([trial], None, None)
    assert trial.as_dict()["error_px"] == 3.0


def test_a_gate_on_what_is_better_low(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = Verification(1, (OutputScore("y", (Score(ERROR, 3.0),)),))
    monkeypatch.setitem(GATES, "min_sqnr", ERROR)  # type: ignore[arg-type]
    held = {want: check_gates(checked, Recipe(min_sqnr=want))[0].held for want in (2.0, 3.0, 4.0)}
    assert held == {2.0: False, 3.0: True, 4.0: True}


def test_only_what_has_no_bound_is_reached_without_a_number() -> None:
    equal = Verification(1, (OutputScore("y", scores()),))
    assert equal.reaches(SQNR, 200.0)
    assert not equal.reaches(AGREEMENT, 0.0)
    assert not Verification(1, ()).reaches(SQNR, 1.0)
    assert SQNR.unit == DECIBEL
