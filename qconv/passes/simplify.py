"""These passes rewrite the float graph without changing a number: they drop no-ops, and unify spellings of one thing.

    Sum(a, b) = Add(a, b)    x / c = x * (1 / c)    mean over H and W = GlobalAveragePool
    Relu(MaxPool(x)) = MaxPool(Relu(x))             zero Pad, then Conv = padded Conv

Runtimes have integer kernels for one spelling only, and `fold` finds its layers behind it. Each pass takes the model
and returns what it changed and, with the reason, what it refused to change. Weights are changed in `fold`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

import numpy as np

from qconv.errors import Change
from qconv.ir.gelu import find_gelu
from qconv.ir.layers import check_finite, read_layer, scale_outputs, write_layer
from qconv.ir.model import (
    DataType,
    Model,
    Node,
    Value,
    attribute,
    clip_bounds,
    constant_array,
    constant_scalar,
    dims,
    drop_attribute,
    input_of,
    rank,
    set_attribute,
    set_dims,
)
from qconv.ir.operators import operator
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
from qconv.passes.every_axis import fence_from_transposes, pad_every_axis, resize_every_axis
from qconv.planning.saturating_line import find_saturating_line


def _bypass(model: Model, node: Node) -> None:
    if not model.bypass(node):
        raise EditRefused("the model returns its output under a name that must stay")


# -- no-ops and spellings ----------------------------------------------------------------------------------------------


@each_node("simplify", "Identity", "Dropout")
def drop_identities(model: Model, node: Node) -> list[Change]:
    """Remove Identity, and Dropout, which does nothing after training."""
    if standard_op_type(node) == "Dropout":
        training = input_of(node, 2)
        if not uses_only_first_output(node):
            raise EditRefused("its mask is used")
        if training is not None and constant_scalar(training) != 0:
            raise EditRefused("it runs in training mode")
    _bypass(model, node)
    return [Change("simplify", title(node), f"{node.op_type} removed")]


@each_node("simplify", "Sum")
def sum_to_add(model: Model, node: Node) -> list[Change]:
    """Replace a Sum of two by an Add, and remove a Sum of one."""
    if len(node.inputs) == 1:
        _bypass(model, node)
        return [Change("simplify", title(node), "Sum of one tensor removed")]
    if len(node.inputs) != 2:
        return []
    model.become(node, "Add", list(node.inputs))
    return [Change("simplify", title(node), "Sum became Add")]


@each_node("simplify", "Pad")
def merge_pads(model: Model, node: Node) -> list[Change]:
    """Move zero padding of height and width into the Convs that read it."""
    output = node.outputs[0]
    convs = model.readers(output)
    if not any(standard_op_type(conv) == "Conv" for conv in convs):
        return []
    widths = _spatial_padding(node)
    if output.is_graph_output():
        raise EditRefused("the model returns its output")
    own = []
    for conv in convs:
        if standard_op_type(conv) != "Conv" or not reads_as_data(conv, output, model):
            raise EditRefused(f"{describe_node(conv)} reads it too")
        pads = explicit_pads(conv, len(widths) // 2)
        if pads is None:
            raise EditRefused(f"{describe_node(conv)} computes its own padding (auto_pad)")
        own.append(pads)
    for conv, pads in zip(convs, own, strict=True):
        drop_attribute(conv, "auto_pad")
        set_attribute(conv, "pads", [a + b for a, b in zip(pads, widths, strict=True)])
        model.set_input(conv, 0, data_input(node))
    model.remove(node)
    summed_up = "Pad became the padding of what reads it"
    return [Change("simplify", title(conv), f"{describe_node(node)} became its padding", summed_up) for conv in convs]


def _spatial_padding(node: Node) -> list[int]:
    """The padding of height and width by a Pad: all beginnings, then all ends."""
    value, widths = input_of(node, 2), constant_array(input_of(node, 1))
    if attribute(node, "mode", "constant") != "constant" or (value is not None and constant_scalar(value) != 0):
        raise EditRefused("it does not pad with zeros")
    if widths is None:
        raise EditRefused("its widths are computed")
    if input_of(node, 3) is not None:
        raise EditRefused("its axes are computed, or the rank of its data is not known")
    full = widths.reshape(2, -1)  # (begin and end, axes)
    if full[:, :2].any():
        raise EditRefused("it pads more than height and width")
    if (full < 0).any():
        raise EditRefused("it crops")
    return [int(width) for width in full[:, 2:].reshape(-1)]


@each_node("simplify", "ReduceMean")
def mean_to_pool(model: Model, node: Node) -> list[Change]:
    """Replace the mean over H and W of (N, C, H, W) by GlobalAveragePool, with a Flatten for a result (N, C)."""
    data, given = data_input(node), input_of(node, 1)
    axes = attribute(node, "axes") if given is None else constant_array(given)
    if axes is None or data.dtype != DataType.FLOAT or rank(data) not in (4, None):
        return []
    if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return []
    if rank(data) is None:
        raise EditRefused("the rank of its data is not known")
    if attribute(node, "keepdims", 1):
        model.become(node, "GlobalAveragePool", [data])
    else:
        pool = model.build("GlobalAveragePool", [data], name=f"{title(node)}_pool", like=data)
        model.insert_before(node, pool)
        set_dims(pool.outputs[0], [*(dims(data) or [])[:2], 1, 1])
        model.become(node, "Flatten", pool.outputs, {"axis": 1})
    return [Change("simplify", title(node), "ReduceMean over height and width became GlobalAveragePool")]


@each_node("simplify", "AveragePool")
def unify_pad_counting(model: Model, node: Node) -> list[Change]:
    """Clear count_include_pad where nothing is padded: it makes no difference except to the integer kernel."""
    if not attribute(node, "count_include_pad", 0) or any(attribute(node, "pads", [])):
        return []
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return []
    drop_attribute(node, "count_include_pad")
    return [Change("simplify", title(node), "count_include_pad dropped: nothing is padded")]


@each_node("simplify", "AveragePool")
def whole_average_to_pool(model: Model, node: Node) -> list[Change]:
    """Replace an AveragePool whose window is the whole map by GlobalAveragePool."""
    kernel, sizes = attribute(node, "kernel_shape"), dims(data_input(node))
    pads = explicit_pads(node, len(kernel))
    if sizes is None or sizes[2:] != kernel or pads is None or any(pads):
        return []
    if any(step != 1 for step in attribute(node, "dilations", [])):
        return []
    model.become(node, "GlobalAveragePool", [data_input(node)])
    return [Change("simplify", title(node), "AveragePool over the whole map became GlobalAveragePool")]


@each_node("simplify", "MatMul")
def matmul_to_gemm(model: Model, node: Node) -> list[Change]:
    """Replace a MatMul of (N, K) and a constant (K, M) by a Gemm, which can have a bias."""
    data, weight = data_input(node), node.inputs[1]
    numbers = constant_array(weight)
    if numbers is None or numbers.ndim != 2 or numbers.dtype != np.float32 or rank(data) != 2:
        return []
    model.become(node, "Gemm", [data, weight])
    return [Change("simplify", title(node), "MatMul with constant weights became Gemm")]


@each_node("simplify", "Div", "Sub")
def divide_by_multiplying(model: Model, node: Node) -> list[Change]:
    """Replace x / c by x * (1 / c), and x - c by x + (-c): Mul and Add have integer kernels, Div and Sub have none.

    Erf has none, either: x / sqrt(2) in front of it stays, as a Gelu has it.
    """
    if any(reader.op_type == "Erf" for reader in model.readers(node.outputs[0])):
        return []
    data, numbers = data_input(node), constant_array(node.inputs[1])
    # Tensors with fewer than two axes may be sizes on their way to a Floor, where the last bit of a quotient counts.
    if numbers is None or numbers.dtype != np.float32 or (rank(data) or 0) < 2:
        return []
    if standard_op_type(node) == "Sub":
        model.become(node, "Add", [data, model.constant(f"{title(node)}_negated", -numbers)])
        return [Change("simplify", title(node), "Sub of a constant became Add")]
    with np.errstate(divide="ignore", over="ignore"):
        factor = (1 / numbers.astype(np.float64)).astype(np.float32)
    if not np.isfinite(factor).all():
        raise EditRefused("it divides by zero, or by a number too small to invert")
    model.become(node, "Mul", [data, model.constant(f"{title(node)}_factor", factor)])
    return [Change("simplify", title(node), "Div by a constant became Mul")]


@each_node("simplify", "Erf")
def unify_gelus(model: Model, node: Node) -> list[Change]:
    """Write a Gelu as ONNX Runtime knows it: x divided by sqrt(2), and 1 + erf multiplied by x before it is halved."""
    gelu = find_gelu(model, node)
    if gelu is None:
        return []
    root, half = np.array(2**0.5, np.float32), np.array(0.5, np.float32)
    divided = gelu.inner.op_type == "Div" and constant_scalar(gelu.inner.inputs[1]) == float(root)
    if divided and gelu.halving.op_type == "Mul" and not gelu.is_halved_between:
        return []
    if not divided:
        model.become(gelu.inner, "Div", [gelu.data, model.constant(f"{title(gelu.inner)}_root", root)])
    if gelu.is_halved_between:
        model.become(gelu.product, "Mul", [gelu.data, gelu.plus_one.outputs[0]])
    if gelu.is_halved_between or gelu.halving.op_type == "Div":
        last = gelu.outer if gelu.is_halved_between else gelu.halving
        halved = gelu.product.outputs[0] if gelu.is_halved_between else data_input(last)
        model.become(last, "Mul", [halved, model.constant(f"{title(last)}_half", half)])
    return [Change("simplify", title(gelu.outer), "Gelu written as runtimes know it")]


@each_node("simplify", "HardSwish")
def open_hard_swishes(model: Model, node: Node) -> list[Change]:
    """Replace HardSwish by x * HardSigmoid(x): ONNX Runtime runs it so anyway, and both have kernels for codes."""
    data = data_input(node)
    gate = model.build(
        "HardSigmoid", [data], name=f"{title(node)}_gate", attributes={"alpha": 1 / 6, "beta": 0.5}, like=data
    )
    model.insert_before(node, gate)
    model.become(node, "Mul", [data, gate.outputs[0]])
    return [Change("simplify", title(node), "HardSwish became a Mul with its gate")]


@each_node("simplify", "HardSigmoid")
def clip_at_layers(model: Model, node: Node) -> list[Change]:
    """Replace the HardSigmoid that alone reads a layer by a Clip to 0 and 1; the layer's weights take its line.

    The quantizer behind the layer then does it, as it does any Clip.
    """
    data, line = data_input(node), find_saturating_line(node)
    before = data.producer()
    layered = before is not None and standard_op_type(before) in ("Conv", "ConvTranspose", "Gemm")
    if before is None or not layered or line is None or model.sole_reader(data) is not node:
        return []
    layer = scale_outputs(read_layer(before), np.array([line.slope]), np.array([line.shift]))
    check_finite(layer)
    write_layer(model, layer)
    ends = [model.constant(f"{title(node)}_{end:.0f}", np.array(end, np.float32)) for end in (0.0, 1.0)]
    model.become(node, "Clip", [data, *ends])
    return [Change("simplify", title(node), f"HardSigmoid became a Clip of {describe_node(before)}")]


# -- Relu and Clip -----------------------------------------------------------------------------------------------------


@each_node("simplify", "Relu", "Clip")
def merge_activations(model: Model, node: Node) -> list[Change]:
    """Remove the wider of two activations in a row, and replace Clip(0, infinity) by Relu."""
    span, before = clip_bounds(node), data_input(node).producer()
    if span is None:
        return []
    inner = None if before is None else clip_bounds(before)
    if span == (-inf, inf) or (inner is not None and _is_within(inner, span)):
        _bypass(model, node)
        return [Change("simplify", title(node), f"{node.op_type} removed: it cuts nothing off")]
    if (
        before is not None
        and inner is not None
        and _is_within(span, inner)
        and model.sole_reader(data_input(node)) is node
    ):
        _bypass(model, before)
        summed_up = f"{before.op_type} removed: the next cuts off more"
        return [
            Change(
                "simplify", title(before), f"{before.op_type} removed: {describe_node(node)} cuts off more", summed_up
            )
        ]
    if standard_op_type(node) == "Clip" and span == (0.0, inf):
        model.become(node, "Relu", [data_input(node)])
        return [Change("simplify", title(node), "Clip at zero became Relu")]
    return []


def _is_within(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


@each_node("hoist", "Relu", "Clip")
def hoist_activations(model: Model, node: Node) -> list[Change]:
    """Move a Relu or Clip to before a node that only moves values, next to its layer; before Concat copy it."""
    mover = data_input(node).producer()
    if clip_bounds(node) is None or mover is None or not _is_value_moving(mover):
        return []
    if model.sole_reader(mover.outputs[0]) is not node or not uses_only_first_output(mover):
        raise EditRefused(f"something else reads {describe_node(mover)}")
    moved = [v for v in mover.inputs if v is not None] if standard_op_type(mover) == "Concat" else [data_input(mover)]
    for value in moved:
        producer = value.producer()
        if producer is None or not operator(standard_op_type(producer)).absorbs_activation:
            raise EditRefused(f"no layer before {describe_node(mover)} could absorb it")
        if model.sole_reader(value) is not mover:
            raise EditRefused(f"something else reads {describe_node(producer)}")
    if not model.take_over(node.outputs[0], mover.outputs[0]):
        raise EditRefused("the model returns its output under a name that must stay")
    for index, copy in enumerate(_copy_activation(model, node, moved)):
        model.set_input(mover, index, copy.outputs[0])
        model.insert_before(mover, copy)
    return [Change("hoist", title(node), f"{node.op_type} moved before {describe_node(mover)}")]


def _copy_activation(model: Model, node: Node, values: Iterable[Value]) -> Iterator[Node]:
    """Yield the activation itself for the first value, and copies of it for the others."""
    for index, value in enumerate(values):
        if index == 0:
            model.set_input(node, 0, value)
            set_dims(node.outputs[0], dims(value))
            yield node
        else:
            yield model.build(node.op_type, [value, *node.inputs[1:]], name=title(node), like=value)


def _is_value_moving(node: Node) -> bool:
    """Whether each number of the output is one of the input's, or the greatest of some."""
    if standard_op_type(node) != "Resize":
        return operator(standard_op_type(node)).moves_values
    frame = attribute(node, "coordinate_transformation_mode", "half_pixel")
    return bool(attribute(node, "mode", "nearest") == "nearest" and frame != "tf_crop_and_resize")


SIMPLIFY_PASSES: tuple[Pass, ...] = (
    drop_identities,
    sum_to_add,
    pad_every_axis,
    resize_every_axis,
    fence_from_transposes,
    merge_pads,
    mean_to_pool,
    whole_average_to_pool,
    unify_pad_counting,
    matmul_to_gemm,
    merge_activations,
    hoist_activations,
    unify_gelus,
)
