"""Builds graph passes out of edits of single nodes, and tells which channels operators hand on.

An edit takes the model and a node. It returns what it changed, nothing where there was nothing to do, or raises
`EditRefused` before it has changed anything. `each_node` makes a pass of it, and a `Skipped` of every refusal. The
channel functions (Slice, Split, Pad, flatten; channels along axis 1) raise EditRefused where the graph does not tell.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change, Finding, Skipped
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, rank

Pass = Callable[[Model], list[Finding]]

Edit = Callable[[Model, Node], list[Change]]


class EditRefused(Exception):
    """Raised by an edit, before it has changed anything, with the reason why it cannot be done."""


def each_node(step: str, *op_types: str) -> Callable[[Edit], Pass]:
    """Make a pass out of an edit: try it on every node of these types, and record what it did or why it refused."""

    def as_pass(edit: Edit) -> Pass:
        def run(model: Model) -> list[Finding]:
            found: list[Finding] = []
            for node in model.nodes():
                if node.graph is None or standard_op_type(node) not in op_types:  # an earlier edit may have removed it
                    continue
                try:
                    found += edit(model, node)
                except EditRefused as reason:
                    found.append(Skipped(step, title(node), str(reason)))
            return found

        run.__name__, run.__doc__ = edit.__name__, edit.__doc__
        return run

    return as_pass


def standard_op_type(node: Node) -> str:
    """The type of a standard operator; empty for operators of other domains."""
    return node.op_type if node.domain == "" else ""


def title(node: Node) -> str:
    """The name, which loading gives to every node but those in bodies of If and Loop."""
    return node.name or node.outputs[0].name or ""


def describe_node(node: Node) -> str:
    """A node as messages speak of it: `Conv conv1`."""
    return f"{node.op_type} {title(node)}"


def data_input(node: Node) -> Value:
    """The first input, which every operator here has."""
    value = node.inputs[0]
    assert value is not None
    return value


def reads_as_data(node: Node, value: Value, model: Model) -> bool:
    """Whether `node` reads `value` as its first input and nowhere else. Nodes in bodies of If and Loop do not count."""
    return node.graph is model.graph and [i for i, v in enumerate(node.inputs) if v is value] == [0]


def uses_only_first_output(node: Node) -> bool:
    """Whether only the first output is used."""
    return not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def explicit_pads(node: Node, axes: int) -> list[int] | None:
    """Padding of a Conv or pool over `axes` spatial axes, all beginnings first; None for auto_pad=SAME."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        return None
    return [0] * (2 * axes) if auto == "VALID" else attribute(node, "pads") or [0] * (2 * axes)


