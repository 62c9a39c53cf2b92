"""Tiles of report pages: each number by hand, and whether it is good."""

from __future__ import annotations

from qconv.metrics.similarity import share_interval
from qconv.report.html import Tile
from qconv.report.tiles import (
    AccuracyScores,
    make_accuracy_tile,
    make_integers_tile,
    make_labels_tiles,
    make_size_tile,
    make_speed_tiles,
    make_warnings_tile,
)
from qconv.results.quantize import Audit, LayerTime, OutputScore, Verification
from qconv.results.scores import AGREEMENT, BOXES, MAP, LabelledScores, Score
from tests.support.scores import scores


def timed(slowdown: float | None) -> Verification:
    return Verification(8, (), slowdown, None if slowdown is None else (slowdown / 2, slowdown * 2))


def test_tiles_by_hand() -> None:
    assert "8 of 10 runs 1.00 to 4.00\u00d7" in make_speed_tiles(timed(0.5))[0].note
    assert make_size_tile(4_000_000, 1_000_000) == Tile("size", "4.0\u00d7 smaller", "4.00 MB to 1.00 MB", "good")
    assert make_size_tile(1000, 2000).tone == "bad"
    assert make_speed_tiles(timed(None)) == ()
    assert [tile.value for tile in make_speed_tiles(timed(0.5))] == ["2.00\u00d7 as fast"]
    assert [tile.tone for slowdown in (0.5, 1.0, 1.5) for tile in make_speed_tiles(timed(slowdown))] == [
        "good",
        "plain",
        "bad",
    ]
    found = make_integers_tile(Audit(3, 1, (), (), (LayerTime("a", "Conv", "integer", 6.0),), 10.0))
    assert (found.value, found.note, found.tone) == ("75%", "3 of 4 nodes, 60% of the time", "plain")


def test_agreement_comes_with_wilsons_interval() -> None:
    """9 of 10: 0.596 to 0.982, as textbooks have it."""
    measured = scores(20.0, 0.9, share_interval(9, 10))
    tile = make_accuracy_tile(AccuracyScores(10, (OutputScore("y", measured),)))
    assert tile.value == "90.0%"
    assert "95%: 60 to 98%" in tile.note
    assert make_accuracy_tile(AccuracyScores(0, ())).value == "not measured"
    remark = OutputScore("y", (), "its shape depends on the data, so it was not compared")
    assert make_accuracy_tile(AccuracyScores(4, (remark,))).value == "not compared"
    assert make_accuracy_tile(AccuracyScores(4, (OutputScore("y", scores()),))).value == "equal"


def test_what_a_detector_finds_comes_before_its_decibels() -> None:
    found = (OutputScore("y", scores(8.8)), OutputScore("y", (Score(BOXES, 0.825, (0.7, 0.9)),)))
    measured = AccuracyScores(10, found)
    told = "on 10 pictures (95%: 70 to 90%); SQNR 8.8 dB"
    assert make_accuracy_tile(measured) == Tile("boxes", "82.5%", told, "bad")


def test_what_labels_tell_has_a_tile() -> None:
    """34.99 and 31.75: 3.24 points are lost, between the 2 from which on it is not good and the 5 that are bad."""
    for after, tone in ((0.3175, "plain"), (0.3399, "good"), (0.2899, "bad")):
        difference = Score(MAP, after - 0.3499, (-0.06, 0.01))
        found = LabelledScores("coco.json", 64, (Score(MAP, after),), (Score(MAP, 0.3499),), (difference,))
        (tile,) = make_labels_tiles(found)
        assert (tile.label, tile.value, tile.tone) == ("mAP by labels", f"{after:.2%}", tone)
        moved = f"{100 * (after - 0.3499):+.2f} points (-6.00 .. +1.00), no more than chance"
        assert tile.note == f"the float model has 34.99%; difference of mAP {moved}"
    nothing = LabelledScores("coco.json", 64, (Score(MAP, None),), (Score(MAP, None),), ())
    assert make_labels_tiles(nothing) == ()


def test_outputs_are_called_equal_where_nothing_differs() -> None:
    """Class numbers have no decibels, however many of them differ."""
    for agreement, told in ((1.0, "on 8 pictures; outputs are equal"), (0.9, "on 8 pictures")):
        measured = AccuracyScores(8, (OutputScore("y", (Score(AGREEMENT, agreement),)),))
        assert make_accuracy_tile(measured).note == told


def test_warnings_are_counted() -> None:
    assert make_warnings_tile(()).tone == "good"
    assert (make_warnings_tile(("a", "b")).value, make_warnings_tile(("a",)).tone) == ("2", "bad")
