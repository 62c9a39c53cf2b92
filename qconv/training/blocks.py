"""Blocks of a quantized network: stretches between codes that are all that goes from what is before to what is behind.

A residual block is one, since two tensors go through its middle. Wide middles of bottlenecks are left inside, too: what
a depthwise layer reads is several times as much as what goes from one bottleneck to the next.

Source: Li et al. 2021, arXiv 2102.05426 (BRECQ), section 3.2, for why blocks and not layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qconv.ir.model import Model, Node, Value, constant_array
from qconv.ir.tensor_matching import find_comparison_points

WIDER, NEAR = 2, 4
"""A cut is inside a bottleneck where cuts so near on both sides carry so many times less."""


@dataclass(frozen=True, slots=True)
class End:
    """Where a block begins or ends. names: of the quantized network, which all hold the same but at its own ends.

    candidates: for each, names of the float network's tensors that it may stand for.
    """

    names: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...]


def ends(quantized: Model, original: Model, sizes: Mapping[str, int]) -> list[End]:
    """The network's inputs, all places where it can be cut, and its outputs. original: the folded float network.

    sizes: numbers a picture of tensors of the float network, by name, that hold a row a picture: others are no ends.
    """
    by_codes = {point.codes: point for point in find_comparison_points(quantized, original) if point.codes is not None}
    found = []
    for point in (by_codes[codes] for codes in _cuts(quantized) if codes in by_codes):
        names = tuple(value.name or "" for value in point.values)
        candidates = tuple(value.name or "" for value in point.candidates if value.name in sizes)
        if candidates:
            found.append((End(names, (candidates,) * len(names)), sizes[candidates[0]]))
    inputs = tuple(value.name or "" for value in original.graph.inputs if constant_array(value) is None)
    outputs = tuple(value.name or "" for value in original.graph.outputs if value.name in sizes)
    last = [End(outputs, tuple((name,) for name in outputs))] if outputs else []
    return [End(inputs, tuple((name,) for name in inputs)), *_without_middles(found), *last]


def _cuts(model: Model) -> Iterator[Value]:
    """Codes that are all that later nodes read of earlier ones, the network's inputs included."""
    nodes = model.nodes()
    last: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and constant_array(value) is None:
                last[value] = index
    last |= dict.fromkeys(model.graph.outputs, len(nodes))
    live = {value for value in model.graph.inputs if constant_array(value) is None}
    computed = set(live)
    for index, node in enumerate(nodes):
        if computed.isdisjoint(value for value in node.inputs if value is not None):
            continue  # dequantizers of weights
        computed.update(node.outputs)
        live = {value for value in (*live, *node.outputs) if last.get(value, -1) > index}
        if len(live) == 1 and all(map(_dequantizes, model.readers(next(iter(live))))):
            yield next(iter(live))


def _dequantizes(node: Node) -> bool:
    return node.op_type == "DequantizeLinear"


def _without_middles(found: list[tuple[End, int]]) -> list[End]:
    sizes = [size for _, size in found]
    kept = []
    for index, (end, size) in enumerate(found):
        before, behind = sizes[max(0, index - NEAR) : index], sizes[index + 1 : index + 1 + NEAR]
        if not (min(before, default=size) * WIDER < size and min(behind, default=size) * WIDER < size):
            kept.append(end)
    return kept
