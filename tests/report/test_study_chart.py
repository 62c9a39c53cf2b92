"""Charts of a study: what is drawn, as a picture and as a page."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from qconv.report.html import render_page
from qconv.report.study_chart import (
    BOTTOM,
    COLORS,
    HEIGHT,
    TOP,
    ChartDot,
    ChartLine,
    ChartText,
    chart_width,
    draw_chart,
    make_study_page,
    panel_ends,
    render_png,
)
from qconv.results.sample_curve import CurvePoint, SampleCurve
from qconv.results.scores import SHARE, SQNR, Metric, Score
from tests.support.scores import scores

POINTS = [
    (1, 20.0, 0.5),
    (1, 24.0, 0.75),
    (2, 29.8, 0.75),
    (2, 30.2, 1.0),
    (5, 30.0, 1.0),
    (5, 30.4, 1.0),
    (7, 30.0, 1.0),
]


def curve(points: list[tuple[int, float | None, float | None]], name: str = "model.onnx") -> SampleCurve:
    made = [
        CurvePoint(count, number % 2, scores(sqnr, agreement)) for number, (count, sqnr, agreement) in enumerate(points)
    ]
    seconds = {point.pictures: 0.5 for point in made}
    return SampleCurve("0.1", name, {"calibrator": "mse"}, None, made, 2, 4, (), seconds)


CURVE = curve(list(POINTS))
EDGES = {
    "equal outputs": curve([(1, None, 1.0), (2, None, 1.0)]),
    "no classes": curve([(1, 20.0, None), (2, 21.0, None)]),
    "one point": curve([(1, 20.0, 1.0)]),
    "all alike": curve([(1, 20.0, 0.0), (2, 20.0, 0.0)]),
    "a catastrophe": curve([(1, -3000.0, 0.0), (2, 20.0, 1.0)]),
    "some equal": curve([(1, 20.0, 1.0), (2, None, 1.0)]),
    "markup in the name": curve(list(POINTS), "<b>&\"'.onnx"),
}


def dots(found: SampleCurve, role: str) -> list[ChartDot]:
    return [shape for shape in draw_chart(found) if isinstance(shape, ChartDot) and shape.role == role]


def test_a_dot_for_every_draw_in_either_panel() -> None:
    """Higher values lie higher; ten times the pictures are as far as from one to ten."""
    for role, ends, values in (("measure-0", panel_ends(0), 1), ("measure-1", panel_ends(1), 2)):
        found = dots(CURVE, role)
        assert len(found) == len(POINTS)
        assert all(ends[0] < dot.at[0] < ends[1] and TOP <= dot.at[1] <= BOTTOM for dot in found)
        heights = [-dot.at[1] for dot in found]
        assert np.corrcoef(heights, [point[values] for point in POINTS])[0, 1] == pytest.approx(1)
        across = [dot.at[0] for dot in found]
        assert np.corrcoef(across, np.log([point[0] for point in POINTS]))[0, 1] == pytest.approx(1)


def test_axes_have_labels_with_units() -> None:
    texts = [shape.text for shape in draw_chart(CURVE) if isinstance(shape, ChartText)]
    assert {"SQNR (dB)", "agreement (%)", "2 are enough", "all 7: 30 dB"} <= set(texts)
    assert any("model.onnx" in text for text in texts)
    assert "105" not in texts  # no share is above 100 %


def test_the_median_is_the_line() -> None:
    """22 dB of 20 and 24: in the middle between their dots."""
    (line,) = (shape for shape in draw_chart(CURVE) if isinstance(shape, ChartLine) and shape.role == "measure-0")
    first, second = dots(CURVE, "measure-0")[:2]
    assert line.points[0][1] == pytest.approx((first.at[1] + second.at[1]) / 2)


def test_the_picture() -> None:
    """It has the stated size, and the dots their colours where they are said to be."""
    with Image.open(io.BytesIO(render_png(CURVE))) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (chart_width(CURVE), HEIGHT), "RGB")
        for role in ("measure-0", "measure-1"):
            for dot in dots(CURVE, role):
                x, y = map(round, dot.at)
                assert picture.getpixel((x, y)) == ImageColor.getrgb(COLORS[role])
        assert picture.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("found", EDGES.values(), ids=EDGES)
def test_odd_curves_are_drawn(found: SampleCurve) -> None:
    """Inside the picture, and as many dots as there are numbers."""
    assert render_png(found)
    circles = [shape for shape in draw_chart(found) if isinstance(shape, ChartDot)]
    assert len(circles) == sum(score.value is not None for point in found.points for score in point.scores)
    for circle in circles:
        assert 0 < circle.at[0] < chart_width(found)
        assert TOP <= circle.at[1] <= BOTTOM


def test_the_page_has_every_draw() -> None:
    """In numbers for the charts, median by median in the table; what a model is called stays text."""
    found = EDGES["markup in the name"]
    text = render_page(make_study_page(found, "qconv study-samples")).decode()
    assert "<b>&" not in text
    assert found.in_words() in text
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    study = json.loads(data)["study"]
    assert [(draw["pictures"], draw["sqnr_db"], draw["agreement"]) for draw in study["draws"]] == POINTS
    assert (study["pictures"], study["enough"]) == (7, 2)
    assert study["spread"][0] == {"pictures": 1, "sqnr_db": [20.0, 22.0, 24.0], "agreement": [0.5, 0.625, 0.75]}
    (section,) = re.findall(r'<section id="study">.*?</section>', text, re.DOTALL)
    rows = re.findall(r"<tr><th scope=.*?</tr>", section)
    assert re.findall(r">([^<>]+)<", rows[0]) == [
        "1",
        "20.0",
        "22.0",
        "24.0",
        "50.0",
        "62.5",
        "75.0",
        "0.5",
    ]
    assert len(rows) == len(found.counts)


@pytest.mark.parametrize("found", EDGES.values(), ids=EDGES)
def test_odd_curves_have_a_page(found: SampleCurve) -> None:
    """Equal outputs are infinite decibels, which JSON lacks: their spread is left out of the chart."""
    text = render_page(make_study_page(found, "")).decode()
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    study = json.loads(data, parse_constant=pytest.fail)["study"]
    assert [row["pictures"] for row in study["spread"]] == found.counts
    for row in study["spread"]:
        spread = found.spread(SQNR, row["pictures"])
        assert (row["sqnr_db"] is None) == (spread is None or spread.best == math.inf)


def test_equal_outputs_are_told() -> None:
    tiles = make_study_page(EDGES["some equal"], "").tiles
    assert [tile.value for tile in tiles if tile.label == "SQNR with all"] == ["equal"]


def test_a_metric_that_nobody_thought_of() -> None:
    """It gets a panel, a chart and columns of its own; of one where less is better the worst draw is the largest."""
    miss = Metric("miss", "missed", SHARE, higher_is_better=False, equal=0.0)
    made = [CurvePoint(n, seed, (*scores(20.0, 0.5), Score(miss, 0.1 * seed))) for n in (1, 2) for seed in (0, 1)]
    found = SampleCurve("0.1", "m.onnx", {"calibrator": "mse"}, None, made, 2, 4, (), {1: 0.5, 2: 0.5})
    assert len(dots(found, "measure-2")) == 4
    with Image.open(io.BytesIO(render_png(found))) as picture:
        assert picture.width == chart_width(found) > chart_width(CURVE)
    assert found.as_dict()["spread"][0]["miss"] == [0.1, 0.05, 0.0]
    text = render_page(make_study_page(found, "")).decode()
    assert 'id="study-miss-chart"' in text
    assert "missed %, worst" in text
