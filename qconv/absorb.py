"""A channel that never comes near zero gives up what all of its values have in common, so that its range gets smaller.

For layer -> Relu -> layers, with c >= 0 by channel below every value that the channel took on the pictures:

    b1' = b1 - c        x' = Relu(W1 u + b1 - c) = x - c        b2' = b2 + sum over inputs and kernel positions of W2 c

This is exact while x >= c, on the pictures by measure; c is SHARE of the least value, as others may go lower. Where a
reader pads with zeros, c would not reach its border: that is refused. It is done where the range of the tensor, which
is that of its largest channel, shrinks by at least LEAST_GAIN.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.3, with measured extremes instead of beta - 3 gamma.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qconv.affine import Affine
from qconv.calibrate import Tap, observer, watch
from qconv.edits import Refused, kind, title
from qconv.feed import Feed
from qconv.findings import Change
from qconv.fold import ends, scaled_layer
from qconv.graph import Model, Node, Value
from qconv.layers import INPUTS_FIRST, Float64, Layer, check_finite, read_layer, scale_outputs, write_layer
from qconv.sketch import Sketch, Want

STEP = "equalize"
SHARE = 0.9
LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A layer with the Relu that alone reads it. All that reads the Relu could take a shift."""

    layer: Node
    result: Value


def absorb(model: Model, feed: Feed, threads: int | None) -> list[Change]:
    """Lower the channels of a folded model that are high on all pictures; it computes the same on them."""
    found = list(_candidates(model))
    if not found:
        return []
    taps = [Tap(candidate.result.name or "", Want.CHANNELS) for candidate in found]
    sketches = watch(observer(model, taps, threads), taps, feed.all(STEP))
    return [change for one in found for change in _absorbed(model, one, sketches[one.result.name or ""])]


def _candidates(model: Model) -> Iterator[_Candidate]:
    for node in model.nodes():
        data = node.inputs[0] if node.inputs else None
        layer = None if data is None else data.producer()
        if kind(node) != "Relu" or data is None or layer is None or kind(layer) not in INPUTS_FIRST:
            continue
        if kind(layer) == "MatMul" or model.sole_reader(data) is not node:
            continue
        try:
            _readers(model, node.outputs[0], np.ones(read_layer(layer).outputs))
        except Refused:
            continue
        yield _Candidate(layer, node.outputs[0])


def _readers(model: Model, value: Value, shift: Float64) -> list[Layer]:
    """The layers that read `value`, with `shift` added to what they read, (C,). Raises Refused."""
    return [scaled_layer(model, end, Affine(np.ones_like(shift), shift)) for end in ends(model, value)]


def _absorbed(model: Model, candidate: _Candidate, sketch: Sketch) -> list[Change]:
    shift = SHARE * np.maximum(sketch.lows.astype(np.float64), 0.0)
    layer = read_layer(candidate.layer)
    before, after = sketch.high, float((sketch.highs - shift).max())
    if shift.size != layer.outputs or after > before * (1 - LEAST_GAIN):
        return []
    lowered = scale_outputs(layer, np.ones(1), -shift)
    readers = _readers(model, candidate.result, shift)
    try:
        for one in (lowered, *readers):
            check_finite(one)
    except Refused:
        return []
    for one in (lowered, *readers):
        write_layer(model, one)
    what = (
        f"{int(np.count_nonzero(shift))} high channels lowered: the range ends at {after:.3g} instead of {before:.3g}"
    )
    return [Change(STEP, title(candidate.layer), what, "high channels lowered into the bias behind")]
