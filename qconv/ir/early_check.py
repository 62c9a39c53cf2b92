"""Has onnx's checker look at a float network before the work on it, as it will at the result."""

from __future__ import annotations

import onnx

from qconv.errors import QconvError
from qconv.ir.constants import tensor_proto
from qconv.ir.files import Source
from qconv.ir.model import Model, ir

SMALL_CONSTANT = 1024
"""Bytes up to which the checker sees constants before the work; of others it is told type and shape."""


def check_early(model: Model, source: Source) -> None:
    """onnx's own checker on the float network, whose nodes the result will have, too, before all work.

    Raises QconvError where it does not accept it.
    """
    proto = _skeleton(model)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise QconvError(
            f"onnx's checker does not accept {source.name}: {reason}", "check it with onnx.checker, or export it again."
        ) from None


def _skeleton(model: Model) -> onnx.ModelProto:
    """The network without its large weights, which are inputs instead."""
    graph = model.graph
    sizes = {value: tensor.nbytes for value in graph.initializers.values() if (tensor := value.const_value) is not None}
    large = [value for value, size in sizes.items() if size > SMALL_CONSTANT]
    small = [tensor_proto(value) for value, size in sizes.items() if size <= SMALL_CONSTANT]
    inputs = dict.fromkeys([*graph.inputs, *large])
    made = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in graph],
        graph.name or "graph",
        [ir.serde.serialize_value(value) for value in inputs],
        [ir.serde.serialize_value(value) for value in graph.outputs],
        small,
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=onnx.IR_VERSION)
