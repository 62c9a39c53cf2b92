"""Scales and shifts with constant numbers disappear into the weights of the layer before or behind them.

    y = gain * x + shift    gain = gamma / sqrt(var + eps), shift = beta - mean * gain for BatchNormalization

    behind a layer:  W' = gain W,  b' = gain b + shift                        (gain, shift by output channel)
    before a layer:  W' = W gain,  b' = b + sum of W * shift over its inputs  (by input channel; no zero padding)

What cannot be folded becomes a depthwise 1x1 Conv, which runs in integers where BatchNormalization does not. The output
stays what it was up to the rounding of float32. Nothing is approximated: where a rewrite would change the output, it is
refused with the reason. Weights that others read too are copied. What BatchNormalizations tell of means is noted first.

Source: Jacob et al. 2017, arXiv 1712.05877, section 3.2; Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from qconv.data_free.propagation import set_batchnorm_means, set_batchnorm_stats
from qconv.errors import Change, Finding
from qconv.ir.layers import (
    INPUTS_FIRST,
    Affine,
    Float64,
    Layer,
    affine_data_input,
    check_finite,
    read_affine,
    read_layer,
    scale_inputs,
    scale_outputs,
    weight_of,
    write_layer,
)
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, rank
from qconv.ir.rewriting import (
    EditRefused,
    Pass,
    data_input,
    describe_node,
    each_node,
    explicit_pads,
    reads_as_data,
    standard_op_type,
    title,
    uses_only_first_output,
)
from qconv.passes import simplify
from qconv.passes.equalize import move_gains_back


def fold(model: Model) -> list[Finding]:
    """All float passes, again and again until none finds anything to do. Only refusals that still hold are returned."""
    model.sweep()
    set_batchnorm_means(model)
    set_batchnorm_stats(model)
    found = _settle(model)
    made = make_depthwise(model)
    found += made
    if any(isinstance(finding, Change) for finding in made):
        found += _settle(model)
    model.sweep()
    return list(dict.fromkeys(found))


def _settle(model: Model) -> list[Finding]:
    changes: list[Finding] = []
    while True:
        found = [finding for run in PASSES for finding in run(model)]
        done = [finding for finding in found if isinstance(finding, Change)]
        changes += done
        if not done:
            return changes + found


@each_node("fold", "Gemm")
def normalise_gemms(model: Model, node: Node) -> list[Change]:
    """alpha and beta go into the weight and the bias, which becomes one number for each output."""
    factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    bias, sizes = constant_array(input_of(node, 2)), dims(weight_of(node)) or [None, None]
    plain_bias = bias is None or list(bias.shape) == [sizes[0 if attribute(node, "transB", 0) else 1]]
    if attribute(node, "transA", 0):
        raise EditRefused(f"{describe_node(node)} transposes its data")
    if factors == (1.0, 1.0) and plain_bias:
        return []
    layer = read_layer(node)
    check_finite(layer)
    write_layer(model, layer)
    return [Change("fold", title(node), "alpha, beta and C normalised")]


# -- scales and shifts behind a layer ----------------------------------------------------------------------------------


@each_node("fold", "BatchNormalization", "Mul", "Add", "Sub", "Div")
def fold_affine(model: Model, node: Node) -> list[Change]:
    """A scale or shift goes into the layer before it or, failing that, into all layers that read it."""
    data = affine_data_input(node)
    if data is None:
        return []
    reasons: list[str] = []
    for edit in (_fold_back, _fold_ahead):
        try:
            changes = edit(model, node, data)
        except EditRefused as reason:
            reasons.append(str(reason))
        else:
            if changes:
                return changes
    if reasons:
        raise EditRefused("; ".join(dict.fromkeys(reasons)))
    return []


def _fold_back(model: Model, node: Node, data: Value) -> list[Change]:
    before = data.producer()
    if before is None or standard_op_type(before) not in INPUTS_FIRST or before.graph is not model.graph:
        return []
    if model.sole_reader(data) is not node:
        raise EditRefused(
            f"the model returns the output of its {describe_node(before)}"
            if data.is_graph_output()
            else f"its {describe_node(before)} has another reader"
        )
    layer = read_layer(before)
    if standard_op_type(before) != "MatMul":
        affine = read_affine(node, rank(weight_of(before)))  # its output has as many axes as its weight
    elif standard_op_type(node) in ("Mul", "Div"):  # a MatMul has no bias, and its channels come last
        affine = read_affine(node, rank(data), axis=-1)
    else:
        return []
    if affine.gain.size not in (1, layer.outputs):
        raise EditRefused(f"its constant makes more channels out of the one of {describe_node(before)}")
    layer = scale_outputs(layer, affine.gain, affine.shift)
    check_finite(layer)
    model.take_over(node.outputs[0], data)
    write_layer(model, layer)
    model.remove(node)
    return [
        Change(
            "fold",
            title(before),
            f"{describe_node(node)} folded into it",
            f"{node.op_type} folded into {before.op_type}",
        )
    ]


# -- scales and shifts before a layer ----------------------------------------------------------------------------------

FLATTENERS = frozenset({"Flatten", "Reshape", "Squeeze"})


@dataclass(frozen=True, slots=True)
class End:
    """Where a tensor ends up: a reader (None: the model returns it) of `value`, and what lies on the way."""

    reader: Node | None
    value: Value
    path: tuple[Node, ...]

    @property
    def flattener(self) -> Node | None:
        """What makes features out of channels on the way."""
        return next((node for node in self.path if standard_op_type(node) in FLATTENERS), None)


def ends(model: Model, value: Value, path: tuple[Node, ...] = ()) -> Iterator[End]:
    """Who reads `value`, seen through the operators that commute with a scale and shift by channel."""
    end = End(None, value, path)
    if value.is_graph_output():
        yield end
    for reader in model.readers(value):
        if standard_op_type(reader) == "Shape":  # a scale and shift do not change it
            continue
        if end.flattener is None and _commutes(reader) and reads_as_data(reader, value, model):
            yield from ends(model, reader.outputs[0], (*path, reader))
        else:
            yield End(reader, value, path)


def _commutes(node: Node) -> bool:
    """Whether it does with every scale and shift, or (MaxPool) with those that do not turn the order round."""
    return (
        standard_op_type(node) in FLATTENERS
        or (standard_op_type(node) == "MaxPool" and uses_only_first_output(node))
        or _averages(node)
    )


def _averages(node: Node) -> bool:
    """Whether every output is the mean of as many inputs."""
    if standard_op_type(node) == "GlobalAveragePool":
        return True
    if standard_op_type(node) != "AveragePool" or attribute(node, "ceil_mode", 0):
        return False
    pads = explicit_pads(node, len(attribute(node, "kernel_shape")))
    return pads is not None and not any(pads)


def _fold_ahead(model: Model, node: Node, data: Value) -> list[Change]:
    output = node.outputs[0]
    found = list(ends(model, output))
    if not any(end.reader is not None and standard_op_type(end.reader) in INPUTS_FIRST for end in found):
        return []
    affine = read_affine(node, rank(data))
    channels = max(affine.gain.size, affine.shift.size)
    if standard_op_type(node) != "BatchNormalization" and channels > 1 and (dims(data) or [None, None])[1] != channels:
        raise EditRefused("its data do not have as many channels as its constant, or it is not known how many")
    layers = [scaled_layer(model, end, affine) for end in found]
    for layer in layers:
        check_finite(layer)
    for layer in layers:
        write_layer(model, layer)
    model.redirect(output, data)
    model.remove(node)
    summed_up = f"{node.op_type} folded into what reads it"
    return [
        Change("fold", title(layer.node), f"{describe_node(node)} before it folded into it", summed_up)
        for layer in layers
    ]


def scaled_layer(model: Model, end: End, affine: Affine) -> Layer:
    """The layer at `end` with the scale and shift of its data inside. Raises Refused."""
    reader = end.reader
    if reader is None:
        raise EditRefused("the model returns its output")
    if standard_op_type(reader) not in INPUTS_FIRST or not reads_as_data(reader, end.value, model):
        raise EditRefused(f"{describe_node(reader)} reads it too")
    layer = read_layer(reader)
    if affine.gain.size > 1 and standard_op_type(reader) == "MatMul":
        raise EditRefused(f"{describe_node(reader)} has its inputs along another axis")
    if (affine.gain < 0).any() and any(standard_op_type(node) == "MaxPool" for node in end.path):
        raise EditRefused("some of its scales are negative, and there is a MaxPool before the next layer")
    if affine.shift.any():
        _check_shift(reader)
    gain = _by_feature(affine.gain, layer, end.flattener)
    return scale_inputs(layer, gain, _by_feature(affine.shift, layer, end.flattener))


def _check_shift(reader: Node) -> None:
    """Raise unless every output of the layer sees every shifted input, so that the shift adds a constant."""
    if standard_op_type(reader) == "MatMul":
        raise EditRefused(f"{describe_node(reader)} has no bias to take its shift")
    if standard_op_type(reader) == "ConvTranspose":
        raise EditRefused(f"outputs of {describe_node(reader)} do not all see as many shifted inputs")
    if standard_op_type(reader) == "Conv":
        pads = explicit_pads(reader, (rank(weight_of(reader)) or 4) - 2)
        if pads is None or any(pads):
            raise EditRefused(f"{describe_node(reader)} pads its data with zeros, which its shift would not reach")


def _by_feature(numbers: Float64, layer: Layer, flattener: Node | None) -> Float64:
    """Numbers by channel (C,) as numbers by input of the layer, where a channel's H*W positions lie side by side."""
    if numbers.size == 1:
        return numbers
    positions, rest = divmod(layer.inputs, numbers.size)
    if rest or (flattener is None and positions != 1):
        raise EditRefused(f"{describe_node(layer.node)} has another number of inputs than its data has channels")
    if flattener is not None and not (
        standard_op_type(layer.node) == "Gemm" and _keeps_channels(flattener, layer.inputs)
    ):
        raise EditRefused(f"{describe_node(flattener)} may mix channels")
    return np.repeat(numbers, positions)


