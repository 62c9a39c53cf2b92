"""PRelu and LeakyRelu in all their spellings: recognised, then written so that integer kernels can run them.

    Relu(x) - s Relu(-x) = Relu(x) + s (x - |x|) / 2 = Max(x, s x) = PRelu(x, s)            (the last for s <= 1)
    PRelu(x, s) = LeakyRelu(x) for one s;  = x + (s - 1) min(x, 0), a sum with a depthwise layer, for one a channel

What is made of x by Relu, Abs, Neg, sums, products with constants, Max, Min and Where is p x from zero on, and n x
below: a pair (p, n), each of one number or one a channel, that every such operator makes a pair of. Where it is (1, s),
it is a PRelu.

Sources: He et al. 2015, arXiv 1502.01852; the spellings are those of TensorFlow's, Keras' and MXNet's converters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import Change, Finding
from qconv.ir.model import DataType, Model, Node, Value, constant_array, dims, input_of, rank
from qconv.ir.rewriting import EditRefused, data_input, each_node, standard_op_type, title

Numbers = NDArray[np.floating[Any]]

MOST_STEPS = 12
"""Operators between a tensor and what is looked for behind it; converters write at most seven."""


@dataclass(frozen=True, slots=True, eq=False)
class TwoSlopes:
    """positive * x where x >= 0, negative * x where x < 0."""

    positive: Numbers
    negative: Numbers


@dataclass(frozen=True, slots=True)
class SignTest:
    """A condition that is true where x is positive, or where it is negative; either way at zero."""

    positive: bool


Known = TwoSlopes | SignTest
IDENTITY = TwoSlopes(np.ones(1, np.float32), np.ones(1, np.float32))


def _operands(node: Node, known: Mapping[Value, Known]) -> list[TwoSlopes | Numbers] | None:
    """What a node reads, as pairs or as constants; None where it reads anything else."""
    found: list[TwoSlopes | Numbers] = []
    for value in node.inputs:
        if value is None:
            return None
        pair, numbers = known.get(value), constant_array(value)
        if isinstance(pair, TwoSlopes):
            found.append(pair)
        elif numbers is not None and numbers.dtype == np.float32:
            found.append(numbers)
        else:
            return None
    return found


def _map(function: Callable[..., Any]) -> Callable[..., TwoSlopes]:
    """A function of numbers, done to both slopes: with positive x, and with negative x it changes sign twice."""

    def of(*pairs: TwoSlopes) -> TwoSlopes:
        return TwoSlopes(
            function(*(pair.positive for pair in pairs)), -function(*(-pair.negative for pair in pairs))
        )  # fmt: skip

    return of


def _times(a: TwoSlopes | Numbers, b: TwoSlopes | Numbers) -> TwoSlopes | None:
    if isinstance(a, TwoSlopes) and not isinstance(b, TwoSlopes):
        return TwoSlopes(a.positive * b, a.negative * b)
    if isinstance(b, TwoSlopes) and not isinstance(a, TwoSlopes):
        return TwoSlopes(a * b.positive, a * b.negative)
    return None


def _divided(a: TwoSlopes | Numbers, b: TwoSlopes | Numbers) -> TwoSlopes | None:
    if isinstance(a, TwoSlopes) and not isinstance(b, TwoSlopes) and np.all(b):
        return TwoSlopes(a.positive / b, a.negative / b)
    return None


ZERO = TwoSlopes(np.zeros(1, np.float32), np.zeros(1, np.float32))


def _of_pairs(function: Callable[..., TwoSlopes]) -> Callable[..., TwoSlopes | None]:
    """A function of pairs, where a constant of zeros is a pair, too, and no other is."""

    def of(*operands: TwoSlopes | Numbers) -> TwoSlopes | None:
        if any(not isinstance(one, TwoSlopes) and one.any() for one in operands):
            return None
        return function(*(one if isinstance(one, TwoSlopes) else ZERO for one in operands))

    return of


RULES: Mapping[str, Callable[..., TwoSlopes | None]] = {
    "Identity": _of_pairs(_map(lambda x: x)),
    "Relu": _of_pairs(_map(lambda x: np.maximum(x, 0))),
    "Abs": _of_pairs(_map(np.abs)),
    "Neg": _of_pairs(_map(np.negative)),
    "Add": _of_pairs(_map(np.add)),
    "Sub": _of_pairs(_map(np.subtract)),
    "Max": _of_pairs(_map(lambda *x: reduce(np.maximum, x))),
    "Min": _of_pairs(_map(lambda *x: reduce(np.minimum, x))),
    "Mul": _times,
    "Div": _divided,
}
"""Operators that make a pair of pairs and constants; None where they do not."""

ENDS = frozenset({"Add", "Sub", "Max", "Min", "Where"})
"""What a PRelu may end in: each takes two sides together."""

SIGN_TESTS = {"Greater": True, "GreaterOrEqual": True, "Less": False, "LessOrEqual": False}


def _conclude(node: Node, known: Mapping[Value, Known], start: Value) -> Known | None:
    """What a node makes of what is known of its inputs."""
    kind = standard_op_type(node)
    if kind in SIGN_TESTS and node.inputs[0] is start and _is_zero(node.inputs[1]):
        return SignTest(SIGN_TESTS[kind])
    if kind in SIGN_TESTS and node.inputs[1] is start and _is_zero(node.inputs[0]):
        return SignTest(not SIGN_TESTS[kind])
    if kind == "Where":
        test = None if node.inputs[0] is None else known.get(node.inputs[0])
        sides = [None if value is None else known.get(value) for value in node.inputs[1:]]
        sides = [ZERO if side is None and _is_zero(value) else side
                 for side, value in zip(sides, node.inputs[1:], strict=True)]  # fmt: skip
        yes, no = sides
        if not (isinstance(test, SignTest) and isinstance(yes, TwoSlopes) and isinstance(no, TwoSlopes)):
            return None
        above, below = (yes, no) if test.positive else (no, yes)
        return TwoSlopes(above.positive, below.negative)
    operands = _operands(node, known) if kind in RULES and len(node.outputs) == 1 else None
    return None if operands is None else RULES[kind](*operands)


def _is_zero(value: Value | None) -> bool:
    numbers = constant_array(value)
    return numbers is not None and not numbers.any()


def recognise_slopes(model: Model) -> list[Finding]:
    """Write as one PRelu, or one Relu, what is made of several operators."""
    found: list[Finding] = []
    for start in [*model.graph.inputs, *(value for node in model.nodes() for value in node.outputs)]:
        maker = start.producer()
        if start.dtype != DataType.FLOAT or (maker is not None and maker.graph is None):
            continue
        if len(start.uses()) > 1 or any(standard_op_type(node) in ("Max", "Min") for node in model.readers(start)):
            found += _recognise_behind(model, start)
    return found


def _recognise_behind(model: Model, start: Value) -> list[Finding]:
    known: dict[Value, Known] = {start: IDENTITY}
    waiting, end, slopes = model.readers(start), None, None
    for _ in range(4 * MOST_STEPS):
        if not waiting:
            break
        node = waiting.pop(0)
        if node.graph is not model.graph or node.outputs[0] in known:
            continue
        made = _conclude(node, known, start)
        if made is None or len(known) > MOST_STEPS:
            continue
        known[node.outputs[0]] = made
        waiting += model.readers(node.outputs[0])
        if isinstance(made, TwoSlopes) and standard_op_type(node) in ENDS and _is_sloped(made):
            end, slopes = node, made.negative
    if end is None or slopes is None or dims(end.outputs[0]) != dims(start) or rank(start) is None:
        return []
    before = [value.producer() for value in end.inputs if value is not None]
    if not np.any(slopes):
        model.become(end, "Relu", [start])
    else:
        shape = _slope_shape(slopes, rank(start) or 0)
        if shape is None:
            return []
        slope = model.constant(f"{title(end)}_slope", np.asarray(slopes, np.float32).reshape(shape))
        model.become(end, "PRelu", [start, slope])
    model.remove_unread(before)
    return [Change("simplify", title(end), f"{end.op_type} recognised in what was made of several operators")]


def _is_sloped(made: TwoSlopes) -> bool:
    """Whether it is a Relu or PRelu, and neither nothing nor an Abs."""
    negative = np.asarray(made.negative)
    return bool(np.all(made.positive == 1) and not np.all(negative == 1) and not np.all(negative == -1))


def _slope_shape(slopes: Numbers, axes: int) -> tuple[int, ...] | None:
    """The shape of a PRelu's slopes, which may not make its result larger: without axes of size 1 in front."""
    shape = np.shape(slopes)
    if len(shape) > axes:
        return None
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape or (1,)


