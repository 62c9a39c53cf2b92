"""This pass folds constant scales and shifts, BatchNormalization among them, into the weights of neighbouring layers.

    y = gain * x + shift    gain = gamma / sqrt(var + eps), shift = beta - mean * gain for BatchNormalization

    behind a layer:  W' = gain W,  b' = gain b + shift                        (gain, shift by output channel)
    before a layer:  W' = W gain,  b' = b + sum of W * shift over its inputs  (by input channel; no zero padding)
    across a homogeneous activation:  gain * relu(x) = sign(gain) * relu(|gain| x); |gain| moves into the layer before

What cannot be folded becomes a depthwise 1x1 Conv. Nothing is approximated: a rewrite that would change the output is
refused with the reason. Shared weights are copied; copies that have become equal are shared again. Statistics of
BatchNormalizations are noted first.

Sources: Jacob et al. 2017, arXiv 1712.05877, 3.2; Krishnamoorthi 2018, arXiv 1806.08342, 3.2.2; Nagel et al. 2019,
arXiv 1906.04721, 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from qconv.data_free.propagation import set_batchnorm_means, set_batchnorm_stats
from qconv.errors import Change, Finding
from qconv.ir.data_shapes import find_data_shaped
from qconv.ir.gelu import halves_gelu
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
    transform_channel_stats,
    weight_of,
    write_layer,
)
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, rank, set_attribute
from qconv.ir.operators import ChannelEffect, operator, with_
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
from qconv.passes import shuffles, simplify, slopes
from qconv.passes.fast_spellings import FAST_SPELLINGS
from qconv.passes.fold_columns import fold_into_columns
from qconv.passes.merge_branches import merge_branches
from qconv.passes.merge_layers import average_first, merge_layers, share_equal_weights


def find_layer_before(model: Model, value: Value) -> Layer | None:
    """The layer whose output channels `value` carries, seen through homogeneous operators that nothing else reads."""
    node, seen_activation = value.producer(), False
    while node is not None and operator(standard_op_type(node)).homogeneous and uses_only_first_output(node):
        seen_activation = True
        below = node.inputs[0]
        if below is None or model.sole_reader(below) is not node:
            return None
        node = below.producer()
    if (
        not seen_activation
        or node is None
        or standard_op_type(node) not in INPUTS_FIRST
        or standard_op_type(node) == "MatMul"
    ):
        return None
    return read_layer(node)


def split_gain(gain: Float64) -> tuple[Float64, Float64]:
    """(magnitude, rest) with magnitude > 0 and magnitude * rest == gain; a gain of zero has magnitude 1."""
    magnitude = np.where(gain == 0, 1.0, np.abs(gain))
    return magnitude, np.sign(gain)


@each_node("equalize", "BatchNormalization")
def move_gains_back(model: Model, node: Node) -> list[Change]:
    """Move the magnitude of a BatchNormalization's gain into the layer in front of the activation before it."""
    data = node.inputs[0]
    if data is None or model.sole_reader(data) is not node:
        return []
    layer = find_layer_before(model, data)
    if layer is None:
        return []
    affine = read_affine(node, rank(data))
    magnitude, rest = split_gain(affine.gain)
    if np.all(magnitude == 1):
        return []
    if magnitude.size != layer.outputs:
        raise EditRefused(f"{describe_node(layer.node)} has another number of channels")
    layer = scale_outputs(layer, magnitude, np.zeros(1))
    check_finite(layer)
    write_layer(model, layer)
    between = data.producer()
    while between is not None and between is not layer.node:  # writing the layer has moved the note of its output
        transform_channel_stats(between.outputs[0], magnitude, np.zeros(1))
        between = data_input(between).producer()
    numbers = {1: rest, 2: affine.shift, 3: np.zeros_like(rest), 4: np.ones_like(rest)}
    for index, values in numbers.items():
        model.set_input(node, index, model.constant(f"{title(node)}_{index}", values.astype(np.float32)))
    set_attribute(node, "epsilon", 0.0)
    moved = "moved in front of the activation"
    return [
        Change(
            "equalize", title(layer.node), f"scale of {describe_node(node)} {moved}", f"scale of {node.op_type} {moved}"
        )
    ]