def settled_pads(conv: Node, data: Value) -> list[int]:
    """Padding of a Conv that reads `data`, all beginnings first; auto_pad=SAME as it comes out for the size of these.

    Raises EditRefused where the weights are computed, or where the padding depends on a size that is open.
    """
    weight = constant_array(conv.inputs[1])
    if weight is None:
        raise EditRefused(f"the weights of {describe_node(conv)} are computed")
    kernel = weight.shape[2:]
    pads = explicit_pads(conv, len(kernel))
    if pads is not None:
        return pads
    ones = [1] * len(kernel)
    strides, dilations = attribute(conv, "strides", ones), attribute(conv, "dilations", ones)
    sizes = (dims(data) or [None] * (2 + len(kernel)))[2:]
    before, after = [], []
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if size is None and stride != 1:
            raise EditRefused(f"{describe_node(conv)} pads as its input's size asks for (auto_pad), which is open")
        reach = (length - 1) * dilation
        over = 1 if stride == 1 or size is None else size - (-(-size // stride) - 1) * stride
        total = max(reach + 1 - over, 0)
        begin = (total + (attribute(conv, "auto_pad") == "SAME_LOWER")) // 2
        before.append(begin)
        after.append(total - begin)
    return before + after


FARTHEST_ENDS = (2**31 - 1, 2**63 - 1)
"""Ends of a Slice that ONNX Runtime takes for the far end in either direction."""


def slices_of(node: Node, axis_count: int | None) -> dict[int, tuple[int, int, int]]:
    """Starts, ends and steps of a Slice along axes, for `sliced_places`; of the others it keeps all.

    axis_count: of its data, None where it is unknown. Raises EditRefused for what is computed.
    """
    given = [constant_array(input_of(node, index)) for index in range(1, 5)]
    starts, ends, axes, steps = given
    if starts is None or ends is None or any(n is None and input_of(node, i + 1) for i, n in enumerate(given)):
        raise EditRefused("a Slice's places are computed")
    along = list(range(len(starts))) if axes is None else axes.tolist()
    if axis_count is None and any(axis < 0 for axis in along):
        raise EditRefused("the rank of a Slice's data is not known")
    every = [1] * len(along) if steps is None else steps.tolist()
    return {
        axis if axis >= 0 else axis + (axis_count or 0): (start, end, step)
        for axis, start, end, step in zip(along, starts.tolist(), ends.tolist(), every, strict=True)
    }


def sliced_places(part: tuple[int, int, int], size: int) -> NDArray[np.int64]:
    """The places along an axis of this size that a Slice keeps, as ONNX Runtime takes its start, end and step.

    Backwards an end of INT64_MAX or INT32_MAX is the front, and so is a start before it, unlike in Python and in onnx's
    reference: findings/onnxruntime-slices-backwards-from-before-the-front.sh.
    """
    start, end, step = part
    if step < 0:
        start = max(start, -size)
        end = -size - 1 if end in FARTHEST_ENDS else end
    return np.arange(size)[start:end:step]


def sliced_channels(node: Node, count: int) -> NDArray[np.int64]:
    """The channels, out of `count`, that a Slice keeps."""
    part = slices_of(node, rank(data_input(node))).get(1)
    return np.arange(count) if part is None else sliced_places(part, count)


def split_channels(node: Node, count: int) -> list[NDArray[np.int64]]:
    """The channels, out of `count`, that each output of a Split has; all of them where it splits places."""
    kept = np.arange(count)
    axis = attribute(node, "axis", 0) % (rank(data_input(node)) or 1)
    if axis != 1:
        return [kept for _ in node.outputs]
    sizes = [(dims(value) or [None, None])[1] for value in node.outputs]
    if any(size is None for size in sizes) or sum(size or 0 for size in sizes) != count:
        raise EditRefused("it is not known how a Split parts the channels")
    return np.split(kept, np.cumsum([size or 0 for size in sizes])[:-1])


def padded_channels(node: Node) -> tuple[int, int]:
    """How many channels of zeros a Pad adds before and behind those of its input.

    Places are padded with zeros, or with copies of others.
    """
    pads, fill = constant_array(input_of(node, 1)), input_of(node, 2)
    filled = constant_array(fill)
    if pads is None or input_of(node, 3) is not None or (fill is not None and filled is None):
        raise EditRefused("a Pad's sizes are computed")
    constant = attribute(node, "mode", "constant") == "constant"
    if constant and filled is not None and filled.any():
        raise EditRefused("a Pad fills with other numbers than zero")
    before, behind = int(pads[1]), int(pads[len(pads) // 2 + 1])
    if (before or behind) and (not constant or min(before, behind) < 0):
        raise EditRefused("a Pad copies or drops channels")
    return before, behind


def features_per_channel(model: Model, node: Node) -> int:
    """The features of each channel, side by side, where (N, C, H, W) is flattened to (N, C * H * W)."""
    sizes = dims(data_input(node))
    features = _count_features(model, node.outputs[0])
    if sizes is None or None in sizes[1:] or features != prod(size or 0 for size in sizes[1:]):
        raise EditRefused(f"{node.op_type} may mix channels")
    return prod(size or 0 for size in sizes[2:])


def _count_features(model: Model, value: Value) -> int:
    """The second of two axes, which a Gemm that reads it knows best; 0 where that is not its shape."""
    for reader in model.readers(value):
        if standard_op_type(reader) == "Gemm" and reader.inputs[0] is value:
            sizes = dims(reader.inputs[1]) or [None, None]  # type: ignore[arg-type]
            return sizes[1 if attribute(reader, "transB", 0) else 0] or 0
    sizes = dims(value) or []
    return (sizes[1] or 0) if len(sizes) == 2 else 0


def check_reduces_spatial_axes(node: Node) -> None:
    """Raise EditRefused for a reduction over channels or images."""
    given, numbers, own = attribute(node, "axes"), constant_array(input_of(node, 1)), rank(data_input(node))
    axes = given if given is not None else None if numbers is None else numbers.tolist()
    if own is None or axes is None or any(axis % own < 2 for axis in axes):
        raise EditRefused(f"{node.op_type} may mix channels")


def whole_factors(node: Node) -> list[int] | None:
    """The whole numbers that a Resize multiplies the length of each axis by; None where they are others, or unknown."""
    scales, before, after = constant_array(input_of(node, 2)), dims(data_input(node)), dims(node.outputs[0])
    if attribute(node, "axes") is not None or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    if scales is None or not scales.size:
        sizes = constant_array(input_of(node, 3))
        after = after if sizes is None else sizes.tolist()
        if before is None or after is None or len(before) != len(after) or not all((*before, *after)):
            return None
        scales = np.array([new / old for new, old in zip(after, before, strict=True)])
    factors = np.rint(scales)
    return [int(factor) for factor in factors] if np.array_equal(factors, scales) and factors.min() >= 1 else None
