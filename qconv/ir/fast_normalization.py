"""LocalResponseNormalization in operators that ONNX Runtime's CPU provider is fast at: written, and taken back.

    y = x / (bias + alpha / size * (sum of x^2 over `size` channels around))^beta                              (LRN)

    x -> Mul(x, x) -> Reshape (N, 1, C * H * W) -> Conv, kernel of `size`, dilation H * W, weights alpha / size, bias
      -> Reshape (N, C, H, W) = v        y = x / v^beta        v^0.5 = Sqrt(v)        v^0.75 = Sqrt(v) * Sqrt(Sqrt(v))

ONNX Runtime's own kernel raises one number after the other to a power. The operator is Krizhevsky et al. 2012,
"ImageNet classification with deep convolutional neural networks", section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import DataType, Model, Node, Value, attribute, constant_array, dims, input_of
from qconv.ir.rewriting import standard_op_type

DEFAULT_ALPHA, DEFAULT_BETA, DEFAULT_BIAS = 1e-4, 0.75, 1.0
ROOTS = {0.25: (2,), 0.5: (1,), 0.75: (1, 2)}
"""Powers that are products of square roots taken so many times."""

PARTS = frozenset({"Mul", "Reshape", "Conv", "Sqrt", "Pow", "Div"})

MOST_NODES = 8
"""An opened LRN has so many."""


def open_normalization(model: Model, node: Node) -> bool:
    """Write an LRN of float (N, C, H, W) as faster operators; False where its sizes or numbers do not allow it."""
    data = node.inputs[0]
    sizes = None if data is None else dims(data)
    if data is None or data.dtype != DataType.FLOAT or sizes is None or len(sizes) != 4 or None in sizes[1:]:
        return False
    channels, height, width = (int(size or 0) for size in sizes[1:])
    size, alpha, beta, bias = _read_numbers(node)
    if bias <= 0 or alpha < 0 or not channels * height * width:
        return False
    name = node.name or ""
    square = model.build("Mul", [data, data], name=f"{name}_square", like=data)
    line = _reshape(model, f"{name}_line", square.outputs[0], [0, 1, channels * height * width])
    weights = model.constant(f"{name}_window", np.full((1, 1, size), alpha / size, np.float32))
    constant = model.constant(f"{name}_bias", np.array([bias], np.float32))
    spread = _spread(size, height * width)
    window = model.build("Conv", [line.outputs[0], weights, constant], name=f"{name}_sum", attributes=spread)
    window.outputs[0].dtype = DataType.FLOAT
    back = _reshape(model, f"{name}_map", window.outputs[0], [-1, channels, height, width])
    back.outputs[0].shape = None if data.shape is None else data.shape.copy()
    model.insert_before(node, square, line, window, back)
    model.become(node, "Div", [data, _raise_to(model, node, back.outputs[0], beta)])
    return True


def _read_numbers(lrn: Node) -> tuple[int, float, float, float]:
    """Size, alpha, beta and bias."""
    alpha, beta = attribute(lrn, "alpha", DEFAULT_ALPHA), attribute(lrn, "beta", DEFAULT_BETA)
    return int(attribute(lrn, "size")), float(alpha), float(beta), float(attribute(lrn, "bias", DEFAULT_BIAS))


def _spread(size: int, places: int) -> dict[str, list[int]]:
    """Attributes of the Conv that adds up `size` channels of so many places each; an even number has more behind."""
    return {"dilations": [places], "pads": [(size - 1) // 2 * places, size // 2 * places]}


def _reshape(model: Model, name: str, value: Value, sizes: list[int]) -> Node:
    node = model.build("Reshape", [value, model.constant(f"{name}_sizes", np.array(sizes, np.int64))], name=name)
    node.outputs[0].dtype = DataType.FLOAT
    return node


def _raise_to(model: Model, lrn: Node, value: Value, beta: float) -> Value:
    """value^beta, in new nodes in front of the operator."""
    name = lrn.name or ""
    if beta == 1:
        return value
    roots = next((times for power, times in ROOTS.items() if math.isclose(power, beta, rel_tol=1e-6)), None)
    if roots is None:
        power = model.constant(f"{name}_beta", np.array(beta, np.float32))
        raised = model.build("Pow", [value, power], name=f"{name}_power", like=value)
        model.insert_before(lrn, raised)
        return raised.outputs[0]
    found, taken = [], value
    for times in range(1, max(roots) + 1):
        root = model.build("Sqrt", [taken], name=f"{name}_root", like=value)
        model.insert_before(lrn, root)
        taken = root.outputs[0]
        found += [taken] if times in roots else []
    if len(found) == 1:
        return found[0]
    product = model.build("Mul", found, name=f"{name}_power", like=value)
    model.insert_before(lrn, product)
    return product.outputs[0]


@dataclass(frozen=True, slots=True)
class OpenedNormalization:
    """An LRN in faster operators: the Conv that adds up squares, and beta."""

    window: Node
    beta: float


def read_normalization(node: Node) -> OpenedNormalization | None:
    """What `open_normalization` has written that ends with this node; None for any other node."""
    if standard_op_type(node) != "Div":
        return None
    back, beta = _read_power(input_of(node, 1))
    window = None if back is None else _producer(back.inputs[0], "Conv")
    line = None if window is None else _producer(window.inputs[0], "Reshape")
    square = None if line is None else _producer(line.inputs[0], "Mul")
    if back is None or window is None or square is None or set(square.inputs) != {node.inputs[0]}:
        return None
    if not _adds_up_line(window, constant_array(input_of(back, 1))):
        return None
    return OpenedNormalization(window, beta)


def find_normalization(node: Node) -> Node | None:
    """The node that ends the LRN which `open_normalization` has written this one for; None for any other node."""
    made: list[Value] = []
    for _ in range(MOST_NODES):
        if read_normalization(node) is not None:
            return None if node.inputs[0] in made else node  # what makes its data is no part of it
        readers = [use.node for use in node.outputs[0].uses()]
        if standard_op_type(node) not in PARTS or not readers:
            return None
        made.append(node.outputs[0])
        node = readers[0]
    return None


def _read_power(value: Value | None, deepest: int = MOST_NODES) -> tuple[Node | None, float]:
    """The Reshape that a value is a power of, and the exponent. deepest: how many nodes back it may stand."""
    node = None if value is None else value.producer()
    kind = "" if node is None else standard_op_type(node)
    if node is None or kind == "Reshape":
        return node, 1.0
    further = deepest - 1
    back, power = _read_power(node.inputs[0], further) if kind in ("Sqrt", "Pow", "Mul") and further else (None, 1.0)
    if kind == "Sqrt":
        return back, power / 2
    if kind == "Pow":
        exponent = constant_array(input_of(node, 1))
        return (back, power * float(exponent.flat[0])) if exponent is not None and exponent.size == 1 else (None, 1.0)
    other, more = _read_power(input_of(node, 1), further) if kind == "Mul" and further else (None, 1.0)
    return (back if back is other else None), power + more


def _producer(value: Value | None, op_type: str) -> Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and standard_op_type(node) == op_type else None


def _adds_up_line(conv: Node, sizes: NDArray[np.generic] | None) -> bool:
    """Whether a Conv adds up each place of maps of these sizes over channels, with equal weights and a bias."""
    weights, bias = (constant_array(input_of(conv, index)) for index in (1, 2))
    if weights is None or bias is None or weights.ndim != 3 or weights.shape[:2] != (1, 1):
        return False
    if sizes is None or len(sizes) != 4 or bias.size != 1 or (weights != weights.flat[0]).any():
        return False
    return {key: attribute(conv, key) for key in ("dilations", "pads")} == _spread(weights.size, int(sizes[2:].prod()))


def close_normalizations(model: Model) -> None:
    """Write what `open_normalization` has written as LRN again, in place."""
    found = [(node, opened) for node in model.nodes() if (opened := read_normalization(node)) is not None]
    for node, opened in found:
        weights, bias = (constant_array(input_of(opened.window, index)) for index in (1, 2))
        assert weights is not None
        assert bias is not None
        numbers = {"alpha": float(weights.flat[0]) * weights.size, "beta": opened.beta, "bias": float(bias.flat[0])}
        model.become(node, "LRN", [node.inputs[0]], {"size": weights.size, **numbers})
    if found:
        model.sweep()