def run_float_passes(model: Model, *, for_ort: bool = False) -> list[Finding]:
    """Run all float passes until none changes anything. Returns changes, and the refusals that still hold.

    for_ort: also write what ONNX Runtime's CPU provider has no integer kernel for, or a slow one, as what it does fast.
    """
    model.sweep()
    set_batchnorm_means(model)
    set_batchnorm_stats(model)
    found = _run_to_fixpoint(model)
    made = make_depthwise(model) + average_first(model)
    found += made
    if any(isinstance(finding, Change) for finding in made):
        found += _run_to_fixpoint(model)
    if for_ort:
        for run in (slopes.slopes_to_layers, simplify.open_hard_swishes, simplify.clip_at_layers, *FAST_SPELLINGS):
            found += run(model)
    share_equal_weights(model)
    model.sweep()
    return list(dict.fromkeys(found))


def _run_to_fixpoint(model: Model) -> list[Finding]:
    changes: list[Finding] = []
    while True:
        found = [finding for run in FLOAT_PASSES for finding in run(model)]
        done = [finding for finding in found if isinstance(finding, Change)]
        changes += done
        if not done:
            return changes + found


@each_node("fold", "Gemm")
def normalise_gemms(model: Model, node: Node) -> list[Change]:
    """Fold alpha and beta of a Gemm into its weight and bias, which becomes one number an output."""
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
    """Fold a scale or shift into the layer before it or, failing that, into all layers that read it."""
    data = affine_data_input(node)
    if data is None or halves_gelu(model, node):
        return []
    reasons: list[str] = []
    for edit in (_fold_into_previous_layer, _fold_into_readers):
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


def _fold_into_previous_layer(model: Model, node: Node, data: Value) -> list[Change]:
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

FLATTENERS = with_(effect=ChannelEffect.FLATTEN)


@dataclass(frozen=True, slots=True)
class AffineReader:
    """Who reads a tensor in the end: a reader (None: the model returns it) of `value`, and the nodes on the way."""

    reader: Node | None
    value: Value
    path: tuple[Node, ...]

    @property
    def flattener(self) -> Node | None:
        """The node on the way that flattens channels into features."""
        return next((node for node in self.path if standard_op_type(node) in FLATTENERS), None)


def find_affine_readers(model: Model, value: Value, path: tuple[Node, ...] = ()) -> Iterator[AffineReader]:
    """Find the readers of `value`, through operators that commute with a scale and shift by channel."""
    end = AffineReader(None, value, path)
    if value.is_graph_output():
        yield end
    for reader in model.readers(value):
        if standard_op_type(reader) == "Shape":  # a scale and shift do not change it
            continue
        if end.flattener is None and _is_affine_commuting(reader) and reads_as_data(reader, value, model):
            yield from find_affine_readers(model, reader.outputs[0], (*path, reader))
        else:
            yield AffineReader(reader, value, path)


def _is_affine_commuting(node: Node) -> bool:
    """Whether a node commutes with every scale and shift, or (MaxPool) with those that keep the order."""
    return (
        standard_op_type(node) in FLATTENERS
        or (standard_op_type(node) == "MaxPool" and uses_only_first_output(node))
        or _is_averaging(node)
    )


def _is_averaging(node: Node) -> bool:
    """Whether every output is the mean of as many inputs."""
    if standard_op_type(node) == "GlobalAveragePool":
        return True
    if standard_op_type(node) != "AveragePool" or attribute(node, "ceil_mode", 0):
        return False
    pads = explicit_pads(node, len(attribute(node, "kernel_shape")))
    return pads is not None and not any(pads)


def _fold_into_readers(model: Model, node: Node, data: Value) -> list[Change]:
    output = node.outputs[0]
    found = list(find_affine_readers(model, output))
    if not any(end.reader is not None and standard_op_type(end.reader) in INPUTS_FIRST for end in found):
        return []
    affine = read_affine(node, rank(data))
    channels = max(affine.gain.size, affine.shift.size)
    if standard_op_type(node) != "BatchNormalization" and channels > 1 and (dims(data) or [None, None])[1] != channels:
        raise EditRefused("its data do not have as many channels as its constant, or it is not known how many")
    layers = [make_scaled_layer(model, end, affine) for end in found]
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


