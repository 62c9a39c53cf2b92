"""What the runtime really runs: its own optimized graph, counted, and every node that stayed float with the reason.

ONNX Runtime turns DequantizeLinear -> operator -> QuantizeLinear into one integer operator where its rules allow it.
The graph that it will run is the only proof that they did. Fused nodes keep a name of one of those that they were made
of, with the runtime's own suffixes, so that each can be found again in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qconv.audit.explain import dequantizer_of, reason
from qconv.ir.model import DataType, Model, Node, attribute, constant_array, input_of
from qconv.ir.operators import CLIPPING_ACTIVATIONS, QUANTIZATION_RULES, WeightedRule
from qconv.planning.plan import Plan
from qconv.quantization.overflow import worst_pair_ratio
from qconv.results.quantize import Audit, FloatNode, LayerTime, Saturation
from qconv.runtime.session import Session

INTEGER_OPS = frozenset({"QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"})
CONVERTING_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "ReorderInput", "ReorderOutput"}
)
SUMS = frozenset({"ConvInteger", "MatMulInteger"})
"""They write the sums of products, which a Cast and a Mul by the scale make numbers of."""
FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
SHAPE_OPS = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})
SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|_pre_q)+$")
LAYOUT_OPS = frozenset({"Transpose", "Reshape"})
FUSED_ACTIVATIONS = CLIPPING_ACTIVATIONS | {"HardSigmoid", "LeakyRelu", "Sigmoid", "Tanh"}
"""What ONNX Runtime makes one node of with the float layer in front of it."""
PROFILED_RUNS = 5


@dataclass(frozen=True, slots=True)
class Known:
    """What was decided before the runtime saw the file. kept: node -> why it stays float; placed: those by cost.

    whole: why all of it is float, or runs as it does here; empty for most files.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    placed: frozenset[str] = frozenset()
    whole: str = ""

    @classmethod
    def of(cls, plan: Plan) -> Known:
        """From the plan that the file was made by."""
        return cls({name: choice.why for name, choice in plan.kept.items()}, plan.placed)


@dataclass(frozen=True, slots=True)
class _Names:
    """How to find a node of the file again. writers: tensor -> node; activation_of: activation -> layer in front."""

    writers: dict[str, str]
    activation_of: dict[str, str]
    nodes: dict[str, Node]

    @classmethod
    def of(cls, model: Model) -> _Names:
        nodes = model.nodes()
        writers = {value.name or "": node.name or "" for node in nodes for value in node.outputs}
        activation_of = {}
        for node in nodes:
            before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            fused = node.op_type in FUSED_ACTIVATIONS
            if before is not None and fused and isinstance(QUANTIZATION_RULES.get(before.op_type), WeightedRule):
                activation_of[node.name or ""] = before.name or ""
        return cls(writers, activation_of, {node.name or "": node for node in nodes})

    def original(self, node: onnx.NodeProto) -> str:
        """The name in the file of a node of the optimized graph."""
        name = self.of_name(node.name or _first(node.output))
        if name not in self.nodes and node.op_type not in LAYOUT_OPS:  # QuickGelu, of Sigmoid and Mul, has its own
            name = self.writers.get(SUFFIX.sub("", _first(node.output)), name)
        return name if node.op_type in FUSED_ACTIVATIONS else self.activation_of.get(name, name)

    def of_name(self, name: str) -> str:
        """The same by the name alone, as profiles have it."""
        name = SUFFIX.sub("", name)
        if name not in self.nodes:  # some fused nodes, and those in a layout of the runtime's own, bear their output's
            name = self.writers.get(name, name)
        if name not in self.nodes and "/" in name:  # MatMul and Add made one Gemm: `NAME/MatMulAddFusion`
            name = name.rpartition("/")[0]
        return name


def audit(optimized: Path, model: Model, known: Known, times: Mapping[str, float] | None = None) -> Audit:
    """Count the nodes of the graph that ONNX Runtime saved as `optimized`, and explain those in float.

    model: the file that it was made of. times: microseconds of one run of every node of the optimized graph.
    """
    graph = onnx.load(str(optimized), load_external_data=False).graph
    names, times = _Names.of(model), times or {}
    integer, others = (
        # those that the runtime puts between its layouts are neither here nor there
        [node for node in nodes if node.op_type not in LAYOUT_OPS or names.original(node) in names.nodes]
        for nodes in sort_nodes(graph)
    )
    islands: list[FloatNode] = []
    placed: list[FloatNode] = []
    layers: list[LayerTime] = []
    for node in others:
        name = names.original(node)
        chosen = name in known.placed
        (placed if chosen else islands).append(_island(node, name, names, known, times.get(node.name)))
        layers.append(LayerTime(name, node.op_type, "float", times.get(node.name)))
    layers += [LayerTime(names.original(node), node.op_type, "integer", times.get(node.name)) for node in integer]
    return Audit(
        integer=len(integer),
        float=len(islands) + len(placed),
        islands=tuple(islands),
        placed=tuple(placed),
        layers=tuple(layers),
        total_us=sum(times.values()) if times else None,
        saturating=tuple(saturating(model)),
    )


