"""A channel that never comes near zero gives up what all of its values have in common, so that its range gets smaller.

For layer -> Relu -> layers, with c >= 0 by channel below every value that the channel took on the pictures:

    b1' = b1 - c        x' = Relu(W1 u + b1 - c) = x - c        b2' = b2 + sum over inputs and kernel positions of W2 c

This is exact while x >= c, on the pictures by measure; c is SHARE of the least value that others are expected to have,
by how far apart the lowest pictures are (reach.py). Where a reader pads with zeros, c would not reach its border: that
is refused. It is done where the range of the tensor, which is that of its largest channel, shrinks by at least
LEAST_GAIN.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.3, with measured extremes instead of beta - 3 gamma.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from qconv.calibration.observer import ChannelRanges
from qconv.errors import Change
from qconv.ir.layers import (
    INPUTS_FIRST,
    Affine,
    Float64,
    Layer,
    channel_stats_of,
    check_finite,
    read_layer,
    scale_outputs,
    transform_channel_stats,
    write_layer,
)
from qconv.ir.metadata import write_equalization
from qconv.ir.model import Model, Node, Value
from qconv.ir.rewriting import EditRefused, standard_op_type, title
from qconv.passes.fold import FLATTENERS, ends, scaled_layer

STEP = "equalize"
SHARE = 0.9
LEAST_GAIN = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A layer with the Relu that alone reads it. All that reads the Relu could take a shift."""

    layer: Node
    result: Value


def candidates(model: Model) -> list[Candidate]:
    """The places of a folded model where channels could be lowered, were they high."""
    return [
        Candidate(layer, node.outputs[0]) for node in model.nodes() if (layer := _layer_of(model, node)) is not None
    ]


def _layer_of(model: Model, node: Node) -> Node | None:
    data = node.inputs[0] if node.inputs else None
    layer = None if data is None else data.producer()
    if standard_op_type(node) != "Relu" or data is None or layer is None or standard_op_type(layer) not in INPUTS_FIRST:
        return None
    if standard_op_type(layer) == "MatMul" or model.sole_reader(data) is not node:
        return None
    try:
        _readers(model, node.outputs[0], np.ones(read_layer(layer).outputs))
    except EditRefused:
        return None
    return layer


def _readers(model: Model, value: Value, shift: Float64) -> list[Layer]:
    """The layers that read `value`, with `shift` added to what they read, (C,). Raises Refused."""
    return [scaled_layer(model, end, Affine(np.ones_like(shift), shift)) for end in ends(model, value)]


def gaining(found: Iterable[Candidate], channels: Mapping[str, ChannelRanges]) -> list[Candidate]:
    """Those with channels that are high on all pictures. channels: as for `absorb`."""
    return [c for c in found if (seen := channels.get(c.result.name or "")) is not None and _shift(seen) is not None]


def _shift(seen: ChannelRanges) -> Float64 | None:
    """c of every channel, (C,); None where nothing is to be gained."""
    # a channel that never changes is all bias, of which nothing is to be gained
    shift = np.where(seen.high > seen.low, SHARE * np.maximum(seen.floor, 0.0), 0.0)
    before, after = float(seen.high.max(initial=0.0)), float((seen.high - shift).max(initial=0.0))
    return shift if after < before and after <= before * (1 - LEAST_GAIN) else None


def absorb(model: Model, found: Iterable[Candidate], channels: dict[str, ChannelRanges]) -> list[Change]:
    """Lower the channels that are high on all pictures; the model computes the same on them.

    channels: by the names of the candidates' results, with true minima; brought up to date.
    """
    changes: list[Change] = []
    for candidate in gaining(found, channels):
        name = candidate.result.name or ""
        seen = channels[name]
        shift = _shift(seen)
        if shift is not None and _lowered(model, candidate, shift):
            before, after = float(seen.high.max(initial=0.0)), float((seen.high - shift).max(initial=0.0))
            channels[name] = seen.lowered(shift)
            count = int(np.count_nonzero(shift))
            what = f"{count} high channels lowered: the range ends at {after:.3g} instead of {before:.3g}"
            changes.append(Change(STEP, title(candidate.layer), what, "high channels lowered into the bias behind"))
    return changes


def _lowered(model: Model, candidate: Candidate, shift: Float64) -> bool:
    """False, and nothing done, where that is impossible."""
    layer = read_layer(candidate.layer)
    if shift.size != layer.outputs:
        return False
    layers = [scale_outputs(layer, np.ones(1), -shift), *_readers(model, candidate.result, shift)]
    try:
        for one in layers:
            check_finite(one)
    except EditRefused:
        return False
    for one in layers:
        write_layer(model, one)
    along = [node.outputs[0] for end in ends(model, candidate.result) for node in end.path]
    for value in dict.fromkeys([candidate.result, *along]):
        _lower_note(value, shift)
    lowered = shift.astype(np.float32)
    write_equalization(
        model.inner.metadata_props, {}, {value.name or "": lowered for value in _copies(model, candidate)}
    )
    return True


def _lower_note(value: Value, shift: Float64) -> None:
    """Of a channel, or of all the features that it has become."""
    found = channel_stats_of(value)
    if found is not None:
        transform_channel_stats(value, np.ones(1), -np.repeat(shift, found.mean.size // shift.size))


def _copies(model: Model, candidate: Candidate) -> list[Value]:
    """All tensors that are lower now, up to what makes features of channels."""
    along = (
        node for end in ends(model, candidate.result) for node in end.path if standard_op_type(node) not in FLATTENERS
    )
    return list(dict.fromkeys([candidate.layer.outputs[0], candidate.result, *(node.outputs[0] for node in along)]))
