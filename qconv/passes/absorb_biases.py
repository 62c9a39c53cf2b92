"""This pass lowers channels that are high on all images, and adds what they lost to the biases behind.

For layer -> Relu -> layers and c >= 0 below every value of a channel:

    b1' = b1 - c        x' = Relu(W1 u + b1 - c) = x - c        b2' = b2 + sum over inputs and kernel positions of W2 c

This is exact while x >= c. c is ABSORBED_SHARE of the least value to expect on other images, by how far apart the
lowest images are (`calibration.observer`). It is refused where a reader pads with zeros, as c would not reach its
border, and done where the range of the tensor, which is that of its largest channel, shrinks by LEAST_RANGE_GAIN.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.3; here with measured extremes for beta - 3 gamma.
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
from qconv.passes.fold import FLATTENERS, find_affine_readers, make_scaled_layer

STEP = "equalize"

ABSORBED_SHARE = 0.9

LEAST_RANGE_GAIN = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class AbsorptionCandidate:
    """A layer whose only reader is a Relu, where all readers of the Relu can take a shift. result: of the Relu."""

    layer: Node
    result: Value


def find_absorption_candidates(model: Model) -> list[AbsorptionCandidate]:
    """The places of a folded model where biases can be absorbed, if channels are high."""
    return [
        AbsorptionCandidate(layer, node.outputs[0])
        for node in model.nodes()
        if (layer := _layer_before_relu(model, node)) is not None
    ]


def _layer_before_relu(model: Model, node: Node) -> Node | None:
    data = node.inputs[0] if node.inputs else None
    layer = None if data is None else data.producer()
    if standard_op_type(node) != "Relu" or data is None or layer is None or standard_op_type(layer) not in INPUTS_FIRST:
        return None
    if standard_op_type(layer) == "MatMul" or model.sole_reader(data) is not node:
        return None
    try:
        _shift_readers(model, node.outputs[0], np.ones(read_layer(layer).outputs))
    except EditRefused:
        return None
    return layer


def _shift_readers(model: Model, value: Value, shift: Float64) -> list[Layer]:
    """The layers that read `value`, with `shift` (C,) added to their input. Raises EditRefused."""
    return [
        make_scaled_layer(model, end, Affine(np.ones_like(shift), shift)) for end in find_affine_readers(model, value)
    ]


def select_gaining(
    found: Iterable[AbsorptionCandidate], channels: Mapping[str, ChannelRanges]
) -> list[AbsorptionCandidate]:
    """Select the candidates with channels that are high on all images. channels: as for `absorb_biases`."""
    return [
        c for c in found if (seen := channels.get(c.result.name or "")) is not None and _choose_shift(seen) is not None
    ]


def _choose_shift(seen: ChannelRanges) -> Float64 | None:
    """Choose c of every channel, (C,); None where the range would not shrink enough."""
    # a channel that never changes is all bias, of which nothing is to be gained
    shift = np.where(seen.high > seen.low, ABSORBED_SHARE * np.maximum(seen.floor, 0.0), 0.0)
    before, after = float(seen.high.max(initial=0.0)), float((seen.high - shift).max(initial=0.0))
    return shift if after < before and after <= before * (1 - LEAST_RANGE_GAIN) else None


def absorb_biases(
    model: Model, found: Iterable[AbsorptionCandidate], channels: dict[str, ChannelRanges]
) -> list[Change]:
    """Lower the channels that are high on all images; the model computes the same on these.

    channels: by the names of the candidates' results, with true minima; updated in place.
    """
    changes: list[Change] = []
    for candidate in select_gaining(found, channels):
        name = candidate.result.name or ""
        seen = channels[name]
        shift = _choose_shift(seen)
        if shift is not None and _absorb_bias(model, candidate, shift):
            before, after = float(seen.high.max(initial=0.0)), float((seen.high - shift).max(initial=0.0))
            channels[name] = seen.lowered(shift)
            count = int(np.count_nonzero(shift))
            what = f"{count} high channels lowered: the range ends at {after:.3g} instead of {before:.3g}"
            changes.append(Change(STEP, title(candidate.layer), what, "high channels lowered into the bias behind"))
    return changes


def _absorb_bias(model: Model, candidate: AbsorptionCandidate, shift: Float64) -> bool:
    """Lower the channels of one candidate by `shift`. Returns False, and changes nothing, where that is impossible."""
    layer = read_layer(candidate.layer)
    if shift.size != layer.outputs:
        return False
    layers = [scale_outputs(layer, np.ones(1), -shift), *_shift_readers(model, candidate.result, shift)]
    try:
        for one in layers:
            check_finite(one)
    except EditRefused:
        return False
    for one in layers:
        write_layer(model, one)
    along = [node.outputs[0] for end in find_affine_readers(model, candidate.result) for node in end.path]
    for value in dict.fromkeys([candidate.result, *along]):
        _shift_channel_stats(value, shift)
    lowered = shift.astype(np.float32)
    write_equalization(
        model.inner.metadata_props, {}, {value.name or "": lowered for value in _shifted_tensors(model, candidate)}
    )
    return True


def _shift_channel_stats(value: Value, shift: Float64) -> None:
    """Shift the noted means of a tensor whose axis 1 has channels, or the features that they have become."""
    found = channel_stats_of(value)
    if found is not None:
        transform_channel_stats(value, np.ones(1), -np.repeat(shift, found.mean.size // shift.size))


def _shifted_tensors(model: Model, candidate: AbsorptionCandidate) -> list[Value]:
    """All tensors that are shifted, up to the node that flattens channels into features."""
    along = (
        node
        for end in find_affine_readers(model, candidate.result)
        for node in end.path
        if standard_op_type(node) not in FLATTENERS
    )
    return list(dict.fromkeys([candidate.layer.outputs[0], candidate.result, *(node.outputs[0] for node in along)]))
