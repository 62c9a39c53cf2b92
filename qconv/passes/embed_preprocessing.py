"""This pass moves the normalisation of pixels into the model, whose input becomes uint8 pixels, NHWC or NCHW.

    x = gain p + shift      gain = scale / std, shift = -mean / std, by channel; p: pixels 0 to 255
    z = -shift / gain       the pixel that stands for zero, and so for padding

    all channels alike, z a whole number   x = dequantize(p), scale gain, zero point z: nothing to compute
    a Conv reads it                        W' = W gain,  b' = b + sum of W (shift + gain z),  d = dequantize(p) = p - z
    otherwise                              `fold` moves what it can into the layers behind; the rest stays float

Pixels are codes already: no quantizer is needed, and nothing is rounded. A Conv that pads sees z outside the picture,
rounded to a whole pixel. Where that is one code for all channels it is the zero point, which padding feeds in anyway;
else the channels are padded one by one with their own codes. This was the fastest of six ways that were timed; a
constant to blend in at the border would have to be as large as the picture.

What the network itself does to its input in front of the first layer (types, axes, scales and shifts) is taken along.
It does not resize, and leaves the order of colours as the network has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Layout, Preprocessing
from qconv.data.preprocessing import LAYOUT_AXES, layout_order
from qconv.errors import Change, Finding, QconvError, Skipped
from qconv.ir.layers import (
    AFFINE_OPS,
    Float64,
    affine_data_input,
    check_finite,
    read_affine,
    read_layer,
    scale_inputs,
    write_layer,
)
from qconv.ir.model import (
    DataType,
    Model,
    Node,
    Value,
    attribute,
    dims,
    drop_attribute,
    permute_dims,
    set_attribute,
    set_dims,
)
from qconv.ir.rewriting import (
    EditRefused,
    describe_node,
    explicit_pads,
    reads_as_data,
    settled_pads,
    standard_op_type,
    title,
)
from qconv.passes import fold

FLOAT_TYPES = frozenset({DataType.FLOAT, DataType.FLOAT16, DataType.DOUBLE})
FOLDED_NORMALISATION = "normalisation of the pixels folded into"
LARGEST_PIXEL = 255
WHOLE_NUMBER_TOLERANCE = 1e-4  # pixels; how far from a whole number the rounding of means and scales may leave z


@dataclass(frozen=True, slots=True, eq=False)
class _InputTrace:
    """The last tensor that is affine in the pixels p: `value` is gain * p + shift, (C,) both, with axes in `order`."""

    value: Value
    order: tuple[int, ...]
    gain: Float64
    shift: Float64
    channel: int  # the axis of `value` that channels lie along
    shapes: tuple[tuple[Node, tuple[int, ...]], ...] = ()  # Shape nodes on the way, with the order of what they read

    @property
    def zero(self) -> Float64:
        """The pixel that becomes zero, by channel."""
        return -self.shift / self.gain


@dataclass(slots=True)
class _ModelHead:
    """The new nodes in front of the network. codes: the pixels, in the axes that the network works in."""

    model: Model
    name: str
    codes: Value
    exact: bool
    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> Value:
        self.nodes.append(node)
        return node.outputs[0]

    def insert(self) -> None:
        self.model.insert_first(*self.nodes)
        self.nodes.clear()


def embed_preprocessing(
    model: Model, preprocessing: Preprocessing, layout: Layout, *, exact: bool = False
) -> list[Finding]:
    """Rewrite a folded model in place so that its input takes uint8 pixels (N, C, H, W) or (N, H, W, C).

    preprocessing: of the model's float input. exact: no padding is rounded, for networks that will not run on 8-bit
    codes. Raises QconvError where the model returns its input.
    """
    pixels = model.graph.inputs[0]
    name = pixels.name or ""
    if pixels.is_graph_output():
        fact = f"The model returns its input '{name}', which cannot be pixels and normalised at once."
        raise QconvError(fact, "leave --embed-preprocessing out.")
    trace = _trace_input(model, pixels, preprocessing)
    readers = [node for node in model.readers(trace.value) if not _is_shape_node(model, node)]
    kind_of_data = trace.value.dtype
    head = _ModelHead(model, name, pixels, exact)
    _turn_input_to_pixels(head, trace, layout_order(preprocessing.layout, layout))
    if kind_of_data is not None and kind_of_data.is_integer():
        codes = head.codes
        if kind_of_data != DataType.UINT8:
            to = {"to": int(kind_of_data)}
            whole = model.build("Cast", [codes], name=f"{name}_whole", attributes=to, like=codes, dtype=kind_of_data)
            codes = head.add(whole)
        model.redirect(trace.value, codes, readers=readers)
        why = f"the network takes {str(kind_of_data).lower()} pixels and normalises them itself"
        found: list[Finding] = [Skipped("embed", name, why)]
    else:
        found = _normalise(head, trace, readers, kind_of_data or DataType.FLOAT)
    head.insert()
    model.sweep()
    return found


# -- what the network does to its input --------------------------------------------------------------------------------


def _trace_input(model: Model, pixels: Value, preprocessing: Preprocessing) -> _InputTrace:
    """Walk from the input over nodes that only change its type, its axes, or scale and shift its channels."""
    ones = np.ones(preprocessing.channels)
    std = np.asarray(preprocessing.std) * ones
    gain, shift = preprocessing.scale / std, -np.asarray(preprocessing.mean) / std
    trace = _InputTrace(pixels, (0, 1, 2, 3), gain, shift, LAYOUT_AXES[preprocessing.layout][0])
    while True:
        readers = model.readers(trace.value)
        looks = [node for node in readers if _is_shape_node(model, node)]
        trace = replace(trace, shapes=(*trace.shapes, *((node, trace.order) for node in looks)))
        others = [node for node in readers if node not in looks]
        if len(others) != 1 or others[0].graph is not model.graph or standard_op_type(others[0]) not in _STEPS:
            return trace
        (node,) = others
        try:
            after = _STEPS[standard_op_type(node)](node, trace)
        except EditRefused:
            return trace
        if node.outputs[0].is_graph_output() or not np.all(after.gain):
            return trace
        trace = replace(after, value=node.outputs[0])


def _is_shape_node(model: Model, node: Node) -> bool:
    return standard_op_type(node) == "Shape" and node.graph is model.graph


def _step_type(node: Node, trace: _InputTrace) -> _InputTrace:
    if standard_op_type(node) == "Cast" and attribute(node, "to") not in FLOAT_TYPES:
        raise EditRefused("it makes other numbers")
    return trace


def _step_axes(node: Node, trace: _InputTrace) -> _InputTrace:
    perm = attribute(node, "perm", [3, 2, 1, 0])
    return replace(trace, order=tuple(trace.order[axis] for axis in perm), channel=perm.index(trace.channel))


def _step_reshape(node: Node, trace: _InputTrace) -> _InputTrace:
    """(N, H, W, 1) to (N, 1, H, W) or back, which exporters write for a Transpose."""
    before, after = dims(trace.value), dims(node.outputs[0])
    if before is None or after is None or len(after) != 4 or before[trace.channel] != 1 or before.count(None) > 1:
        raise EditRefused("it does not only move the channel")
    rest = [axis for axis in range(4) if axis != trace.channel]
    lengths = [before[axis] for axis in rest]
    channel = next(
        (axis for axis in range(4) if after[axis] == 1 and after[:axis] + after[axis + 1 :] == lengths), None
    )
    if channel is None:
        raise EditRefused("it does not only move the channel")
    rest.insert(channel, trace.channel)
    return replace(trace, order=tuple(trace.order[axis] for axis in rest), channel=channel)


def _step_affine(node: Node, trace: _InputTrace) -> _InputTrace:
    if affine_data_input(node) is not trace.value or (
        standard_op_type(node) == "BatchNormalization" and trace.channel != 1
    ):
        raise EditRefused("it works on something else")
    own = read_affine(node, 4, trace.channel)
    if not {own.gain.size, own.shift.size} <= {1, trace.gain.size}:
        raise EditRefused("it makes more channels")
    return replace(trace, gain=trace.gain * own.gain, shift=trace.shift * own.gain + own.shift)


_STEPS: dict[str, Callable[[Node, _InputTrace], _InputTrace]] = {
    "Identity": _step_type,
    "Cast": _step_type,
    "Transpose": _step_axes,
    "Reshape": _step_reshape,
    "BatchNormalization": _step_affine,
    **{op_type: _step_affine for op_type, _ in AFFINE_OPS},
}


# -- the input becomes pixels ------------------------------------------------------------------------------------------


def _turn_input_to_pixels(head: _ModelHead, trace: _InputTrace, order: tuple[int, ...]) -> None:
    """Make the input uint8, with its old axes in `order`; `head.codes` gets the axes of the traced value."""
    model, pixels = head.model, head.codes
    permute_dims(pixels, pixels, order)
    pixels.dtype = DataType.UINT8
    for node, seen in trace.shapes:
        _preserve_shape(head, node, pixels, [order.index(axis) for axis in seen])
    perm = [order.index(axis) for axis in trace.order]
    if perm != sorted(perm):
        turn = model.build("Transpose", [pixels], name=f"{head.name}_turned", attributes={"perm": perm}, like=pixels)
        permute_dims(turn.outputs[0], pixels, perm)
        head.codes = head.add(turn)


def _preserve_shape(head: _ModelHead, node: Node, pixels: Value, perm: list[int]) -> None:
    """Keep the result of a Shape node: the lengths of axes `perm` of the pixels, or the part that it asks for."""
    wanted = perm[slice(attribute(node, "start", 0), attribute(node, "end"))]
    if perm == sorted(perm):
        head.model.set_input(node, 0, pixels)
        return
    lengths = head.model.build("Shape", [pixels], name=f"{head.name}_shape", dtype=DataType.INT64)
    indices = head.model.constant(f"{head.name}_axes", np.asarray(wanted, np.int64))
    head.model.become(node, "Gather", [head.add(lengths), indices])


# -- the normalisation -------------------------------------------------------------------------------------------------


def _normalise(head: _ModelHead, trace: _InputTrace, readers: list[Node], dtype: DataType) -> list[Finding]:
    """Give every reader of the traced value the same numbers, computed from pixels."""
    zero = np.clip(np.rint(trace.zero), 0, LARGEST_PIXEL)
    gain = trace.gain[0]
    alike = np.all(trace.gain == gain) and np.all(np.abs(trace.zero - zero[0]) < WHOLE_NUMBER_TOLERANCE)
    if dtype == DataType.FLOAT and alike and gain > 0:
        head.model.redirect(trace.value, _add_dequantizer(head, head.codes, gain, zero[0]), readers=readers)
        return [Change("embed", head.name, "its normalisation became scale and zero point of the pixels")]
    found: list[Finding] = []
    left, reasons = [], []
    for node in readers:
        try:
            found.append(_fold_into_conv(head, node, trace, dtype))
        except EditRefused as reason:
            left.append(node)
            reasons.append(str(reason))
    if left:
        found += _normalise_pixels(head, trace, left, dtype, "; ".join(dict.fromkeys(reasons)))
    return found


def _add_dequantizer(head: _ModelHead, codes: Value, scale: float, zero: float) -> Value:
    inputs, name = [codes, *_make_quantization_constants(head.model, scale, zero)], f"{head.name}_pixels"
    return head.add(head.model.build("DequantizeLinear", inputs, name=name, like=codes, dtype=DataType.FLOAT))


def _make_quantization_constants(model: Model, scale: float, zero: float) -> tuple[Value, Value]:
    return (
        model.constant("scale", np.asarray(scale, np.float32)),
        model.constant("zero_point", np.asarray(zero, np.uint8)),
    )


def _fold_into_conv(head: _ModelHead, conv: Node, trace: _InputTrace, dtype: DataType) -> Change:
    """Let a Conv read pixels. Raises EditRefused before anything is changed."""
    if standard_op_type(conv) != "Conv" or dtype != DataType.FLOAT or not reads_as_data(conv, trace.value, head.model):
        raise EditRefused(f"{describe_node(conv)} reads the pixels")
    if trace.channel != 1:
        raise EditRefused(f"{describe_node(conv)} has its inputs along another axis")
    layer = read_layer(conv)
    zero = np.rint(trace.zero)
    pads = explicit_pads(conv, 2)
    padded = pads is None or any(pads)
    if padded and not (zero.min() >= 0 and zero.max() <= LARGEST_PIXEL):
        raise EditRefused(f"{describe_node(conv)} pads with zeros, which no pixel stands for")
    if padded and head.exact and np.any(np.abs(trace.zero - zero) > WHOLE_NUMBER_TOLERANCE):
        raise EditRefused(f"{describe_node(conv)} pads with zeros, between two pixels, and runs in float all the same")
    widths = settled_pads(conv, head.codes) if padded and np.ptp(zero) else None
    # Where the layer itself pads, all channels have this code. Elsewhere any would do: in the middle, what rounding
    # does to the weights is not multiplied by the mean of all pixels.
    middle = float(np.clip(np.rint(zero.mean()), 0, LARGEST_PIXEL))
    layer = scale_inputs(layer, trace.gain, trace.shift + trace.gain * middle)
    check_finite(layer)
    write_layer(head.model, layer)
    codes = head.codes
    if widths is not None:
        codes = _pad_with_border(head, zero.astype(np.uint8), widths)
        drop_attribute(conv, "auto_pad")
        set_attribute(conv, "pads", [0, 0, 0, 0])
    head.model.set_input(conv, 0, _add_dequantizer(head, codes, 1.0, middle))
    border = f", which pads with pixels [{', '.join(f'{code:g}' for code in zero)}]" if padded else ""
    return Change(
        "embed", title(conv), f"{FOLDED_NORMALISATION} it{border}", f"{FOLDED_NORMALISATION} the first Conv{border}"
    )


def _pad_with_border(head: _ModelHead, zero: NDArray[np.uint8], widths: list[int]) -> Value:
    """Pad the pixels with one code a channel."""
    model, count = head.model, len(zero)
    top, left, bottom, right = widths
    around = model.constant(f"{head.name}_border", np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
    ones = model.constant(f"{head.name}_split", np.ones(count, np.int64))
    name = f"{head.name}_channel"
    split = model.build("Split", [head.codes, ones], name=name, attributes={"axis": 1}, like=head.codes, count=count)
    head.add(split)
    sizes = dims(head.codes) or [None] * 4
    plane = [sizes[0], 1, *sizes[2:]]
    more = (top + bottom, left + right)
    grown = [None if size is None else size + extra for size, extra in zip(sizes[2:], more, strict=True)]
    bordered = []
    for part, code in zip(split.outputs, zero, strict=True):
        set_dims(part, plane)
        fill = model.constant(f"{head.name}_border_code", code)
        pad = model.build("Pad", [part, around, fill], name=f"{name}_padded", like=part)
        set_dims(pad.outputs[0], [sizes[0], 1, *grown])
        bordered.append(head.add(pad))
    name = f"{head.name}_padded"
    joined = model.build("Concat", bordered, name=name, attributes={"axis": 1}, like=head.codes)
    set_dims(joined.outputs[0], [sizes[0], count, *grown])
    return head.add(joined)


def _normalise_pixels(
    head: _ModelHead, trace: _InputTrace, readers: list[Node], dtype: DataType, why: str
) -> list[Finding]:
    """Scale and shift the pixels in front of some readers, and fold that as far as `fold` can."""
    model, name = head.model, head.name
    cast = model.build("Cast", [head.codes], name=f"{name}_float", attributes={"to": int(dtype)}, like=head.codes)
    cast.outputs[0].dtype = dtype
    data = head.add(cast)
    along = [-1 if axis == trace.channel else 1 for axis in range(4)]

    def numbers(wish: str, values: Float64) -> Value:
        return model.constant(f"{name}_{wish}", values.reshape(along).astype(dtype.numpy()))

    scaled = model.build("Mul", [data, numbers("gain", trace.gain)], name=f"{name}_scaled", like=data)
    shifted = model.build(
        "Add", [head.add(scaled), numbers("shift", trace.shift)], name=f"{name}_normalised", like=scaled.outputs[0]
    )
    model.redirect(trace.value, head.add(shifted), readers=readers)
    head.insert()
    layers = _fold_into_next_layers(model)
    rest = [node for node in (scaled, shifted) if node.graph is not None]
    if not rest and dtype == DataType.FLOAT:
        model.become(cast, "DequantizeLinear", [head.codes, *_make_quantization_constants(model, 1.0, 0.0)])
    if not rest:
        return [
            Change("embed", layer, f"{FOLDED_NORMALISATION} it", f"{FOLDED_NORMALISATION} the first layer")
            for layer in layers
        ]
    # Sub and Div: unlike Mul and Add they are not taken for work that is worth quantizing its data first
    if shifted in rest:
        model.become(scaled, "Sub", [data, numbers("mean", trace.zero)])
        model.become(shifted, "Div", [scaled.outputs[0], numbers("std", 1 / trace.gain)])
    else:
        model.become(scaled, "Div", [data, numbers("std", 1 / trace.gain)])
    return [Skipped("embed", name, f"normalised in float: {why}")]


def _fold_into_next_layers(model: Model) -> list[str]:
    """Move scales and shifts into the layers behind. Returns the names of these layers."""
    layers: dict[str, None] = {}
    while True:
        done = [finding.where for finding in fold.fold_affine(model) if isinstance(finding, Change)]
        if not done:
            return list(layers)
        layers |= dict.fromkeys(done)
