"""This module rewrites operators of opsets 1 to 8 into the form that opset 7 gives them, which ONNX Runtime runs.

onnx's version converter takes over from there. It is not asked before, because it wants the shapes that onnx does not
infer for the operators of opset 1, leaves values without a type where an operand is broadcast along an axis, and has
no adapters for what is in the table below. Every rewrite is exact. Before opset 7 the second operand alone was
broadcast, at a place that an attribute names:

    C = A + B, axis = k        B has the shape A.shape[k : k + rank(B)], and 1 in all dimensions behind

BatchNormalization(spatial=0), up to opset 8, has statistics for each place, and becomes a Mul and an Add:

    gain = scale / sqrt(var + eps)      (C, H, W)
    y = x * gain + (bias - mean * gain)

Resize before opset 11 takes the place x / scale of its input, which later ones call asymmetric; the
converter leaves that out, so that it is put back.

A Dropout of these opsets is one in inference, whatever its `is_test` says: so all runtimes take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qconv.ir.files import declared_opset
from qconv.runtime.session import OLDEST_OPSET

RESIZING_OPSET = 11
"""From here on Resize says which places of its input it takes."""

PLACES_OPSET = 9
"""From here on BatchNormalization has no `spatial`."""

STALE_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "BatchNormalization": frozenset({"is_test"}),
    "Dropout": frozenset({"is_test"}),
    "Gemm": frozenset({"broadcast"}),
    "InstanceNormalization": frozenset(),
    "LSTM": frozenset({"output_sequence"}),
    "GRU": frozenset({"output_sequence"}),
    "RNN": frozenset({"output_sequence"}),
}
"""Attributes of single operators that say nothing any more. `consumed_inputs` says nothing anywhere."""

ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})
COMPARISONS = frozenset({"And", "Or", "Xor", "Equal", "Greater", "Less"})

Attributes = Mapping[str, Any]


def is_legacy(proto: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime refuses the model as it is, because of its opset."""
    return declared_opset(proto) < OLDEST_OPSET


def modernize(proto: onnx.ModelProto) -> None:
    """Bring a model of opset 1 to 8 to opset 7 or its own in place, without BatchNormalization(spatial=0).

    Nothing is done to newer ones. What no rule covers stays, for the converter or the runtime to name.
    """
    opset = declared_opset(proto)
    if not 0 < opset < PLACES_OPSET:
        return
    rewriter = _Rewriter.of(proto.graph)
    if opset < OLDEST_OPSET:
        rewriter.rewrite(_RULES)
        for entry in proto.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = OLDEST_OPSET
        _rewrite_broadcasts(proto, rewriter)
    rewriter.rewrite({"BatchNormalization": _split_batch_normalization})


@dataclass(slots=True)
class _Rewriter:
    """Replaces nodes of one graph, and adds constants to it.

    taken: names that are not free. stored: constants by name. ranks: how many axes tensors have, as far as is known.
    """

    graph: onnx.GraphProto
    taken: set[str]
    stored: dict[str, onnx.TensorProto]
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Rewriter:
        stored = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            value = _attributes(node).get("value") if node.op_type == "Constant" else None
            if value is not None:
                stored[node.output[0]] = onnx.TensorProto.FromString(value.SerializeToString())
        names = {*stored, *(value.name for value in graph.input)}
        return cls(graph, names | {name for node in graph.node for name in node.output}, stored, {})

    def rewrite(self, rules: Mapping[str, _Rule]) -> None:
        """Put what the rules make of nodes in their place; None leaves a node as it is."""
        found: list[onnx.NodeProto] = []
        for node in self.graph.node:
            rule = rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            made = None if rule is None else rule(self, node, _attributes(node))
            found += [node] if made is None else made
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in found]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def fresh(self, wish: str) -> str:
        """A free name."""
        name, count = wish, 1
        while name in self.taken:
            count += 1
            name = f"{wish}_{count}"
        self.taken.add(name)
        return name

    def constant(self, wish: str, array: NDArray[Any]) -> str:
        """Store an array. Returns its name."""
        name = self.fresh(wish)
        self.stored[name] = numpy_helper.from_array(array, name)
        self.graph.initializer.append(self.stored[name])
        return name

    def value_of(self, name: str) -> NDArray[Any] | None:
        """The numbers of a constant, None for what is computed."""
        tensor = self.stored.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)


_Rule = Callable[[_Rewriter, onnx.NodeProto, Attributes], Sequence[onnx.NodeProto] | None]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _node_like(
    node: onnx.NodeProto, inputs: Sequence[str], attributes: Attributes, op_type: str | None = None
) -> onnx.NodeProto:
    """The same node with other inputs and attributes."""
    made: onnx.NodeProto = helper.make_node(
        op_type or node.op_type, list(inputs), list(node.output), name=node.name, **attributes
    )
    return made


# -- rules that need no shape ------------------------------------------------------------------------------------------


def _drop_stale(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto]:
    stale = STALE_ATTRIBUTES.get(node.op_type, frozenset())
    return [_node_like(node, node.input, {k: v for k, v in found.items() if k not in stale | {"consumed_inputs"}})]


