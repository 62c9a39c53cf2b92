"""Charts and small pictures as PNG: the door to Pillow for drawing, as images.py is for reading.

Drawn at SHARPNESS times the size and averaged down, which is all the antialiasing that Pillow's shapes lack. The font
is the one that Pillow brings along.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from math import hypot

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from qconv.report.chart import HEIGHT, WIDTH, XY, Area, Dot, Line, Shape, Text

SHARPNESS = 3
THUMBNAIL = 160
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


def png(shapes: Sequence[Shape]) -> bytes:
    """The file, of WIDTH x HEIGHT pixels."""
    canvas = Image.new("RGB", (WIDTH * SHARPNESS, HEIGHT * SHARPNESS), COLORS["paper"])
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        if isinstance(shape, Text):
            _write(canvas, pen, shape)
        elif isinstance(shape, Area):
            pen.polygon(_scaled(shape.points), fill=COLORS[shape.role])
        elif isinstance(shape, Dot):
            x, y = _scaled([shape.at])[0]
            pen.circle((x, y), shape.radius * SHARPNESS, fill=COLORS[shape.role], outline="#ffffff", width=SHARPNESS)
        else:
            _draw_line(pen, shape)
    return _file(canvas.reduce(SHARPNESS))


def picture(pixels: NDArray[np.uint8]) -> bytes:
    """The file of a picture (H, W, 3) or (H, W, 1), every pixel as it is."""
    return thumbnail(pixels, max(pixels.shape))


def thumbnail(pixels: NDArray[np.uint8], side: int = THUMBNAIL) -> bytes:
    """The file of a picture (H, W, 3) or (H, W, 1), no side longer than `side`."""
    small = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    small.thumbnail((side, side))
    return _file(small)


def _file(picture: Image.Image) -> bytes:
    """The PNG file of an image."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _scaled(points: Sequence[XY]) -> list[XY]:
    return [(x * SHARPNESS, y * SHARPNESS) for x, y in points]


def _draw_line(pen: ImageDraw.ImageDraw, line: Line) -> None:
    width = round(line.width * SHARPNESS)
    for part in _dashes(line.points) if line.dashed else [line.points]:
        pen.line(_scaled(part), fill=COLORS[line.role], width=width, joint="curve")


def _dashes(points: Sequence[XY]) -> list[tuple[XY, XY]]:
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


def _write(canvas: Image.Image, pen: ImageDraw.ImageDraw, text: Text) -> None:
    font = ImageFont.load_default(text.size * SHARPNESS)
    ((x, y),) = _scaled([text.at])
    if not text.upright:
        pen.text((x, y), text.text, fill=COLORS[text.role], font=font, anchor=ANCHORS[text.anchor])
        return
    size = pen.textbbox((0, 0), text.text, font=font)[2:]
    ink = Image.new("L", (round(size[0]), round(size[1])))
    ImageDraw.Draw(ink).text((0, 0), text.text, fill=255, font=font)
    ink = ink.rotate(90, expand=True)
    canvas.paste(COLORS[text.role], (round(x - ink.width / 2), round(y - ink.height / 2)), ink)
