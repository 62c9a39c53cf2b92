"""Finds types and shapes as ONNX Runtime has them, which onnx does not infer, or infers otherwise.

onnx knows no operators of other domains (com.microsoft's, blocked layouts of a file that ONNX Runtime has optimized),
and stops at some of its own, such as GroupNormalization of opset 21. Whatever is behind them has no type either, and a
part of the network that returns such a tensor could not be cut out. The runtime that will run the model knows them all.

Pools have fewer places in ONNX Runtime 1.32 than onnx 1.23 says. Below opset 22 a last window of `ceil_mode` counts
there although it lies in the padding alone; the runtime leaves it out (1.19 does not, and is asked). With `auto_pad`
SAME the runtime pads as if there were no dilations.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference

from qconv.errors import QconvError
from qconv.runtime.session import Session

POOLS = frozenset({"MaxPool", "AveragePool", "LpPool"})


def infer_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Let onnx infer types and shapes, those of pools as ONNX Runtime computes them.

    Raises whatever onnx raises, a C++ exception of no fixed type.
    """
    if any(map(_may_be_smaller, proto.graph.node)):
        settled = onnx.ModelProto()
        settled.CopyFrom(proto)
        settle_pools(settled, sizes_alone=True)
        inferred = onnx.shape_inference.infer_shapes(settled, data_prop=True)
        del inferred.graph.node[:]
        inferred.graph.node.extend(proto.graph.node)
        return inferred
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def settle_pools(proto: onnx.ModelProto, *, sizes_alone: bool = False) -> int:
    """Write pads of pools of the main graph out, in place, where onnx infers another size than ONNX Runtime computes.

    Sizes then are the same by any rule. Returns how many there were. Raises as `infer_shapes` does. sizes_alone: others
    become pools of the same size, whose values are not the same; else those that no pads can be given for stay.
    """
    count = 0
    pools = [node for node in proto.graph.node if _may_be_smaller(node)]
    while pools:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
        values = (*graph.input, *graph.value_info, *graph.output)
        shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in values}
        changed = []
        for node in pools:
            sides, inferred = (shapes.get(name, [])[2:] for name in (node.input[0], node.output[0]))
            if 0 not in sides and len(sides) == len(inferred) == len(_attributes_of(node)["kernel_shape"]):
                changed += [node] if _settle(node, sides, inferred, sizes_alone) else []
        count += len(changed)
        pools = [node for node in pools if _may_be_smaller(node)] if changed else []  # one changes what others read
    return count


def _may_be_smaller(node: onnx.NodeProto) -> bool:
    """Whether it is a pool that onnx and ONNX Runtime may count the places of in two ways."""
    if node.op_type not in POOLS or node.domain not in ("", "ai.onnx"):
        return False
    said = _attributes_of(node)
    dilated = any(by > 1 for by in said.get("dilations", ()))
    same = said.get("auto_pad", b"").startswith(b"SAME")
    return "kernel_shape" in said and bool(said.get("ceil_mode") or (same and dilated))


def _settle(pool: onnx.NodeProto, sides: Sequence[int], inferred: Sequence[int], sizes_alone: bool) -> bool:
    """Write the pads of a pool out. False where its size is right, or no pads make it so."""
    said = _attributes_of(pool)
    axes = [_windows_along(axis, side, said) for axis, side in enumerate(sides)]
    places = [found for found, *_ in axes]
    if places == list(inferred):
        return False
    told = {name: said[name] for name in said.keys() - {"ceil_mode", "auto_pad"}}
    told["pads"] = [*(first for _, first, _, _ in axes), *(last for _, _, last, _ in axes)]
    fits = all(0 <= pad < kernel for pad, kernel in zip(told["pads"], said["kernel_shape"] * 2, strict=True))
    if not fits or (said.get("count_include_pad") and any(beyond for *_, beyond in axes)):
        if not sizes_alone:
            return False
        less = [side - found for side, found in zip(sides, places, strict=True)]
        told = {"kernel_shape": [max(by, 0) + 1 for by in less], "pads": [0] * len(less) + [max(-by, 0) for by in less]}
    del pool.attribute[:]
    pool.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in sorted(told.items()))
    return True


def _windows_along(axis: int, side: int, said: Mapping[str, Any]) -> tuple[int, int, int, bool]:
    """How many windows ONNX Runtime puts along an axis, both pads, and whether the last is more than is given."""
    kernel, rank = said["kernel_shape"][axis], len(said["kernel_shape"])
    stride, dilation = (said.get(name, [1] * rank)[axis] for name in ("strides", "dilations"))
    kind, given = said.get("auto_pad", b"NOTSET"), said.get("pads", [0] * 2 * rank)
    first, last = (given[axis], given[axis + rank]) if kind == b"NOTSET" else (0, 0)
    if kind.startswith(b"SAME"):
        padded = (-(-side // stride) - 1) * stride + kernel - side
        first = int((padded + (kind == b"SAME_LOWER")) / 2)  # towards 0: it is negative for strides beyond the kernel
        last = padded - first
    reach = dilation * (kernel - 1) + 1
    places = int((side + first + last - reach) / stride) + 1
    start = places * stride
    counts = start < side + first or not _leaves_windows_out()
    if said.get("ceil_mode") and start + reach - stride < side + first + last and counts:
        return places + 1, first, start + reach - side - first, True
    unread = last < 0 and places == (side + first - reach) // stride + 1
    return places, first, 0 if unread else last, False


@cache
def _leaves_windows_out() -> bool:
    """Whether this ONNX Runtime has two windows of one place in four by steps of two, or a third behind the end."""
    pool = onnx.helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[1], strides=[2], pads=[0, 0], ceil_mode=1)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    graph = onnx.helper.make_graph([pool], "pool", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
    session = Session(model.SerializeToString(), optimize=False, threads=1)
    return bool(session.run(["y"], {"x": np.zeros((1, 1, 4), np.float32)})[0].shape[2] == 2)


def _attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


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
