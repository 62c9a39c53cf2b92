"""This module writes models of opsets without quantizers as older ones: ONNX Runtime has no QuantizeLinear of opset 28.

A newer version of an operator often takes more types alone. A node means the same in an older opset where that has the
operator, with all the attributes and as many inputs and outputs as the node has. Nothing else is converted.
"""

from __future__ import annotations

from itertools import chain

import onnx
from onnx import defs

from qconv.config.targets import HIGHEST_OPSET, LOWERED_OPSET, OPSETS
from qconv.errors import QconvError
from qconv.ir.node_order import iter_nodes


def lower_opset(proto: onnx.ModelProto, name: str) -> None:
    """Give a model beyond HIGHEST_OPSET the lowest opset from LOWERED_OPSET on that its operators allow, in place.

    name: of the model, for messages. Raises QconvError where an operator allows none.
    """
    entry = next((entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if entry is None or entry.version <= HIGHEST_OPSET:
        return
    nodes = [
        node
        for node in iter_nodes(chain(proto.graph.node, *(f.node for f in proto.functions)))
        if node.domain in ("", "ai.onnx")
    ]
    for opset in range(LOWERED_OPSET, HIGHEST_OPSET + 1):
        stays = next((node for node in nodes if not _means_the_same(node, entry.version, opset)), None)
        if stays is None:
            entry.version = opset
            proto.ir_version = min(proto.ir_version, OPSETS[opset].ir_version)
            for function in proto.functions:
                for own in function.opset_import:
                    if own.domain in ("", "ai.onnx"):
                        own.version = min(own.version, opset)
            return
    assert stays is not None
    raise QconvError(
        f"{name} uses {stays.op_type} of opset {entry.version}, which has no quantizers in ONNX Runtime, and "
        f"opset {HIGHEST_OPSET} has no such {stays.op_type}.",
        f"export the model at opset {HIGHEST_OPSET} or lower.",
    )


def _means_the_same(node: onnx.NodeProto, newer: int, older: int) -> bool:
    try:
        after = defs.get_schema(node.op_type, min(newer, defs.onnx_opset_version()), "")
    except defs.SchemaError:  # of a function in the file
        return True
    try:
        before = defs.get_schema(node.op_type, older, "")
    except defs.SchemaError:
        return False
    if before.since_version == after.since_version:
        return True
    fits = len(node.input) <= before.max_input and len(node.output) <= before.max_output
    return fits and all(attribute.name in before.attributes for attribute in node.attribute)


def known_opset() -> int:
    """The highest opset that the installed onnx knows, and writes models in."""
    return int(defs.onnx_opset_version())
