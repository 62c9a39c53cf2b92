"""Boxes of the float model as labels: average precision, beside COCO's definition worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.config.recipe import Recipe
from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head
from qconv.errors import QconvError
from qconv.metrics import detection
from qconv.metrics.demands import require_extras
from qconv.metrics.detection import DetectionComparison
from qconv.results.scores import FLOAT_MAP, value_of

Rows = list[tuple[float, float, float, float, float, int]]

FLOAT: Rows = [(0, 0, 10, 10, 0.9, 1), (50, 50, 60, 60, 0.8, 1), (0, 0, 10, 10, 0.1, 2)]
"""Two boxes that are shown, and one that is not."""


def decode(arrays: object, least: float) -> list[Detections]:
    (rows,) = arrays  # type: ignore[misc]
    return [Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)).above(least)]


def measured(own: Rows, other: Rows) -> float | None:
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    found = DetectionComparison(Head("test", "", ("y",), decode, (64, 64), 0.5))
    found.update(decode([np.array(own)], 0.001), decode([np.array(other)], 0.001))
    return value_of(found.scores(spans=False), FLOAT_MAP)


def test_equal_boxes_have_a_precision_of_exactly_one() -> None:
    assert measured(FLOAT, FLOAT) == 1.0


def test_more_boxes_of_a_class_than_count_are_no_loss() -> None:
    many: Rows = [(4 * i, 0, 4 * i + 4, 4, 0.9, 0) for i in range(120)]
    assert measured(many, many) == 1.0


def test_half_of_the_boxes_reach_half_of_the_recalls() -> None:
    """51 of the recalls 0, 0.01 .. 1 are 0.5 or lower."""
    assert measured(FLOAT, FLOAT[:1]) == pytest.approx(51 / 101)


def test_a_box_that_is_off_counts_at_the_limits_below_its_overlap() -> None:
    """100 pixels beside 100, of which 81 are both's: an IoU of 81 / 119 = 0.68, above four of the ten limits."""
    assert measured(FLOAT[:1], [(1, 1, 11, 11, 0.9, 1)]) == pytest.approx(0.4)


def test_boxes_with_low_scores_are_found_too() -> None:
    """mAP weighs the order of scores alone: a model that is less sure of all of them finds them."""
    assert measured(FLOAT, [(*row[:4], row[4] / 100, row[5]) for row in FLOAT]) == 1.0


def test_without_the_extra_it_is_left_out_and_a_gate_on_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise QconvError("mAP needs faster-coco-eval, which is not installed.", "install the extra.")

    monkeypatch.setattr(detection, "require_detect_extra", missing)
    monkeypatch.setattr("qconv.metrics.demands.require_detect_extra", missing)
    found = DetectionComparison(Head("test", "", ("y",), decode, (64, 64), 0.5))
    found.update(decode([np.array(FLOAT)], 0.001), decode([np.array(FLOAT)], 0.001))
    assert [score.name for score in found.scores(spans=True)] == ["boxes"]
    with pytest.raises(QconvError, match="faster-coco-eval"):
        require_extras(Recipe(min_map=0.9))