def _island(node: onnx.NodeProto, name: str, names: _Names, known: Known, us: float | None) -> FloatNode:
    if name in known.kept:
        rule = "placed" if name in known.placed else "kept"
        return FloatNode(name, node.op_type, known.kept[name], None, rule, us)
    if known.whole:
        return FloatNode(name, node.op_type, known.whole, None, "recipe", us)
    found = names.nodes.get(name)
    if found is None:
        return FloatNode(name, node.op_type, "the runtime made it of others", None, "made", us)
    why = reason(found)
    return FloatNode(name, node.op_type, why.why, why.remedy, why.rule, us)


def node_names(model: Model) -> Callable[[str], str]:
    """What turns a name of the optimized graph into that of a node of `model`."""
    return _Names.of(model).of_name


def profiled(session: Session, feeds: Mapping[str, NDArray[Any]], runs: int = PROFILED_RUNS) -> dict[str, float]:
    """Microseconds of one run of each node by the runtime's own clock, median over runs; the first is not counted."""
    for _ in range(runs + 1):
        session.run_all(feeds)
    found = {}
    for name, (_, times) in session.node_times().items():
        per_run = np.array(times)[: len(times) // (runs + 1) * (runs + 1)].reshape(runs + 1, -1).sum(axis=1)
        found[name] = float(np.median(per_run[1:]))
    return found


def sort_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that work on codes, and those that work on float data; Q, DQ and work on shapes belong to neither."""
    codes = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    aside: set[str] = {tensor.name for tensor in graph.initializer}
    integer, others = [], []
    sums: set[str] = set()
    for node in graph.node:
        if node.op_type in SUMS:
            sums.update(node.output)
        elif node.op_type in ("Cast", "Mul") and any(name in sums for name in node.input):
            sums.update(node.output if node.op_type == "Cast" else ())
            continue
        if node.op_type == "Sum" and len(node.input) == 1:  # emit's own copy, which keeps a node in float
            continue
        if node.op_type in CONVERTING_OPS:
            if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                codes.add(_first(node.output))
            elif _first(node.input) in aside:
                aside.update(node.output)
            continue
        if node.op_type in SHAPE_OPS or all(name in aside or not name for name in node.input):
            aside.update(node.output)
        elif node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS or _works_on(codes, node):
            integer.append(node)
            if not _writes_float(node):
                codes.update(node.output)
        else:
            others.append(node)
    return integer, others


def _works_on(codes: set[str], node: onnx.NodeProto) -> bool:
    """Whether a node reads codes and, unlike a Cast of pixels, does not make numbers of them."""
    return _first(node.input) in codes and not any(a.name == "to" and a.i in FLOATS for a in node.attribute)


def _writes_float(node: onnx.NodeProto) -> bool:
    """Whether an integer kernel gives its result in float: QGemm without the scale of an output, input 7."""
    return node.op_type == "MatMulIntegerToFloat" or (node.op_type == "QGemm" and not "".join(node.input[7:8]))


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "")


WEIGHTS_AT = {"QLinearConv": (2, 3), "QLinearMatMul": (2, 3), "QGemm": (2, 3)}
"""Where integer operators have the zero point of their data, and their weights."""


def saturating(model: Model) -> Iterator[Saturation]:
    """The layers in which two products of 8 bits can be more than 16 hold, whatever the codes: see `saturation`."""
    for node in model.nodes():
        found = _product(node)
        if found is None:
            continue
        codes, axis = found
        groups = attribute(node, "group", 1)
        if codes.ndim > 2 and groups > 1 and codes.shape[:2] == (groups, 1):
            continue  # depthwise kernels widen first
        excess = worst_pair_ratio(codes, axis)
        if excess.max() > 1:
            yield Saturation(node.name or "", float(excess.max()), int((excess > 1).sum()), codes.shape[axis])


def _product(node: Node) -> tuple[NDArray[np.int8], int] | None:
    """Weights and their axis of outputs, where uint8 is multiplied with constant int8; None for other nodes."""
    rule = QUANTIZATION_RULES.get(node.op_type)
    if isinstance(rule, WeightedRule) and node.op_type != "ConvTranspose":
        data, weight = dequantizer_of(input_of(node, 0)), dequantizer_of(input_of(node, 1))
        kind = None if data is None or data.inputs[0] is None else data.inputs[0].dtype
        codes = None if weight is None else constant_array(weight.inputs[0])
        axis = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else rule.output_axis
    elif node.op_type in WEIGHTS_AT:
        zero, place = WEIGHTS_AT[node.op_type]
        stored, codes = input_of(node, zero), constant_array(input_of(node, place))
        kind = None if stored is None else stored.dtype
        axis = 0 if node.op_type == "QLinearConv" or attribute(node, "transB", 0) else 1
    elif node.op_type in SUMS:
        kind, codes = (
            DataType.UINT8,
            constant_array(input_of(node, 1)),
        )  # behind a DynamicQuantizeLinear there is nothing else
        axis = 0 if node.op_type == "ConvInteger" else 1
    else:
        return None
    if kind != DataType.UINT8 or codes is None or codes.dtype != np.int8 or codes.ndim < 2:
        return None
    return codes, axis
