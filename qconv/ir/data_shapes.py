"""Finds the tensors whose shapes depend on the numbers that are fed, from the graph alone.

A detector picks boxes by their scores, so that how many there are is another number on every picture, and in the
quantized network; there may be none. A tensor's *content* depends on the data if it is computed from the model's inputs
by anything but Shape and Size. Its *shape* does so behind an operator that selects (NonZero, Compress ...), where
content that depends on the data says how large a result is (Slice, TopK, Expand ...), and behind any such tensor.
"""

from __future__ import annotations

from qconv.ir.model import Model, Node, Value, constant_array, is_tensor, nodes_inside, values_read_by

SELECTING_OPS = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression", "StringSplit"})

SIZED_BY_INPUT = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "TopK", "Split", "Pad", "OneHot", "Squeeze", "CenterCropPad"), (1,)),
    **{"Slice": (1, 2, 3, 4), "Range": (0, 1, 2), "Col2Im": (1, 2), "MaxUnpool": (2,), "DFT": (1,), "STFT": (1, 3)},
    **dict.fromkeys(("Resize", "Upsample"), (1, 2, 3)),
    **dict.fromkeys(("ConstantOfShape", "BlackmanWindow", "HannWindow", "HammingWindow"), (0,)),
}
"""Inputs whose content says how large the result is, by operator."""


def find_data_shaped(model: Model) -> set[Value]:
    """The tensors of the main graph whose shapes depend on the data, or may do so: bodies may return any shape."""
    return _follow_data(model)[1]


def find_data_dependent(model: Model) -> set[Value]:
    """The tensors of the main graph whose content depends on the data."""
    return _follow_data(model)[0]


def _follow_data(model: Model) -> tuple[set[Value], set[Value]]:
    content = {value for value in model.graph.inputs if constant_array(value) is None}
    shaped: set[Value] = set()
    for node in model.nodes():
        read = values_read_by(node)
        known = node.domain == "" and node.op_type in ("Shape", "Size")
        if any(value in shaped for value in read):
            (content if known else shaped).update(node.outputs)
        if not known and any(value in content for value in read):
            content.update(node.outputs)
            if _selects(node, content):
                shaped.update(node.outputs)
    return content, shaped


def _selects(node: Node, content: set[Value]) -> bool:
    """Whether a node makes a shape of the data. content: the tensors whose content depends on them."""
    if nodes_inside(node) or not all(map(is_tensor, node.outputs)):
        return True
    if node.domain != "":
        return False
    if node.op_type in SELECTING_OPS:
        return True
    sized = SIZED_BY_INPUT.get(node.op_type, ())
    return any(value in content for index, value in enumerate(node.inputs) if index in sized)
