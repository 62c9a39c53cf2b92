"""Which channels of what they read operators hand on, where they drop, add or flatten some. Channels lie along axis 1.

All raise Refused where the graph does not tell.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from qconv.ir.edits import Refused, kind, source
from qconv.ir.graph import Model, Node, Value, array, attribute, dims, input_of, rank


def sliced(node: Node, count: int) -> NDArray[np.int64]:
    """The channels, of so many, that a Slice leaves."""
    kept = np.arange(count)
    given = [array(input_of(node, index)) for index in range(1, 5)]
    starts, ends, axes, steps = given
    if starts is None or ends is None or any(n is None and input_of(node, i + 1) for i, n in enumerate(given)):
        raise Refused("a Slice's places are computed")
    along = list(range(len(starts))) if axes is None else axes.tolist()
    if any(axis < 0 for axis in along) and rank(source(node)) is None:
        raise Refused("the rank of a Slice's data is not known")
    for place, axis in enumerate(along):
        if axis % (rank(source(node)) or 1 + max(along)) == 1:
            step = 1 if steps is None else int(steps[place])
            end = int(ends[place])
            stop = None if step < 0 and end < -kept.size else end
            kept = kept[int(starts[place]) : stop : step]
    return kept


def split(node: Node, count: int) -> list[NDArray[np.int64]]:
    """The channels, of so many, that each output of a Split has: some of them, or all at some of the places."""
    kept = np.arange(count)
    axis = attribute(node, "axis", 0) % (rank(source(node)) or 1)
    if axis != 1:
        return [kept for _ in node.outputs]
    sizes = [(dims(value) or [None, None])[1] for value in node.outputs]
    if any(size is None for size in sizes) or sum(size or 0 for size in sizes) != count:
        raise Refused("it is not known how a Split parts the channels")
    return np.split(kept, np.cumsum([size or 0 for size in sizes])[:-1])


def padded(node: Node) -> tuple[int, int]:
    """How many channels of zeros a Pad puts before and behind those that it reads.

    Places are padded with zeros, or with copies of others.
    """
    pads, fill = array(input_of(node, 1)), input_of(node, 2)
    filled = array(fill)
    if pads is None or input_of(node, 3) is not None or (fill is not None and filled is None):
        raise Refused("a Pad's sizes are computed")
    constant = attribute(node, "mode", "constant") == "constant"
    if constant and filled is not None and filled.any():
        raise Refused("a Pad fills with other numbers than zero")
    before, behind = int(pads[1]), int(pads[len(pads) // 2 + 1])
    if (before or behind) and (not constant or min(before, behind) < 0):
        raise Refused("a Pad copies or drops channels")
    return before, behind


def positions(model: Model, node: Node) -> int:
    """How many features side by side every channel becomes where (N, C, H, W) becomes (N, C * H * W)."""
    sizes = dims(source(node))
    features = _features(model, node.outputs[0])
    if sizes is None or None in sizes[1:] or features != prod(size or 0 for size in sizes[1:]):
        raise Refused(f"{node.op_type} may mix channels")
    return prod(size or 0 for size in sizes[2:])


def _features(model: Model, value: Value) -> int:
    """The second of two axes, which a Gemm that reads it knows best; 0 where that is not its shape."""
    for reader in model.readers(value):
        if kind(reader) == "Gemm" and reader.inputs[0] is value:
            sizes = dims(reader.inputs[1]) or [None, None]  # type: ignore[arg-type]
            return sizes[1 if attribute(reader, "transB", 0) else 0] or 0
    sizes = dims(value) or []
    return (sizes[1] or 0) if len(sizes) == 2 else 0


def check_reduces_places(node: Node) -> None:
    """Refuse a ReduceMean or the like that takes channels or pictures together."""
    given, numbers, own = attribute(node, "axes"), array(input_of(node, 1)), rank(source(node))
    axes = given if given is not None else None if numbers is None else numbers.tolist()
    if own is None or axes is None or any(axis % own < 2 for axis in axes):
        raise Refused(f"{node.op_type} may mix channels")
