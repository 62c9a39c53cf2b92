"""Tensors that look as if something were wrong, though they can be quantized: all zero, constant, vanishingly small.

A layer that is dead on the calibration pictures may wake up on others, and then its range is a matter of luck.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qconv.calibration.sketch import Sketch
from qconv.quantizer import SMALLEST_SCALE

ROUNDING = 1e-5
"""Relative error of a sum of float32 numbers, about."""


def oddities(sketches: Mapping[str, Sketch]) -> list[str]:
    """A warning for each kind of oddity, naming the first tensor that shows it. sketches: by the tensors' names."""
    found: dict[str, list[str]] = {}
    for name, sketch in sketches.items():
        what = _oddity(sketch)
        if what:
            found.setdefault(what, []).append(name)
    return [
        f"tensor {names[0]!r}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {what}: "
        "check that they and the preprocessing are what the network was made for."
        for what, names in found.items()
    ]


def _oddity(sketch: Sketch) -> str:
    largest = max(abs(sketch.low), abs(sketch.high))
    if largest == 0:
        return "is zero everywhere on these pictures"
    if largest < SMALLEST_SCALE:
        return "holds numbers too small for float32 on these pictures, and becomes zero"
    if sketch.low == sketch.high or _is_one_number(sketch):
        return "is one and the same number everywhere on these pictures"
    return ""


def _is_one_number(sketch: Sketch) -> bool:
    """Whether the mean of each channel is its largest value, and that is the same in all. The low may be unseen."""
    high = sketch.high
    return bool(
        sketch.count and (sketch.highs == high).all() and (np.abs(sketch.means - high) <= ROUNDING * abs(high)).all()
    )
