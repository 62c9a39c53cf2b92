"""A study as one HTML page: chart as inline SVG, sentence, table. Opens offline, light or dark, without a script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qconv.report.chart import HEIGHT, WIDTH, XY, Area, Dot, Line, Shape, Text, draw
from qconv.results.sample_curve import SampleCurve, Spread, format_score

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
DASHES = 'stroke-dasharray="7 5"'


def page(curve: SampleCurve) -> str:
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
{svg(draw(curve))}
<div><table>
<thead><tr><th rowspan="2">pictures</th><th colspan="3">SQNR in dB</th><th colspan="3">agreement in %</th>\
<th rowspan="2">seconds to calibrate</th></tr>
<tr>{"<th>worst</th><th>median</th><th>best</th>" * 2}</tr></thead>
<tbody>
{_rows(curve)}
</tbody>
</table></div>
<p>{escape(curve.how())}</p>
<footer>qconv {escape(curve.version)}</footer>
</body>
</html>
"""


def _rows(curve: SampleCurve) -> str:
    rows = []
    for count in curve.counts:
        cells = [str(count), *_cells(curve.sqnr_db(count), 1), *_cells(curve.agreement(count), 100)]
        cells.append(f"{curve.seconds[count]:.1f}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(rows)


def _cells(spread: Spread | None, factor: float) -> list[str]:
    values = (None, None, None) if spread is None else (spread.least, spread.median, spread.most)
    return [format_score(value, factor) for value in values]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def svg(shapes: Sequence[Shape]) -> str:
    """The chart; roles are classes, which STYLE gives their colours."""
    content = "\n".join(_element(shape) for shape in shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="SQNR and agreement over the number of calibration pictures">\n{content}\n</svg>'
    )


def _element(shape: Shape) -> str:
    if isinstance(shape, Text):
        x, y = shape.at
        turned = f' transform="rotate(-90 {x:.2f} {y:.2f})" dominant-baseline="central"' if shape.upright else ""
        return (
            f'<text class="{shape.role}" x="{x:.2f}" y="{y:.2f}" font-size="{shape.size:g}" '
            f'text-anchor="{shape.anchor}"{turned}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, Dot):
        x, y = shape.at
        title = f"<title>{escape(shape.title)}</title>"
        return f'<circle class="{shape.role}" cx="{x:.2f}" cy="{y:.2f}" r="{shape.radius:g}">{title}</circle>'
    if isinstance(shape, Area):
        return f'<polygon class="{shape.role}" points="{_points(shape.points)}"/>'
    return _line(shape)


def _line(line: Line) -> str:
    dashes = f" {DASHES}" if line.dashed else ""
    return f'<polyline class="{line.role}" points="{_points(line.points)}" stroke-width="{line.width:g}"{dashes}/>'


def _points(points: Sequence[XY]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
