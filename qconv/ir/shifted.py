"""The float network with an input for every point of the quantized one (pairs.py), which is added to its tensor."""

from __future__ import annotations

from collections.abc import Sequence

from qconv.ir.graph import Model, Value
from qconv.ir.pairs import Pair, Point


def shifted(
    original: Model, quantized: Model, pairs: Sequence[Pair], outputs: Sequence[Value]
) -> tuple[Model, dict[Point, str], list[str]]:
    """A copy of `original` with these inputs; who reads the point reads the sum.

    Returns the names of the inputs as well, and those of the outputs, errors at these included.
    """
    model = original.copy()
    values = {v.name: v for v in (*model.graph.inputs, *(v for n in model.nodes() for v in n.outputs))}
    names: dict[Point, str] = {}
    results = [value.name or "" for value in outputs]
    for pair in pairs:
        value = values[pair.tensor.name]
        there = [node for node in model.readers(value) if node.op_type != "Add" or node.name not in names.values()]
        readers = _readers_of(quantized, pair.point)
        chosen = [node for node in there if node.name in readers] or there
        delta = model.feed_readers(value, f"{value.name}_error", ())
        total = model.build("Add", [value, delta], name=delta.name or "", like=value)
        producer = value.producer()
        if producer is None:
            model.insert_first(total)
        else:
            model.insert_after(producer, total)
        model.redirect(value, total.outputs[0], readers=chosen)
        names[pair.point] = delta.name or ""
        if value.is_graph_output():
            result = total.outputs[0].name or ""
            results = [result if name == value.name else name for name in results]
            model.graph.outputs.append(total.outputs[0])
    return model, names, results


def _readers_of(model: Model, point: Point) -> set[str]:
    """Names of the nodes that read a point, through copies."""
    found: set[str] = set()
    queue = list(point.values)
    while queue:
        for node in model.readers(queue.pop()):
            found.add(node.name or "")
            if node.op_type in ("Sum", "Identity") and len(node.inputs) == 1:
                queue += node.outputs
    return found