def _name_concat_axis(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto]:
    return [_node_like(node, node.input, {"axis": 1, **found})]


def _name_cast_type(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    to = found.get("to")
    if not isinstance(to, bytes):
        return None
    return [_node_like(node, node.input, {"to": onnx.TensorProto.DataType.Value(to.decode().upper())})]


def _shape_as_input(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    if "shape" not in found:
        return None
    shape = rewriter.constant(f"{node.output[0]}_shape", np.array(found["shape"], np.int64))
    return [_node_like(node, [node.input[0], shape], {})]


def _name_pads(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    if "paddings" not in found:
        return None
    return [_node_like(node, node.input, {"pads" if k == "paddings" else k: v for k, v in found.items()})]


def _split_sizes(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    sizes = rewriter.value_of(node.input[1]) if len(node.input) > 1 else None
    if sizes is None:
        return None
    return [_node_like(node, node.input[:1], {**found, "split": [int(size) for size in sizes]})]


def _upsample_scales(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    if "height_scale" not in found:
        return None
    scales = [1.0, 1.0, found["height_scale"], found["width_scale"]]
    return [_node_like(node, node.input, {"mode": found.get("mode", b"nearest"), "scales": scales})]


def _whole_power(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    power = found.get("p", 2)
    return [_node_like(node, node.input, {**found, "p": round(power)})] if power == round(power) else None


def _split_scaler(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto]:
    """ImageScaler: x * scale + bias, bias one a channel. Affine: x * alpha + beta."""
    gain = found.get("scale", found.get("alpha", 1.0))
    shift = np.array(found.get("bias", [found.get("beta", 0.0)]), np.float32)
    scaled, y = rewriter.fresh(f"{node.output[0]}_scaled"), node.output[0]
    by = rewriter.constant(f"{y}_scale", np.array(gain, np.float32))
    plus = rewriter.constant(f"{y}_bias", shift.reshape(-1, 1, 1) if node.op_type == "ImageScaler" else shift[0])
    return [
        helper.make_node("Mul", [node.input[0], by], [scaled], name=f"{node.name or y}_scale"),
        helper.make_node("Add", [scaled, plus], [y], name=node.name),
    ]


_UNARY = ("Abs", "Ceil", "Clip", "Elu", "Exp", "Floor", "HardSigmoid", "LeakyRelu", "Log", "Neg", "Reciprocal", "Relu")
_MORE_UNARY = ("Selu", "Sigmoid", "Sqrt", "Tanh", "Max", "Mean", "Min", "Sum")

_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys((*STALE_ATTRIBUTES, *_UNARY, *_MORE_UNARY), _drop_stale),
    "Affine": _split_scaler,
    "Cast": _name_cast_type,
    "Concat": _name_concat_axis,
    "GlobalLpPool": _whole_power,
    "ImageScaler": _split_scaler,
    "LpPool": _whole_power,
    "Pad": _name_pads,
    "Reshape": _shape_as_input,
    "Split": _split_sizes,
    "Upsample": _upsample_scales,
}


# -- operands that are broadcast at a place ----------------------------------------------------------------------------


def _rewrite_broadcasts(proto: onnx.ModelProto, rewriter: _Rewriter) -> None:
    """Give second operands the axes that they lack. Ranks are those of the graph with the first operands in their
    place, whose shape results have."""
    rewriter.ranks = _infer_ranks(proto)
    rules: dict[str, _Rule] = dict.fromkeys(ARITHMETIC | COMPARISONS, _align_operand)
    rewriter.rewrite({**rules, "PRelu": _align_slope, "Tile": _tile_repeats})


def _infer_ranks(proto: onnx.ModelProto) -> dict[str, int]:
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for tensor in plain.graph.initializer:
        if tensor.ByteSize() > 1024:  # shapes are small, and weights are of no interest
            dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(dims)
    del plain.graph.value_info[:]
    for node in plain.graph.node:
        if node.op_type in ARITHMETIC | {"PRelu", "Tile"} and node.domain in ("", "ai.onnx"):
            _become(node, "Identity")
        elif node.op_type in COMPARISONS and node.domain in ("", "ai.onnx"):
            _become(node, "Cast", to=onnx.TensorProto.BOOL)
    try:
        inferred = onnx.shape_inference.infer_shapes(plain).graph
    except Exception:  # it is told of where shapes are inferred for good
        inferred = plain.graph
    ranks = ranks_of((*inferred.input, *inferred.value_info, *inferred.output))
    return ranks | {tensor.name: len(tensor.dims) for tensor in proto.graph.initializer}


def ranks_of(values: Iterable[onnx.ValueInfoProto]) -> dict[str, int]:
    """How many axes tensors have, by name, as far as it is known."""
    tensors = ((value.name, value.type.tensor_type) for value in values)
    return {name: len(tensor.shape.dim) for name, tensor in tensors if tensor.HasField("shape")}


def _become(node: onnx.NodeProto, op_type: str, **attributes: Any) -> None:
    made = helper.make_node(op_type, node.input[:1], node.output[:1], **attributes)
    node.CopyFrom(made)


def _align_operand(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    a, b = node.input
    rank, own = rewriter.ranks.get(a), rewriter.ranks.get(b)
    axis = found.get("axis")
    behind = 0 if axis is None or rank is None or own is None else rank - (axis % rank if rank else 0) - own
    return _with_axes_behind(rewriter, node, b, behind) if behind > 0 else [_node_like(node, node.input, {})]


def _align_slope(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    """PRelu has one slope, or one a channel, along axis 1."""
    rank, own = (rewriter.ranks.get(name) for name in node.input)
    slope = rewriter.value_of(node.input[1])
    if rank is None or own != 1 or (slope is not None and slope.size == 1):
        return [_node_like(node, node.input, {})]
    return _with_axes_behind(rewriter, node, node.input[1], max(0, rank - 2))


def _with_axes_behind(rewriter: _Rewriter, node: onnx.NodeProto, b: str, count: int) -> list[onnx.NodeProto]:
    """The node, whose second operand gets `count` axes of 1 behind its own; a constant is stored so."""
    known = rewriter.value_of(b)
    if known is not None:
        stored = rewriter.constant(f"{node.output[0]}_{b}", known.reshape(*known.shape, *(1,) * count))
        return [_node_like(node, [node.input[0], stored], {})]
    own = rewriter.ranks[b]
    wide = rewriter.fresh(f"{b}_aligned")
    axes = list(range(own, own + count))
    return [
        helper.make_node("Unsqueeze", [b], [wide], name=wide, axes=axes),
        _node_like(node, [node.input[0], wide], {}),
    ]


def _tile_repeats(rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes) -> list[onnx.NodeProto] | None:
    """Tile of opset 1 has one number of tiles and one axis."""
    if len(node.input) != 3:
        return None
    tiles, axis = (rewriter.value_of(name) for name in node.input[1:])
    rank = rewriter.ranks.get(node.input[0])
    if tiles is None or axis is None or rank is None:
        return None
    repeats = np.ones(rank, np.int64)
    repeats[int(axis.reshape(-1)[0])] = int(tiles.reshape(-1)[0])
    return [_node_like(node, [node.input[0], rewriter.constant(f"{node.output[0]}_repeats", repeats)], {})]


# -- statistics for each place -----------------------------------------------------------------------------------------


def _split_batch_normalization(
    rewriter: _Rewriter, node: onnx.NodeProto, found: Attributes
) -> list[onnx.NodeProto] | None:
    if found.get("spatial", 1) or any(node.output[1:]):
        return None
    x, y, name, eps = node.input[0], node.output[0], node.name or node.output[0], found.get("epsilon", 1e-5)
    known = [rewriter.value_of(part) for part in node.input[1:5]]
    if any(part is None for part in known):
        return None
    scale, bias, mean, var = (np.asarray(part, np.float64) for part in known)
    kind = known[0].dtype  # type: ignore[union-attr]
    gain = scale / np.sqrt(var + eps)
    by = rewriter.constant(f"{y}_gain", gain.astype(kind))
    plus = rewriter.constant(f"{y}_shift", (bias - mean * gain).astype(kind))
    scaled = rewriter.fresh(f"{y}_scaled")
    return [
        helper.make_node("Mul", [x, by], [scaled], name=f"{name}_gain"),
        helper.make_node("Add", [scaled, plus], [y], name=name),
    ]


# -- places that are resized to ----------------------------------------------------------------------------------------


def find_resizing(proto: onnx.ModelProto) -> list[str | None]:
    """What every Upsample and Resize before opset 11, in order, counts as the nearest; None where it need not be said.

    At whole factors all rules agree on the nearest. ONNX Runtime rounds up where a tensor shrinks.
    """
    if declared_opset(proto) >= RESIZING_OPSET:
        return []
    rewriter, found = _Rewriter.of(proto.graph), list[str | None]()
    for node in proto.graph.node:
        if node.op_type in ("Upsample", "Resize"):
            own = _attributes(node)
            scales = own.get("scales", rewriter.value_of(node.input[1]) if len(node.input) > 1 else None)
            numbers = np.array([0.0] if scales is None else scales)
            nearest = own.get("mode", b"nearest") == b"nearest"
            if nearest and (numbers >= 1).all() and (numbers == np.rint(numbers)).all():
                found.append(None)
            else:
                found.append("ceil" if scales is not None and (numbers <= 1).all() else "floor")
    return found


def restore_resizing(proto: onnx.ModelProto, nearest: Sequence[str | None]) -> None:
    """Tell the Resize nodes of a raised model which places they take, in place. The converter renames their results."""
    nodes = [node for node in proto.graph.node if node.op_type == "Resize"]
    for node, rounded in zip(nodes, nearest, strict=True) if nearest else ():
        own = _attributes(node)
        if rounded is not None and "coordinate_transformation_mode" not in own:
            node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        if rounded is not None and own.get("mode", b"nearest") == b"nearest" and "nearest_mode" not in own:
            node.attribute.append(helper.make_attribute("nearest_mode", rounded))
