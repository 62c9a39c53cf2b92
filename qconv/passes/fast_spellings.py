"""These passes write what ONNX Runtime's CPU provider is slow at as what it is fast at, for it alone.

    GlobalMaxPool = MaxPool of the whole map        Slice with steps = MaxPool of 1x1

No number changes. Its integer kernels work on the layout of convolutions, so most passes ask whether layers make what
is read. What has another operator's weights (`ir.fast_pools`, `ir.fast_normalization`) is written last.
"""

from __future__ import annotations

from qconv.errors import Change
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, set_attribute
from qconv.ir.rewriting import (
    FARTHEST_ENDS,
    EditRefused,
    Pass,
    data_input,
    each_node,
    slices_of,
    standard_op_type,
    title,
    whole_factors,
)

HALF_PIXEL = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")
"""Frames of Resize that are one by whole factors; that of PyTorch differs in outputs of length 1 alone."""

LAYOUT_KEEPING_OPS = frozenset(
    {"Relu", "Clip", "Add", "Mul", "Sigmoid", "LeakyRelu", "HardSigmoid", "MaxPool", "Pad", "Concat"}
)


@each_node("simplify", "GlobalMaxPool")
def whole_maximum_to_pool(model: Model, node: Node) -> list[Change]:
    """Replace a GlobalMaxPool of what layers make by a MaxPool of the whole map, which has an integer kernel.

    On codes that no layer has written that kernel is slow, see `planning.placement`.
    """
    data = data_input(node)
    sizes = (dims(data) or [None])[2:]
    if len(sizes) != 2 or None in sizes or not _is_made_by_layers(data):
        return []
    model.become(node, "MaxPool", [data], {"kernel_shape": [int(size or 0) for size in sizes]})
    return [Change("simplify", title(node), "GlobalMaxPool became a MaxPool of the whole map")]


@each_node("simplify", "Slice")
def steps_to_pool(model: Model, node: Node) -> list[Change]:
    """Replace Slices that take each n-th place of a map that layers make by a MaxPool of single places.

    Its integer kernel works on the layout of convolutions, and one node does both axes.
    """
    strides, data = _strides_of(node), data_input(node)
    before = data.producer()
    if strides is None or any(_strides_of(reader) for reader in model.readers(node.outputs[0])):
        return []
    if before is not None and (more := _strides_of(before)) is not None and model.sole_reader(data) is node:
        strides, data = [a * b for a, b in zip(strides, more, strict=True)], data_input(before)
    if not _is_made_by_layers(data):
        return []
    model.become(node, "MaxPool", [data], {"kernel_shape": [1, 1], "strides": strides})
    model.sweep()
    return [Change("simplify", title(node), "Slice of each n-th place became a MaxPool of single places")]


@each_node("simplify", "Resize")
def take_first_of_block(model: Model, node: Node) -> list[Change]:
    """Write a nearest neighbour Resize by whole factors f as floor(i / f), of which ONNX Runtime has fast kernels.

    (i + 0.5) / f - 0.5 rounded is the same for each i: it lies between i // f - 0.5 and i // f + 0.5, at neither end.
    """
    frame = attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    if attribute(node, "mode", "nearest") != "nearest" or frame not in HALF_PIXEL or not rounding.startswith("round"):
        return []
    if whole_factors(node) is None:
        return []
    set_attribute(node, "coordinate_transformation_mode", "asymmetric")
    set_attribute(node, "nearest_mode", "floor")
    return [Change("simplify", title(node), "Resize by whole factors takes the first of each block")]


def _strides_of(node: Node) -> list[int] | None:
    """The steps of a Slice of (N, C, H, W) that takes each n-th place from the first on; None for any other node."""
    sizes = dims(node.inputs[0]) if standard_op_type(node) == "Slice" and node.inputs[0] is not None else None
    if sizes is None or len(sizes) != 4:
        return None
    try:
        parts = slices_of(node, 4)
    except EditRefused:
        return None
    if not {2, 3}.issuperset(parts) or all(step == 1 for _, _, step in parts.values()):
        return None
    for axis, (start, end, step) in parts.items():
        size = sizes[axis]
        if start != 0 or step < 1 or not (end in FARTHEST_ENDS or (size is not None and end >= size)):
            return None
    return [parts[axis][2] if axis in parts else 1 for axis in (2, 3)]


def _is_made_by_layers(value: Value) -> bool:
    """Whether a map comes from convolutions, through operators that keep their layout."""
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop().producer()
        if node is None or standard_op_type(node) not in LAYOUT_KEEPING_OPS | {"Conv"}:
            return False
        if standard_op_type(node) != "Conv":
            before = [v for v in node.inputs if v is not None and v not in seen and constant_array(v) is None]
            waiting += before
            seen.update(before)
    return True


FAST_SPELLINGS: tuple[Pass, ...] = (whole_maximum_to_pool, steps_to_pool, take_first_of_block)
