"""The chart of a study as plain shapes: two panels, accuracy over the number of pictures on a logarithmic axis.

Every draw is a dot, the median a line, the span from the worst to the best draw a band. Shapes have places in units of
a picture of WIDTH x HEIGHT, and roles instead of colours: who draws them (plot.py, page.py) gives them theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qconv.errors import format_count
from qconv.results.sample_curve import SampleCurve, Spread

WIDTH, HEIGHT = 1200, 560
TOP, BOTTOM = 120, 470
PANELS = ((100, 570), (710, 1180))
"""Left and right end of each."""
FONT, LARGE = 17, 24
TICKS = 5
LABEL_ROOM = 34
XY = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """role: "grid", "axis", "full", "enough", or a panel's own."""

    points: tuple[XY, ...]
    role: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Area:
    """A filled polygon."""

    points: tuple[XY, ...]
    role: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A filled circle. title: what it says when pointed at."""

    at: XY
    radius: float
    role: str
    title: str


@dataclass(frozen=True, slots=True)
class Text:
    """anchor: which end of it lies at `at`: "start", "middle" or "end". `at` is on the baseline. upright: turned by 90
    degrees, to be read from below."""

    at: XY
    text: str
    anchor: str = "middle"
    size: float = FONT
    role: str = "text"
    upright: bool = False


Shape = Line | Area | Dot | Text


@dataclass(frozen=True, slots=True)
class Measure:
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


def draw(curve: SampleCurve) -> list[Shape]:
    """All shapes, those behind first."""
    title = f"How many calibration pictures does {_short(curve.model)} need?"
    shapes: list[Shape] = [Text((WIDTH / 2, 40), title, size=LARGE)]
    draws = "one draw" if curve.draws == 1 else f"{curve.draws} draws of each number"
    subtitle = f"{curve.recipe['calibrator']}, {draws}, scored on {format_count(curve.scored, 'other picture')}"
    shapes.append(Text((WIDTH / 2, 68), subtitle, role="quiet"))
    for ends, measure in zip(PANELS, _measures(curve), strict=True):
        shapes += _panel(curve, measure, ends)
    return shapes


def _measures(curve: SampleCurve) -> tuple[Measure, Measure]:
    sqnr = [(p.pictures, p.seed, p.sqnr_db) for p in curve.points if p.sqnr_db is not None]
    agreement = [(p.pictures, p.seed, 100 * p.agreement) for p in curve.points if p.agreement is not None]

    def in_percent(count: int) -> Spread | None:
        found = curve.agreement(count)
        return None if found is None else Spread(100 * found.least, 100 * found.median, 100 * found.most)

    return (
        Measure("sqnr", "SQNR (dB)", "dB", curve.sqnr_db, sqnr),
        Measure("agreement", "agreement with the float model (%)", "%", in_percent, agreement, most=100.0),
    )


def _panel(curve: SampleCurve, measure: Measure, ends: tuple[float, float]) -> Iterator[Shape]:
    left, right = ends
    middle = (left + right) / 2
    yield Text((middle, BOTTOM + 62), "calibration pictures (logarithmic)", role="text")
    yield Text((left - 66, (TOP + BOTTOM) / 2), measure.label, upright=True)
    if not measure.each:
        yield from _frame(left, right)
        yield Text((middle, (TOP + BOTTOM) / 2), "nothing to measure here", role="quiet")
        return
    spreads = {c: s for c in curve.counts if (s := measure.of(c)) is not None and math.isfinite(s.most)}
    axes = _axes(ends, curve, [value for _, _, value in measure.each], measure.most)
    outline = [(axes.x(c), axes.y(s.least)) for c, s in spreads.items()]
    outline += [(axes.x(c), axes.y(s.most)) for c, s in reversed(spreads.items())]
    yield Area(tuple(outline), f"{measure.role}-band")
    yield from _grid(axes, curve.counts)
    yield from _marks(curve, measure, axes)
    yield from _frame(left, right)
    yield Line(tuple((axes.x(c), axes.y(s.median)) for c, s in spreads.items()), measure.role, width=3)
    for count, seed, value in measure.each:
        title = f"{format_count(count, 'picture')}, draw {seed}: {value:.4g} {measure.unit}"
        yield Dot((axes.x(count), axes.y(value)), 5, measure.role, title)


def _marks(curve: SampleCurve, measure: Measure, axes: _Axes) -> Iterator[Shape]:
    """What all pictures give, and how many are enough."""
    left, right = axes.ends
    full = measure.of(curve.pictures)
    if full is not None and math.isfinite(full.median):
        place = axes.y(full.median)
        yield Line(((left, place), (right, place)), "full", width=1.5, dashed=True)
        # small sets lie lower, as a rule, so that there is room above the line on the left
        above = place - 9 if place - 30 > TOP else place + 22
        yield Text((left + 10, above), f"all {curve.pictures}: {full.median:.4g} {measure.unit}", "start", role="quiet")
    if curve.enough is not None:
        place = axes.x(curve.enough)
        yield Line(((place, TOP), (place, BOTTOM)), "enough", width=1.5, dashed=True)
        text = f"{curve.enough} {'is' if curve.enough == 1 else 'are'} enough"
        on_the_left = place > (left + right) / 2
        yield Text((place, TOP - 12), text, "end" if on_the_left else "start", role="quiet")


def _frame(left: float, right: float) -> Iterator[Shape]:
    yield Line(((left, TOP), (left, BOTTOM), (right, BOTTOM)), "axis", width=1.5)


def _grid(axes: _Axes, counts: Sequence[int]) -> Iterator[Shape]:
    left, right = axes.ends
    for tick in axes.ticks:
        place = axes.y(tick)
        yield Line(((left, place), (right, place)), "grid")
        yield Text((left - 10, place + 6), f"{tick:.10g}", "end", role="quiet")
    free = math.inf
    for count in reversed(counts):  # from the last, which always gets its number
        place = axes.x(count)
        yield Line(((place, BOTTOM), (place, BOTTOM + 6)), "axis")
        if place <= free:
            yield Text((place, BOTTOM + 28), str(count), role="quiet")
            free = place - LABEL_ROOM


def _axes(ends: tuple[float, float], curve: SampleCurve, values: Sequence[float], most: float) -> _Axes:
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


def _short(name: str) -> str:
    """The name of the file alone; a long one is cut."""
    name = name.rpartition("/")[2]
    return name if len(name) <= 48 else f"{name[:45]}..."
