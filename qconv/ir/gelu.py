"""Finds Gelus that are written out: y = x / 2 * (1 + erf(x / sqrt(2))), of five operators.

Runtimes know it by its pattern and make one operator of it, which is several times faster than all of them. So none of
them is folded into a layer, nor rounded. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qconv.ir.model import Model, Node, Value, constant_scalar
from qconv.ir.rewriting import standard_op_type

TOLERANCE = 1.5e-4
"""Relative, of constants: some exporters write 1.4142, or a number of 16 bits."""

GELU_REASON = "part of a Gelu, which is one operator as long as nothing in it is rounded"


@dataclass(frozen=True, slots=True)
class Gelu:
    """A Gelu of five operators.

    data: x. inner: divides it by sqrt(2), or multiplies by the inverse. erf, plus_one: behind it. product, outer: the
    Mul that reads 1 + erf, and what writes y; one of two, `halving`, or else a third node halves.
    """

    data: Value
    inner: Node
    erf: Node
    plus_one: Node
    product: Node
    outer: Node
    halving: Node

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, each once."""
        return tuple(dict.fromkeys((self.inner, self.erf, self.plus_one, self.product, self.halving, self.outer)))

    @property
    def is_halved_between(self) -> bool:
        """Whether 1 + erf is halved before it is multiplied by x, a form that ONNX Runtime does not know."""
        return self.halving is self.product


def find_gelus(model: Model) -> list[Gelu]:
    """All Gelus of the main graph that are written out, in order."""
    found = (find_gelu(model, node) for node in model.nodes() if standard_op_type(node) == "Erf")
    return [gelu for gelu in found if gelu is not None]


def halves_gelu(model: Model, node: Node) -> bool:
    """Whether a node halves a Gelu, in front of the product with 1 + erf or behind it."""
    return _halved(node) is not None and any(gelu.halving is node for gelu in find_gelus(model))


def find_gelu(model: Model, erf: Node) -> Gelu | None:
    """The Gelu that an Erf is of."""
    inner, plus_one = _producer(erf.inputs[0]), model.sole_reader(erf.outputs[0])
    if inner is None or plus_one is None or model.sole_reader(inner.outputs[0]) is not erf:
        return None
    data = _other_side(inner, "Div", math.sqrt(2)) or _other_side(inner, "Mul", math.sqrt(0.5))
    if data is None or _other_side(plus_one, "Add", 1.0) is None:
        return None
    product = model.sole_reader(plus_one.outputs[0])
    if product is None or standard_op_type(product) != "Mul":
        return None
    gate, halved = plus_one.outputs[0], _halved(product)
    behind = model.sole_reader(product.outputs[0])
    if halved is gate and behind is not None and _are_inputs(behind, product.outputs[0], data):
        return Gelu(data, inner, erf, plus_one, product, behind, product)
    if behind is not None and _are_inputs(product, gate, data) and _halved(behind) is product.outputs[0]:
        return Gelu(data, inner, erf, plus_one, product, behind, behind)
    for value in product.inputs:
        half = _producer(value)
        if half is None or _halved(half) is not data:
            continue
        if model.sole_reader(half.outputs[0]) is product and _are_inputs(product, gate, half.outputs[0]):
            return Gelu(data, inner, erf, plus_one, product, product, half)
    return None


def _halved(node: Node) -> Value | None:
    return _other_side(node, "Mul", 0.5) or _other_side(node, "Div", 2.0)


def _other_side(node: Node, op_type: str, number: float) -> Value | None:
    """What a node of this type computes with a number on its other side; of a Div what is divided. None for others."""
    if standard_op_type(node) != op_type or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    for data, constant in ((first, second), (second, first))[: 1 if op_type == "Div" else 2]:
        if _is_about(constant, number):
            return data
    return None


def _is_about(value: Value | None, number: float) -> bool:
    known = constant_scalar(value)
    return known is not None and math.isclose(known, number, rel_tol=TOLERANCE)


def _producer(value: Value | None) -> Node | None:
    return None if value is None else value.producer()


def _are_inputs(node: Node, one: Value, other: Value) -> bool:
    return standard_op_type(node) == "Mul" and set(node.inputs) == {one, other}


def keep_gelus_float(gelus: Iterable[Gelu]) -> dict[str, str]:
    """Names of the nodes of Gelus, which stay float, each with the reason."""
    return {node.name or "": GELU_REASON for gelu in gelus for node in gelu.nodes}
