"""This module draws the chart of a sample study as PNG, with Pillow alone, and builds the page of the study.

A panel for each metric shows accuracy over the number of images on a logarithmic axis: every draw is a dot, the median
a line, worst to best a band. Shapes have places in pixels and roles instead of colours. They are drawn at SHARPNESS
times the size and averaged down, which is all the antialiasing that Pillow's shapes lack. The font is the one that
Pillow brings along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath

from PIL import Image, ImageDraw, ImageFont

from qconv.data.images import png_bytes
from qconv.errors import format_count
from qconv.report.html import Page, Tile
from qconv.report.tiles import make_warnings_tile
from qconv.results.sample_curve import SampleCurve, Spread
from qconv.results.scores import Metric, format_value

HEIGHT = 560

TOP, BOTTOM = 120, 470

FIRST_PANEL, PANEL_STEP = (100, 570), 610
"""Left and right end of the first panel, and how far the next one is from it."""

FONT_SIZE, LARGE_FONT_SIZE = 17, 24

TICKS = 5

LABEL_ROOM = 34

XY = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ChartLine:
    """A line. role: "grid", "axis", "full", "enough", or a panel's own."""

    points: tuple[XY, ...]
    role: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class ChartArea:
    """A filled polygon."""

    points: tuple[XY, ...]
    role: str


@dataclass(frozen=True, slots=True)
class ChartDot:
    """A filled circle."""

    at: XY
    radius: float
    role: str


@dataclass(frozen=True, slots=True)
class ChartText:
    """A text.

    Attributes:
        at: A point on its baseline.
        anchor: Which end lies there: "start", "middle" or "end".
        upright: Turned by 90 degrees, to be read from below.
    """

    at: XY
    text: str
    anchor: str = "middle"
    size: float = FONT_SIZE
    role: str = "text"
    upright: bool = False


Shape = ChartLine | ChartArea | ChartDot | ChartText


@dataclass(frozen=True, slots=True)
class PanelMeasure:
    """What a panel shows. role: of its dots and its line. each: a dot for each draw, (count, value as printed)."""

    curve: SampleCurve
    metric: Metric
    role: str
    each: Sequence[tuple[int, float]]

    @property
    def most(self) -> float:
        """Above which no value can be, as printed."""
        metric = self.metric
        return math.inf if metric.equal is None or not metric.higher_is_better else metric.factor * metric.equal

    def spread(self, count: int) -> Spread | None:
        """Return the spread at a number of images, as printed; None where one of its ends is not finite."""
        found = self.curve.spread(self.metric, count)
        if found is None or not all(map(math.isfinite, found)):
            return None
        return Spread(*(self.metric.factor * value for value in found))


@dataclass(frozen=True, slots=True)
class _Axes:
    """The axes of a panel. ends: its left and right; counts: first and last number of images; low, high: of values."""

    ends: tuple[float, float]
    counts: tuple[int, int]
    low: float
    high: float
    ticks: tuple[float, ...] = field(default=())

    def x(self, count: float) -> float:
        first, last = (math.log(n) for n in self.counts)
        share = 0.5 if first == last else (math.log(count) - first) / (last - first)
        left, right = self.ends
        return left + 12 + share * (right - left - 24)

    def y(self, value: float) -> float:
        return BOTTOM - (value - self.low) / (self.high - self.low) * (BOTTOM - TOP)


def draw_chart(curve: SampleCurve) -> list[Shape]:
    """Compose the shapes of the chart, those behind first."""
    title = f"How many calibration pictures does {_shorten_name(curve.model)} need?"
    middle = chart_width(curve) / 2
    shapes: list[Shape] = [ChartText((middle, 40), title, size=LARGE_FONT_SIZE)]
    draws = "one draw" if curve.draws == 1 else f"{curve.draws} draws of each number"
    subtitle = f"{curve.recipe['calibrator']}, {draws}, scored on {format_count(curve.scored, 'other picture')}"
    shapes.append(ChartText((middle, 68), subtitle, role="quiet"))
    for index, metric in enumerate(curve.metrics):
        each = [(point.pictures, metric.factor * value) for point, value in curve.drawn(metric)]
        shapes += _draw_panel(
            curve, PanelMeasure(curve, metric, f"measure-{index % MEASURES}", each), panel_ends(index)
        )
    return shapes


def chart_width(curve: SampleCurve) -> int:
    """Return the width of the chart in pixels; its height is HEIGHT."""
    return round(panel_ends(len(curve.metrics) - 1)[1]) + 20


