"""This module finds operators whose results are drawn at random, and stills them in parts that are run for statistics.

A Dropout left in training mode drops at inference, too: the file that is written keeps it. What is calibrated, rounded
and paired with another run is the network without it, which is its mean: a range, a rounding and the file's bytes must
not depend on a draw. Random sources without a seed get one for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx

from qconv.ir.model import Model, Node, input_of, ir
from qconv.ir.node_order import iter_nodes

RANDOM_SOURCES = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

SEED = 0.0


def find_random_nodes(model: Model) -> list[Node]:
    """The nodes whose results differ from run to run, in order, those inside bodies included."""
    return [node for node in model.graph.all_nodes() if _is_random(node)]


def describe_random_nodes(model: Model) -> str:
    """What draws at random, in words; empty where nothing does."""
    found = find_random_nodes(model)
    if not found:
        return ""
    first = found[0]
    what = "is in training mode" if first.op_type == "Dropout" else "draws random numbers"
    more = f", as {len(found) - 1} more do" if len(found) > 1 else ""
    return f"{first.op_type} {first.name!r} {what}{more}"


def _is_random(node: Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type != "Dropout":
        return node.domain in ("", "ai.onnx") and node.op_type in RANDOM_SOURCES
    training, ratio = input_of(node, 2), input_of(node, 1)
    return training is not None and _may_be(training, bool) and (ratio is None or _may_be(ratio, bool))


def _may_be(value: ir.Value, test: Callable[[object], bool]) -> bool:
    """Whether a value passes a test, or is not known before the network runs."""
    made, stored = value.producer(), value.const_value
    if made is not None and made.op_type == "Constant" and "value" in made.attributes:
        stored = made.attributes["value"].as_tensor()
    return stored is None or test(stored.numpy().item())


def still(graph: onnx.GraphProto) -> None:
    """Let nothing be drawn at random any more, in place: Dropout drops nothing, other sources draw by a seed."""
    for node in iter_nodes(graph.node):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type == "Dropout" and len(node.input) > 2:
            del node.input[2:]
        elif node.op_type in RANDOM_SOURCES and all(attribute.name != "seed" for attribute in node.attribute):
            node.attribute.append(onnx.helper.make_attribute("seed", SEED))
