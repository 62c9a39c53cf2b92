"""This module draws the chart of a sample study as PNG, with Pillow alone, and builds the page of the study.

Two panels show accuracy over the number of images on a logarithmic axis: every draw is a dot, the median a line, worst
to best a band. Shapes have places in units of WIDTH x HEIGHT and roles instead of colours. They are drawn at SHARPNESS
times the size and averaged down, which is all the antialiasing that Pillow's shapes lack. The font is the one that
Pillow brings along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePath

from PIL import Image, ImageDraw, ImageFont

from qconv.data.images import png_bytes
from qconv.errors import format_count
from qconv.report.html import Page, Tile
from qconv.report.pages import make_warnings_tile
from qconv.results.sample_curve import SampleCurve, Spread, format_score

WIDTH, HEIGHT = 1200, 560

TOP, BOTTOM = 120, 470

PANELS = ((100, 570), (710, 1180))
"""Left and right end of each panel."""

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
    """What a panel shows. of: the spread at a number of images; each: a dot for each draw, (count, value)."""

    role: str
    label: str
    unit: str
    of: Callable[[int], Spread | None]
    each: Sequence[tuple[int, float]]
    most: float = math.inf


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
    shapes: list[Shape] = [ChartText((WIDTH / 2, 40), title, size=LARGE_FONT_SIZE)]
    draws = "one draw" if curve.draws == 1 else f"{curve.draws} draws of each number"
    subtitle = f"{curve.recipe['calibrator']}, {draws}, scored on {format_count(curve.scored, 'other picture')}"
    shapes.append(ChartText((WIDTH / 2, 68), subtitle, role="quiet"))
    for ends, measure in zip(PANELS, _choose_measures(curve), strict=True):
        shapes += _draw_panel(curve, measure, ends)
    return shapes


def _choose_measures(curve: SampleCurve) -> tuple[PanelMeasure, PanelMeasure]:
    sqnr = [(p.pictures, p.sqnr_db) for p in curve.points if p.sqnr_db is not None]
    agreement = [(p.pictures, 100 * p.agreement) for p in curve.points if p.agreement is not None]

    def in_percent(count: int) -> Spread | None:
        found = curve.agreement(count)
        return None if found is None else Spread(100 * found.least, 100 * found.median, 100 * found.most)

    return (
        PanelMeasure("sqnr", "SQNR (dB)", "dB", curve.sqnr_db, sqnr),
        PanelMeasure("agreement", "agreement with the float model (%)", "%", in_percent, agreement, most=100.0),
    )


def _draw_panel(curve: SampleCurve, measure: PanelMeasure, ends: tuple[float, float]) -> Iterator[Shape]:
    left, right = ends
    middle = (left + right) / 2
    yield ChartText((middle, BOTTOM + 62), "calibration pictures (logarithmic)", role="text")
    yield ChartText((left - 66, (TOP + BOTTOM) / 2), measure.label, upright=True)
    if not measure.each:
        yield from _draw_frame(left, right)
        yield ChartText((middle, (TOP + BOTTOM) / 2), "nothing to measure here", role="quiet")
        return
    spreads = {c: s for c in curve.counts if (s := measure.of(c)) is not None and math.isfinite(s.most)}
    axes = _make_axes(ends, curve, [value for _, value in measure.each], measure.most)
    outline = [(axes.x(c), axes.y(s.least)) for c, s in spreads.items()]
    outline += [(axes.x(c), axes.y(s.most)) for c, s in reversed(spreads.items())]
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
    full = measure.of(curve.pictures)
    if full is not None and math.isfinite(full.median):
        place = axes.y(full.median)
        yield ChartLine(((left, place), (right, place)), "full", width=1.5, dashed=True)
        # small sets lie lower, as a rule, so that there is room above the line on the left
        above = place - 9 if place - 30 > TOP else place + 22
        yield ChartText(
            (left + 10, above), f"all {curve.pictures}: {full.median:.4g} {measure.unit}", "start", role="quiet"
        )
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
    # blue and vermilion of Okabe and Ito's palette, which everyone can tell apart, and lighter ones for the bands
    "sqnr": "#0072b2",
    "sqnr-band": "#cfe3f0",
    "agreement": "#d55e00",
    "agreement-band": "#f8dfcc",
}

ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


def render_png(shapes: Sequence[Shape]) -> bytes:
    """Draw the shapes as a PNG file of WIDTH x HEIGHT pixels."""
    canvas = Image.new("RGB", (WIDTH * SHARPNESS, HEIGHT * SHARPNESS), COLORS["paper"])
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
    sqnr, agreement = curve.sqnr_db(curve.pictures), curve.agreement(curve.pictures)
    if sqnr is not None:
        unit = " dB" if math.isfinite(sqnr.median) else ""
        tiles.append(Tile("SQNR with all", f"{format_score(sqnr.median)}{unit}", "of the outputs"))
    if agreement is not None:
        tiles.append(Tile("agreement with all", f"{agreement.median:.1%}", "with the float model"))
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