def panel_ends(index: int) -> tuple[float, float]:
    """Return where a panel begins and ends."""
    left, right = (end + index * PANEL_STEP for end in FIRST_PANEL)
    return left, right


def _draw_panel(curve: SampleCurve, measure: PanelMeasure, ends: tuple[float, float]) -> Iterator[Shape]:
    left, right = ends
    middle = (left + right) / 2
    yield ChartText((middle, BOTTOM + 62), "calibration pictures (logarithmic)", role="text")
    sign = f" ({measure.metric.sign})" if measure.metric.sign else ""
    yield ChartText((left - 66, (TOP + BOTTOM) / 2), f"{measure.metric.label}{sign}", upright=True)
    if not measure.each:
        yield from _draw_frame(left, right)
        yield ChartText((middle, (TOP + BOTTOM) / 2), "nothing to measure here", role="quiet")
        return
    spreads = {c: s for c in curve.counts if (s := measure.spread(c)) is not None}
    axes = _make_axes(ends, curve, [value for _, value in measure.each], measure.most)
    outline = [(axes.x(c), axes.y(s.worst)) for c, s in spreads.items()]
    outline += [(axes.x(c), axes.y(s.best)) for c, s in reversed(spreads.items())]
    yield ChartArea(tuple(outline), f"{measure.role}-band")
    yield from _draw_grid(axes, curve.counts)
    yield from _draw_marks(curve, measure, axes)
    yield from _draw_frame(left, right)
    yield ChartLine(tuple((axes.x(c), axes.y(s.median)) for c, s in spreads.items()), measure.role, width=3)
    for count, value in measure.each:
        yield ChartDot((axes.x(count), axes.y(value)), 5, measure.role)


def _draw_marks(curve: SampleCurve, measure: PanelMeasure, axes: _Axes) -> Iterator[Shape]:
    """Mark the level that all images give, and how many are enough."""
    left, right = axes.ends
    full = measure.spread(curve.pictures)
    if full is not None:
        place = axes.y(full.median)
        yield ChartLine(((left, place), (right, place)), "full", width=1.5, dashed=True)
        # small sets lie lower, as a rule, so that there is room above the line on the left
        above = place - 9 if place - 30 > TOP else place + 22
        text = f"all {curve.pictures}: {full.median:.4g} {measure.metric.sign}".rstrip()
        yield ChartText((left + 10, above), text, "start", role="quiet")
    if curve.enough is not None:
        place = axes.x(curve.enough)
        yield ChartLine(((place, TOP), (place, BOTTOM)), "enough", width=1.5, dashed=True)
        text = f"{curve.enough} {'is' if curve.enough == 1 else 'are'} enough"
        on_the_left = place > (left + right) / 2
        yield ChartText((place, TOP - 12), text, "end" if on_the_left else "start", role="quiet")


def _draw_frame(left: float, right: float) -> Iterator[Shape]:
    yield ChartLine(((left, TOP), (left, BOTTOM), (right, BOTTOM)), "axis", width=1.5)


def _draw_grid(axes: _Axes, counts: Sequence[int]) -> Iterator[Shape]:
    left, right = axes.ends
    for tick in axes.ticks:
        place = axes.y(tick)
        yield ChartLine(((left, place), (right, place)), "grid")
        yield ChartText((left - 10, place + 6), f"{tick:.10g}", "end", role="quiet")
    free = math.inf
    for count in reversed(counts):  # from the last, which always gets its number
        place = axes.x(count)
        yield ChartLine(((place, BOTTOM), (place, BOTTOM + 6)), "axis")
        if place <= free:
            yield ChartText((place, BOTTOM + 28), str(count), role="quiet")
            free = place - LABEL_ROOM


def _make_axes(ends: tuple[float, float], curve: SampleCurve, values: Sequence[float], most: float) -> _Axes:
    """Choose round ends and ticks that hold all values; nothing above `most`."""
    low, high = min(values), max(values)
    step = _round_step((high - low) / TICKS or max(abs(high), 1.0) / 50)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        first -= 1
    if last * step < most and last * step == high:
        last += 1
    # whole multiples, so that no tick reads 0.30000000000000004
    ticks = tuple(round(number * step, 10) for number in range(first, last + 1) if number * step <= most + 1e-9)
    return _Axes(ends, (curve.counts[0], curve.pictures), ticks[0], ticks[-1], ticks)


def _round_step(wish: float) -> float:
    """Return the least of 1, 2, 5 times a power of ten that is not below `wish`."""
    ten = 10.0 ** math.floor(math.log10(wish))
    return next(float(step * ten) for step in (1, 2, 5, 10) if step * ten >= wish * (1 - 1e-9))


