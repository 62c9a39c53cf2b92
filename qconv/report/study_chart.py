"""This module draws the chart of a sample study as PNG, and as SVG in an HTML page.

Two panels show accuracy over the number of images on a logarithmic axis: every draw is a dot, the median a line, worst
to best a band. Shapes have places in units of WIDTH x HEIGHT and roles instead of colours. PNG is drawn by Pillow at
SHARPNESS times the size and averaged down. The page opens offline, light or dark, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from math import hypot

from PIL import Image, ImageDraw, ImageFont

from qconv.data.images import png_bytes
from qconv.errors import format_count
from qconv.results.sample_curve import SampleCurve, Spread, format_score

# The chart of a study as plain shapes: two panels, accuracy over the number of pictures on a logarithmic axis.
#
# Every draw is a dot, the median a line, the span from the worst to the best draw a band. Shapes have places in units
# of a picture of WIDTH x HEIGHT, and roles instead of colours: who draws them (plot.py, page.py) gives them theirs.


WIDTH, HEIGHT = 1200, 560

TOP, BOTTOM = 120, 470

PANELS = ((100, 570), (710, 1180))
"""Left and right end of each."""

FONT_SIZE, LARGE_FONT_SIZE = 17, 24

TICKS = 5

LABEL_ROOM = 34

XY = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ChartLine:
    """role: "grid", "axis", "full", "enough", or a panel's own."""

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
    """A filled circle. title: what it says when pointed at."""

    at: XY
    radius: float
    role: str
    title: str


@dataclass(frozen=True, slots=True)
class ChartText:
    """anchor: which end of it lies at `at`: "start", "middle" or "end". `at` is on the baseline. upright: turned by 90
    degrees, to be read from below."""

    at: XY
    text: str
    anchor: str = "middle"
    size: float = FONT_SIZE
    role: str = "text"
    upright: bool = False


Shape = ChartLine | ChartArea | ChartDot | ChartText


@dataclass(frozen=True, slots=True)
class PanelMeasure:
    """What a panel shows. of: its spread at a count; each: its dots, (count, draw, value)."""

    role: str
    label: str
    unit: str
    of: Callable[[int], Spread | None]
    each: Sequence[tuple[int, int, float]]
    most: float = math.inf


@dataclass(frozen=True, slots=True)
class _Axes:
    """From numbers to places. ends: of the panel; counts: of pictures; low, high: of the values."""

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
    """All shapes, those behind first."""
    title = f"How many calibration pictures does {_shorten_name(curve.model)} need?"
    shapes: list[Shape] = [ChartText((WIDTH / 2, 40), title, size=LARGE_FONT_SIZE)]
    draws = "one draw" if curve.draws == 1 else f"{curve.draws} draws of each number"
    subtitle = f"{curve.recipe['calibrator']}, {draws}, scored on {format_count(curve.scored, 'other picture')}"
    shapes.append(ChartText((WIDTH / 2, 68), subtitle, role="quiet"))
    for ends, measure in zip(PANELS, _choose_measures(curve), strict=True):
        shapes += _draw_panel(curve, measure, ends)
    return shapes


def _choose_measures(curve: SampleCurve) -> tuple[PanelMeasure, PanelMeasure]:
    sqnr = [(p.pictures, p.seed, p.sqnr_db) for p in curve.points if p.sqnr_db is not None]
    agreement = [(p.pictures, p.seed, 100 * p.agreement) for p in curve.points if p.agreement is not None]

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
    axes = _make_axes(ends, curve, [value for _, _, value in measure.each], measure.most)
    outline = [(axes.x(c), axes.y(s.least)) for c, s in spreads.items()]
    outline += [(axes.x(c), axes.y(s.most)) for c, s in reversed(spreads.items())]
    yield ChartArea(tuple(outline), f"{measure.role}-band")
    yield from _draw_grid(axes, curve.counts)
    yield from _draw_marks(curve, measure, axes)
    yield from _draw_frame(left, right)
    yield ChartLine(tuple((axes.x(c), axes.y(s.median)) for c, s in spreads.items()), measure.role, width=3)
    for count, seed, value in measure.each:
        title = f"{format_count(count, 'picture')}, draw {seed}: {value:.4g} {measure.unit}"
        yield ChartDot((axes.x(count), axes.y(value)), 5, measure.role, title)


def _draw_marks(curve: SampleCurve, measure: PanelMeasure, axes: _Axes) -> Iterator[Shape]:
    """What all pictures give, and how many are enough."""
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
    """Round ends and ticks that hold all values; nothing above `most`."""
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
    """The least of 1, 2, 5 times a power of ten that is not below `wish`."""
    ten = 10.0 ** math.floor(math.log10(wish))
    return next(float(step * ten) for step in (1, 2, 5, 10) if step * ten >= wish * (1 - 1e-9))


