"""Lists the decoders, from the most certain to the least, and finds the one that suits a network.

A new family is a module with a function `match`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from qconv.decoding import (
    blazeface,
    centerface,
    centernet,
    detr,
    fastestdet,
    nanodet,
    retinaface,
    ssd,
    suppressed,
    ultraface,
    yolo_end_to_end,
    yolov5,
    yolov8,
    yolox,
)
from qconv.decoding.head import Head, NetworkFacts

Matcher = Callable[[NetworkFacts], Head | None]

DECODERS: tuple[Matcher, ...] = (
    yolov5.match,
    yolov8.match,
    yolox.match,
    nanodet.match,
    fastestdet.match,
    centerface.match,
    centernet.match,
    blazeface.match,
    ultraface.match,
    retinaface.match,
    ssd.match,
    suppressed.match,
    detr.match,
    yolo_end_to_end.match,
)


def find_head(facts: NetworkFacts) -> Head | None:
    """The detections among the outputs of a network; None where no decoder knows them."""
    return next((head for match in DECODERS if (head := match(facts)) is not None), None)