def make_scaled_layer(model: Model, end: AffineReader, affine: Affine) -> Layer:
    """The layer at `end` with the scale and shift of its input folded in. Raises EditRefused."""
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
        _require_constant_shift(reader)
    gain = _repeat_by_feature(affine.gain, layer, end.flattener)
    return scale_inputs(layer, gain, _repeat_by_feature(affine.shift, layer, end.flattener))


def _require_constant_shift(reader: Node) -> None:
    """Raise EditRefused unless the shift adds a constant: every output of the layer must see every shifted input."""
    if standard_op_type(reader) == "MatMul":
        raise EditRefused(f"{describe_node(reader)} has no bias to take its shift")
    if standard_op_type(reader) == "ConvTranspose":
        raise EditRefused(f"outputs of {describe_node(reader)} do not all see as many shifted inputs")
    if standard_op_type(reader) == "Conv":
        pads = explicit_pads(reader, (rank(weight_of(reader)) or 4) - 2)
        if pads is None or any(pads):
            raise EditRefused(f"{describe_node(reader)} pads its data with zeros, which its shift would not reach")


def _repeat_by_feature(numbers: Float64, layer: Layer, flattener: Node | None) -> Float64:
    """Repeat numbers by channel (C,) for each input of the layer: the H*W positions of a channel lie side by side."""
    if numbers.size == 1:
        return numbers
    positions, rest = divmod(layer.inputs, numbers.size)
    if rest or (flattener is None and positions != 1):
        raise EditRefused(f"{describe_node(layer.node)} has another number of inputs than its data has channels")
    if flattener is not None and not (
        standard_op_type(layer.node) == "Gemm" and _is_channel_flattening(flattener, layer.inputs)
    ):
        raise EditRefused(f"{describe_node(flattener)} may mix channels")
    return np.repeat(numbers, positions)


def _is_channel_flattening(flattener: Node, features: int) -> bool:
    """Whether a node turns (N, C, H, W) into (N, C * H * W). Its result has two axes, as a Gemm reads it."""
    if standard_op_type(flattener) == "Flatten" and attribute(flattener, "axis", 1) == 1:
        return True
    sizes = dims(data_input(flattener))
    return sizes is not None and prod(size or 0 for size in sizes[1:]) == features


# -- what is left ------------------------------------------------------------------------------------------------------


def make_depthwise(model: Model) -> list[Finding]:
    """Turn each scale by channel that no layer can take into a depthwise 1x1 Conv, weight (C, 1, 1, 1)."""
    data_shaped = cache(lambda: find_data_shaped(model))  # the shapes stay, and so do the tensors

    @each_node("fold", "BatchNormalization", "Mul")
    def edit(model: Model, node: Node) -> list[Change]:
        return _become_depthwise(model, node, data_shaped)

    return edit(model)


def _become_depthwise(model: Model, node: Node, data_shaped: Callable[[], set[Value]]) -> list[Change]:
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
        if 0 in sizes or (None in sizes[2:] and data in data_shaped()):
            raise EditRefused("its data may be empty, which a Conv does not take")
        affine = read_affine(node, 4)
    channels, was = affine.gain.size, node.op_type
    if not channels:
        raise EditRefused("it has no channels")
    assert constant is not None
    with np.errstate(over="ignore"):
        weight = affine.gain.reshape(channels, 1, 1, 1).astype(constant.dtype)
        bias = affine.shift.astype(constant.dtype)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise EditRefused("its scale or shift is beyond float32")
    inputs = [data, model.constant(f"{title(node)}_weight", weight), model.constant(f"{title(node)}_bias", bias)]
    model.become(node, "Conv", inputs, {"kernel_shape": [1, 1], "group": channels})
    return [Change("fold", title(node), f"{was} became a depthwise 1x1 Conv")]


FLOAT_PASSES: tuple[Pass, ...] = (
    slopes.recognise_slopes,
    *simplify.SIMPLIFY_PASSES,
    slopes.slope_to_leaky_relu,
    shuffles.gather_channels,
    shuffles.fold_channel_order,
    normalise_gemms,
    move_gains_back,
    fold_affine,
    fold_into_columns,
    merge_branches,
    merge_layers,
    simplify.divide_by_multiplying,
)
