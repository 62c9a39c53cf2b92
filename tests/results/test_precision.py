"""What is told of the curve of time and noise, worked by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from qconv.results.precision import PrecisionPoint, PrecisionReport

POINTS = (
    PrecisionPoint(1.0, 9.0, 10.0, 10.0, 0),
    PrecisionPoint(1.04, 15.5, 16.2, 16.2, 2, chosen=True),
    PrecisionPoint(1.5, 40.0, 40.5, None, 9),
)
REPORT = PrecisionReport(POINTS, 1.7, 16, apart=True)


def test_gain_and_expense_are_over_the_fastest() -> None:
    assert REPORT.chosen is POINTS[1]
    assert REPORT.gained_db == pytest.approx(6.2)
    assert REPORT.spent == pytest.approx(0.04)
    assert REPORT.in_words == "6.2 dB for 4% of the time"


def test_the_conclusion_is_a_sentence() -> None:
    before = "The division by times alone has 10.0 dB"
    assert REPORT.conclusion == f"{before}. With 2 nodes in float it is 16.2 dB: 6.2 dB for 4% of the time."
    points = (replace(POINTS[0], chosen=True), replace(POINTS[1], chosen=False))
    told = f"{before}, and was taken: no other one that may be taken gains enough."
    assert PrecisionReport(points, 1.7, 16, apart=True).conclusion == told


@pytest.mark.parametrize("time", [0.93, 1.0, 1.004])
def test_less_than_half_a_percent_is_no_time(time: float) -> None:
    points = (POINTS[0], PrecisionPoint(time, 15.5, 16.2, 16.2, 2, chosen=True))
    assert PrecisionReport(points, 1.7, 16, apart=True).in_words == "6.2 dB for no time"


def test_json_has_every_point() -> None:
    found = json.loads(json.dumps(REPORT.as_dict(), allow_nan=False))
    assert {name: found[name] for name in ("float_time", "pictures", "apart")} == {
        "float_time": 1.7,
        "pictures": 16,
        "apart": True,
    }
    assert found["points"][1] == {
        "time": 1.04,
        "predicted_db": 15.5,
        "corrected_db": 16.2,
        "measured_db": 16.2,
        "nodes": 2,
        "chosen": True,
    }
    assert found["points"][2]["measured_db"] is None


def test_json_has_no_number_that_there_is_not() -> None:
    """Outputs that do not differ at all."""
    point = PrecisionPoint(1.0, math.inf, math.inf, math.inf, 0, chosen=True)
    found = json.loads(json.dumps(point.as_dict(), allow_nan=False))
    assert found["predicted_db"] is found["corrected_db"] is found["measured_db"] is None
    assert found["time"] == 1.0
