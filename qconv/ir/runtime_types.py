"""Asks ONNX Runtime for types and shapes that onnx does not infer.

onnx knows no operators of other domains (com.microsoft's, blocked layouts of a file that ONNX Runtime has optimized),
and stops at some of its own, such as GroupNormalization of opset 21. Whatever is behind them has no type either, and a
part of the network that returns such a tensor could not be cut out. The runtime that will run the model knows them all.
"""

from __future__ import annotations

import contextlib
import re

import onnx

from qconv.errors import QconvError
from qconv.runtime.session import Session


def complete_types(proto: onnx.ModelProto) -> None:
    """Give types, and shapes where they are known, to results of the main graph that have no type, or none behind it.

    Nothing changes where onnx knows all types, or where ONNX Runtime does not load the model, which is told of later.

    Args:
        proto: With the types that onnx infers; large weights may be inputs.
    """
    graph = proto.graph
    typed = {value.name: value.type for value in (*graph.input, *graph.value_info, *graph.output)}
    made = [name for node in graph.node for name in node.output if name]
    if all(_is_typed(typed.get(name)) for name in made):
        return
    found: dict[str, onnx.TypeProto] = {}
    with contextlib.suppress(QconvError):
        found = _ask_runtime(proto, [name for name in made if not _is_shaped(typed.get(name))])
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    for name, kind in found.items():
        if name not in known:
            graph.value_info.add(name=name).type.CopyFrom(kind)
        elif not _is_typed(known[name].type) or kind.tensor_type.HasField("shape"):
            known[name].type.CopyFrom(kind)


def _ask_runtime(proto: onnx.ModelProto, names: list[str]) -> dict[str, onnx.TypeProto]:
    """The types of these results by name. Raises QconvError where ONNX Runtime does not load the model."""
    asked = onnx.ModelProto()
    asked.CopyFrom(proto)
    del asked.graph.output[:]
    asked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = Session(asked.SerializeToString(), optimize=False, threads=1)
    return {name: parse_type(word, shape) for name, (word, shape) in session.output_types.items()}


def parse_type(word: str, shape: tuple[int | None, ...]) -> onnx.TypeProto:
    """The type that ONNX Runtime calls by this word, such as `seq(tensor(float))`.

    shape: of a tensor; an empty one says nothing, as the runtime says it of unknown ranks, too.
    """
    kind = onnx.TypeProto()
    outer, inner = re.fullmatch(r"(\w+)\((.*)\)", word).groups()  # type: ignore[union-attr]
    if outer == "tensor":
        kind.tensor_type.elem_type = onnx.TensorProto.DataType.Value(inner.upper())
        if shape:
            kind.tensor_type.shape.dim.extend(
                onnx.TensorShapeProto.Dimension(dim_value=size)
                if size is not None
                else onnx.TensorShapeProto.Dimension()
                for size in shape
            )
    elif outer == "seq":
        kind.sequence_type.elem_type.CopyFrom(parse_type(inner, ()))
    elif outer == "optional":
        kind.optional_type.elem_type.CopyFrom(parse_type(inner, ()))
    return kind


def _is_typed(kind: onnx.TypeProto | None) -> bool:
    if kind is None or kind.WhichOneof("value") is None:
        return False
    return not kind.HasField("tensor_type") or kind.tensor_type.elem_type != onnx.TensorProto.UNDEFINED


def _is_shaped(kind: onnx.TypeProto | None) -> bool:
    if kind is None or not _is_typed(kind):
        return False
    return not kind.HasField("tensor_type") or kind.tensor_type.HasField("shape")