def _shorten_name(name: str) -> str:
    """The name of the file alone; a long one is cut."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 48 else f"{name[:45]}..."


# A study as one HTML page: chart as inline SVG, sentence, table. Opens offline, light or dark, without a script.


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #1f2328; --quiet: #59636e; --grid: #e4e7eb; --mark: #8c959f;
  --sqnr: #0072b2; --agreement: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --text: #e6edf3; --quiet: #9da7b1; --grid: #262c34;
  --mark: #6e7681; --sqnr: #56b4e9; --agreement: #e69f00; } }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; background: var(--paper); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif; fill: var(--text); }
svg text.quiet { fill: var(--quiet); }
svg polyline { fill: none; stroke: var(--mark); }
svg polyline.grid { stroke: var(--grid); }
svg polyline.axis { stroke: var(--quiet); }
svg polyline.sqnr { stroke: var(--sqnr); }
svg polyline.agreement { stroke: var(--agreement); }
svg circle { stroke: var(--paper); }
svg circle.sqnr, svg polygon.sqnr-band { fill: var(--sqnr); }
svg circle.agreement, svg polygon.agreement-band { fill: var(--agreement); }
svg polygon { opacity: 0.2; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 1rem; text-align: right; border-bottom: 1px solid var(--grid); }
footer { color: var(--quiet); margin-top: 1.5rem; font-size: 0.9rem; }
"""

DASH_ATTRIBUTE = 'stroke-dasharray="7 5"'


def render_study_page(curve: SampleCurve) -> str:
    """The whole page."""
    title = escape(f"Calibration pictures for {curve.model}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p><strong>{escape(curve.in_words())}</strong></p>
{render_svg(draw_chart(curve))}
<div><table>
<thead><tr><th rowspan="2">pictures</th><th colspan="3">SQNR in dB</th><th colspan="3">agreement in %</th>\
<th rowspan="2">seconds to calibrate</th></tr>
<tr>{"<th>worst</th><th>median</th><th>best</th>" * 2}</tr></thead>
<tbody>
{_table_rows(curve)}
</tbody>
</table></div>
<p>{escape(curve.how())}</p>
<footer>qconv {escape(curve.version)}</footer>
</body>
</html>
"""


def _table_rows(curve: SampleCurve) -> str:
    rows = []
    for count in curve.counts:
        cells = [str(count), *_spread_cells(curve.sqnr_db(count), 1), *_spread_cells(curve.agreement(count), 100)]
        cells.append(f"{curve.seconds[count]:.1f}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _spread_cells(spread: Spread | None, factor: float) -> list[str]:
    values = (None, None, None) if spread is None else (spread.least, spread.median, spread.most)
    return [format_score(value, factor) for value in values]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def render_svg(shapes: Sequence[Shape]) -> str:
    """The chart; roles are classes, which STYLE gives their colours."""
    content = "\n".join(_svg_element(shape) for shape in shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="SQNR and agreement over the number of calibration pictures">\n{content}\n</svg>'
    )


def _svg_element(shape: Shape) -> str:
    if isinstance(shape, ChartText):
        x, y = shape.at
        turned = f' transform="rotate(-90 {x:.2f} {y:.2f})" dominant-baseline="central"' if shape.upright else ""
        return (
            f'<text class="{shape.role}" x="{x:.2f}" y="{y:.2f}" font-size="{shape.size:g}" '
            f'text-anchor="{shape.anchor}"{turned}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, ChartDot):
        x, y = shape.at
        title = f"<title>{escape(shape.title)}</title>"
        return f'<circle class="{shape.role}" cx="{x:.2f}" cy="{y:.2f}" r="{shape.radius:g}">{title}</circle>'
    if isinstance(shape, ChartArea):
        return f'<polygon class="{shape.role}" points="{_svg_points(shape.points)}"/>'
    return _svg_line(shape)


def _svg_line(line: ChartLine) -> str:
    dashes = f" {DASH_ATTRIBUTE}" if line.dashed else ""
    return f'<polyline class="{line.role}" points="{_svg_points(line.points)}" stroke-width="{line.width:g}"{dashes}/>'


def _svg_points(points: Sequence[XY]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


# Charts and small pictures as PNG: the door to Pillow for drawing, as images.py is for reading.
#
# Drawn at SHARPNESS times the size and averaged down, which is all the antialiasing that Pillow's shapes lack. The font
# is the one that Pillow brings along.


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
    """The file, of WIDTH x HEIGHT pixels."""
    canvas = Image.new("RGB", (WIDTH * SHARPNESS, HEIGHT * SHARPNESS), COLORS["paper"])
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        if isinstance(shape, ChartText):
            _draw_text(canvas, pen, shape)
        elif isinstance(shape, ChartArea):
            pen.polygon(_scale_points(shape.points), fill=COLORS[shape.role])
        elif isinstance(shape, ChartDot):
            x, y = _scale_points([shape.at])[0]
            pen.circle((x, y), shape.radius * SHARPNESS, fill=COLORS[shape.role], outline="#ffffff", width=SHARPNESS)
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
        length = hypot(x1 - x0, y1 - y0)
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