@each_node("simplify", "PRelu")
def slope_to_leaky_relu(model: Model, node: Node) -> list[Change]:
    """Replace a PRelu of one slope by a LeakyRelu, which has an integer kernel, and of zero by a Relu."""
    slopes = constant_array(node.inputs[1])
    if slopes is None or slopes.dtype != np.float32 or slopes.size == 0 or not np.all(slopes == slopes.flat[0]):
        return []
    slope = float(slopes.flat[0])
    if not np.isfinite(slope):
        raise EditRefused("its slopes are not finite")
    if slope == 0:
        model.become(node, "Relu", [data_input(node)])
    else:
        model.become(node, "LeakyRelu", [data_input(node)], {"alpha": slope})
    return [Change("simplify", title(node), f"PRelu of one slope became {node.op_type}")]


@each_node("slopes", "PRelu")
def slopes_to_layers(model: Model, node: Node) -> list[Change]:
    """Write a PRelu as x + (s - 1) min(x, 0): ONNX Runtime has integer kernels for all of that, and for PRelu none.

    In float, too, its PRelu with a slope for each channel takes ten times as long as these three.
    """
    data, slopes = data_input(node), constant_array(input_of(node, 1))
    sizes = dims(data)
    if slopes is None or slopes.dtype != np.float32 or data.dtype != DataType.FLOAT:
        raise EditRefused("its slopes are computed, or not float32")
    if sizes is None or len(sizes) not in (3, 4) or sizes[1] is None:
        raise EditRefused("its data are no maps with channels")
    shape = (1,) * (len(sizes) - slopes.ndim) + slopes.shape
    if shape != (1, sizes[1], *[1] * (len(sizes) - 2)) or not np.isfinite(slopes).all():
        raise EditRefused("it has no slope for each channel")
    weight = (slopes.reshape(-1).astype(np.float64) - 1).astype(np.float32).reshape(-1, *[1] * (len(sizes) - 1))
    name = title(node)
    zero = model.constant(f"{name}_zero", np.asarray(0, np.float32))
    low = model.build("Clip", [data, None, zero], name=f"{name}_negative", like=data)
    kernel = {"kernel_shape": [1] * (len(sizes) - 2), "group": sizes[1]}
    scaled = model.build(
        "Conv", [low.outputs[0], model.constant(f"{name}_less_1", weight)], name=f"{name}_slope", attributes=kernel,
        like=data,
    )  # fmt: skip
    model.insert_before(node, low, scaled)
    model.become(node, "Add", [data, scaled.outputs[0]])
    return [Change("slopes", name, "PRelu became x + (slope - 1) min(x, 0), which has integer kernels")]