def _shorten_name(name: str) -> str:
    """Return the file's name without folders, cut where it is long."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 48 else f"{name[:45]}..."


# -- PNG ---------------------------------------------------------------------------------------------------------------

SHARPNESS = 3

DASH, GAP = 7.0, 5.0

COLORS = {
    "paper": "#ffffff",
    "text": "#1f2328",
    "quiet": "#59636e",
    "axis": "#59636e",
    "grid": "#e4e7eb",
    "full": "#8c959f",
    "enough": "#8c959f",
    # blue, vermilion and green of Okabe and Ito's palette, which everyone can tell apart; lighter ones for the bands
    "measure-0": "#0072b2",
    "measure-0-band": "#cfe3f0",
    "measure-1": "#d55e00",
    "measure-1-band": "#f8dfcc",
    "measure-2": "#009e73",
    "measure-2-band": "#ccece3",
}

MEASURES = 3
"""Panels that have colours of their own."""

ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def render_png(curve: SampleCurve) -> bytes:
    """Draw the chart as a PNG file of `chart_width` x HEIGHT pixels."""
    shapes = draw_chart(curve)
    canvas = Image.new("RGB", (chart_width(curve) * SHARPNESS, HEIGHT * SHARPNESS), COLORS["paper"])
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        if isinstance(shape, ChartText):
            _draw_text(canvas, pen, shape)
        elif isinstance(shape, ChartArea):
            pen.polygon(_scale_points(shape.points), fill=COLORS[shape.role])
        elif isinstance(shape, ChartDot):
            x, y = _scale_points([shape.at])[0]
            r = shape.radius * SHARPNESS  # Pillow has circles from 10.4 on
            pen.ellipse((x - r, y - r, x + r, y + r), COLORS[shape.role], outline="#ffffff", width=SHARPNESS)
        else:
            _draw_line(pen, shape)
    return png_bytes(canvas.reduce(SHARPNESS))


def _scale_points(points: Sequence[XY]) -> list[XY]:
    return [(x * SHARPNESS, y * SHARPNESS) for x, y in points]


def _draw_line(pen: ImageDraw.ImageDraw, line: ChartLine) -> None:
    width = round(line.width * SHARPNESS)
    for part in _split_into_dashes(line.points) if line.dashed else [line.points]:
        pen.line(_scale_points(part), fill=COLORS[line.role], width=width, joint="curve")


def _split_into_dashes(points: Sequence[XY]) -> list[tuple[XY, XY]]:
    parts = []
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        start = 0.0
        while start < length:
            ends = (start / length, min(start + DASH, length) / length)
            first, last = ((x0 + share * (x1 - x0), y0 + share * (y1 - y0)) for share in ends)
            parts.append((first, last))
            start += DASH + GAP
    return parts


def _draw_text(canvas: Image.Image, pen: ImageDraw.ImageDraw, text: ChartText) -> None:
    font = ImageFont.load_default(text.size * SHARPNESS)
    ((x, y),) = _scale_points([text.at])
    if not text.upright:
        pen.text((x, y), text.text, fill=COLORS[text.role], font=font, anchor=ANCHORS[text.anchor])
        return
    size = pen.textbbox((0, 0), text.text, font=font)[2:]
    ink = Image.new("L", (round(size[0]), round(size[1])))
    ImageDraw.Draw(ink).text((0, 0), text.text, fill=255, font=font)
    ink = ink.rotate(90, expand=True)
    canvas.paste(COLORS[text.role], (round(x - ink.width / 2), round(y - ink.height / 2)), ink)


# -- the page ----------------------------------------------------------------------------------------------------------


def make_study_page(curve: SampleCurve, command: str) -> Page:
    """Build the page of a run of `study-samples`. command: that makes the page again."""
    tiles = [Tile("enough pictures", str(curve.enough or "not seen"), f"of {curve.pictures}")]
    for metric in curve.metrics:
        found = curve.spread(metric, curve.pictures)
        if found is not None:
            value = metric.format(found.median) if math.isfinite(found.median) else format_value(metric, found.median)
            tiles.append(Tile(f"{metric.label} with all", value, f"on {format_count(curve.scored, 'other picture')}"))
    return Page(
        title=PurePath(curve.model).name,
        subtitle=curve.how(),
        tiles=(*tiles, make_warnings_tile(curve.warnings)),
        verdict=curve.in_words(),
        version=curve.version,
        warnings=tuple(curve.warnings),
        command=command,
        study=curve,
    )