def _keeps_channels(flattener: Node, features: int) -> bool:
    """Whether (N, C, H, W) becomes (N, C * H * W). A result of two axes is given: a Gemm reads it."""
    if standard_op_type(flattener) == "Flatten" and attribute(flattener, "axis", 1) == 1:
        return True
    sizes = dims(data_input(flattener))
    return sizes is not None and prod(size or 0 for size in sizes[1:]) == features


# -- what is left ------------------------------------------------------------------------------------------------------


@each_node("fold", "BatchNormalization", "Mul")
def make_depthwise(model: Model, node: Node) -> list[Change]:
    """A scale by channel that found no layer becomes a depthwise 1x1 Conv, weight (C, 1, 1, 1)."""
    data = affine_data_input(node)
    if data is None:
        return []
    constant = constant_array(node.inputs[0 if data is node.inputs[1] else 1])
    if standard_op_type(node) == "BatchNormalization":
        affine = read_affine(node, rank(data))
        if rank(data) != 4:
            raise EditRefused("its data are no maps with height and width")
    else:
        sizes = dims(data) or []
        if constant is None or len(sizes) != 4 or constant.size == 1 or constant.size != sizes[1]:
            return []
        affine = read_affine(node, 4)
    channels, was = affine.gain.size, node.op_type
    assert constant is not None
    with np.errstate(over="ignore"):
        weight = affine.gain.reshape(channels, 1, 1, 1).astype(constant.dtype)
        bias = affine.shift.astype(constant.dtype)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise EditRefused("its scale or shift is beyond float32")
    inputs = [data, model.constant(f"{title(node)}_weight", weight), model.constant(f"{title(node)}_bias", bias)]
    model.become(node, "Conv", inputs, {"kernel_shape": [1, 1], "group": channels})
    return [Change("fold", title(node), f"{was} became a depthwise 1x1 Conv")]


PASSES: tuple[Pass, ...] = (
    *simplify.PASSES,
    normalise_gemms,
    move_gains_back,
    fold_affine,
    simplify.divide_by_multiplying,
)
