"""Puts the nodes of a file in an order in which each reads only what is there: its own, where that is one already.

ONNX demands such an order, some tools do not keep it (AMD Quark 0.13), and ONNX Runtime takes any order in the main
graph. Bodies of If, Loop and Scan read tensors of the graphs around them, which their node then depends on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, MutableSequence, Sequence

import onnx

from qconv.errors import QconvError, format_some


def sort_nodes(proto: onnx.ModelProto, name: str) -> bool:
    """Sort the nodes of all graphs and functions in place. Returns whether any were out of order.

    Of nodes that can run next, the one that stands first in the file does.

    Args:
        proto: The model.
        name: Of its file, for the error.

    Raises:
        QconvError: Nodes depend on each other in a cycle.
    """
    found = [_sort_graph(proto.graph, name)]
    found += [_sort(function.node, name) for function in proto.functions]
    return any(found)


def _sort_graph(graph: onnx.GraphProto, name: str) -> bool:
    found = [_sort_graph(body, name) for node in graph.node for body in _bodies_of(node)]
    return any([*found, _sort(graph.node, name)])


def _sort(nodes: MutableSequence[onnx.NodeProto], name: str) -> bool:
    """Sort the nodes of one graph. Returns whether they were out of order."""
    makers = {value: index for index, node in enumerate(nodes) for value in node.output if value}
    needs = [{makers[value] for value in _names_read_by(node) if value in makers} for node in nodes]
    if all(max(need, default=-1) < index for index, need in enumerate(needs)):
        return False
    readers: list[list[int]] = [[] for _ in needs]
    for index, need in enumerate(needs):
        for maker in need:
            readers[maker].append(index)
    waiting = [len(need) for need in needs]
    ready = [index for index, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:  # ascending, which is a heap
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(needs):
        raise _make_cycle_error(nodes, needs, {index for index, count in enumerate(waiting) if count}, name)
    copies = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del nodes[:]
    nodes.extend(copies)
    return True


def _make_cycle_error(
    nodes: Sequence[onnx.NodeProto], needs: Sequence[set[int]], left: set[int], name: str
) -> QconvError:
    """The error for the nodes that never get ready. needs: the nodes that each one reads."""
    way = [min(left)]
    while True:  # each of them waits for another one
        before = min(needs[way[-1]] & left)
        if before in way:
            cycle = way[way.index(before) :][::-1]
            break
        way.append(before)
    told = [f"{nodes[index].op_type} {nodes[index].name or next(iter(nodes[index].output), '')}" for index in cycle]
    return QconvError(
        f"{name} has nodes that wait for each other in a cycle: {format_some(told)}.",
        "export it again; no order of these nodes can run.",
    )


def _names_read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those of its bodies included."""
    yield from node.input
    for body in _bodies_of(node):
        for inner in body.node:
            yield from _names_read_by(inner)
        for output in body.output:
            yield output.name


def _bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def iter_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield these nodes and those of their bodies."""
    for node in nodes:
        yield node
        for body in _bodies_of(node):
            yield from iter_nodes(body.node)
