"""The audit counts what ONNX Runtime runs in integers and in float, and gives the reason for every float node.

It reads the runtime's own optimized graph, the only proof that DequantizeLinear -> operator -> QuantizeLinear was
fused. Fused nodes are found again in the file by their names less the runtime's suffixes. `audit_file` does this for a
file of any tool, with the cost of each node.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qconv import storage
from qconv.auditing.code_forms import find_code_forms
from qconv.auditing.fusion_rules import (
    PLAIN_LAYOUT_POOL,
    FloatReason,
    find_dequantizer,
    find_float_reason,
    reads_16_bits,
)
from qconv.config.choices import as_type
from qconv.config.recipe import Recipe
from qconv.config.serialization import recipe_from_dict
from qconv.config.targets import TARGETS
from qconv.ir import files, subgraph
from qconv.ir.files import Source, find_carried_size, is_quantized, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.metadata import read_placed_nodes, read_recipe
from qconv.ir.model import DataType, Model, Node, attribute, constant_array, input_of
from qconv.ir.operators import QUANTIZATION_RULES, WeightedRule, with_
from qconv.ir.packed_codes import unpack_codes
from qconv.planning.eligibility import HEAD_REASON, NO_16_BIT_KERNEL
from qconv.planning.plan import Plan
from qconv.planning.planner import KEPT_FLOAT_BY_OPTION
from qconv.quantization.saturation import worst_pair_ratio
from qconv.results.quantize import Audit, FloatNode, LayerTime, Saturation
from qconv.runtime.benchmark import Cpu, TimingConditions, detect_cpu
from qconv.runtime.session import RUNTIME_VERSION, Session, make_random_inputs

INTEGER_OPS = frozenset({"QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"})

CONVERTING_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "ReorderInput", "ReorderOutput"}
)

INT32_SUM_OPS = frozenset({"ConvInteger", "MatMulInteger"})
"""They write the sums of products, which a Cast and a Mul by the scale make numbers of."""

FLOAT_TYPES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})

SHAPE_OPS = frozenset({"Shape", "Size", "ConstantOfShape", "Range", "NonZero"})

FUSED_NAME_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|_pre_q)+$")

LAYOUT_OPS = frozenset({"Transpose", "Reshape"})

FUSED_ACTIVATIONS = with_(fused_behind_layer=True)
"""What ONNX Runtime makes one node of with the float layer in front of it."""

PROFILED_RUNS = 5


@dataclass(frozen=True, slots=True)
class PlannedReasons:
    """What was decided before the runtime saw the file. kept: node -> why it stays float; placed: those by cost.

    whole: why all of it is float, or runs as it does here; empty for most files.
    """

    kept: Mapping[str, str] = field(default_factory=dict)
    placed: frozenset[str] = frozenset()
    whole: str = ""

    @classmethod
    def of(cls, plan: Plan) -> PlannedReasons:
        """From the plan that the file was made by."""
        return cls({name: choice.why for name, choice in plan.kept.items()}, plan.placed)


@dataclass(frozen=True, slots=True)
class _NodeNames:
    """How to find a node of the file again. writers: tensor -> node; activation_of: activation -> layer in front."""

    writers: dict[str, str]
    activation_of: dict[str, str]
    nodes: dict[str, Node]

    @classmethod
    def of(cls, model: Model) -> _NodeNames:
        nodes = model.nodes()
        names = {
            node: node.name or _name_by_output(node.op_type, [v.name or "" for v in node.outputs]) for node in nodes
        }
        writers = {value.name: names[node] for node in nodes for value in node.outputs if value.name}
        activation_of = {}
        for node in nodes:
            before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            fused = node.op_type in FUSED_ACTIVATIONS
            if before is not None and fused and isinstance(QUANTIZATION_RULES.get(before.op_type), WeightedRule):
                activation_of[names[node]] = names[before]
        return cls(writers, activation_of, {names[node]: node for node in nodes})

    def original(self, node: onnx.NodeProto) -> str:
        """The name in the file of a node of the optimized graph."""
        name = self.of_name(node.name or _first_name(node.output))
        if name not in self.nodes and node.op_type not in LAYOUT_OPS:  # QuickGelu, of Sigmoid and Mul, has its own
            name = self.writers.get(FUSED_NAME_SUFFIX.sub("", _first_name(node.output)), name)
        name = name or _name_by_output(node.op_type, node.output)
        return name if node.op_type in FUSED_ACTIVATIONS else self.activation_of.get(name, name)

    def of_name(self, name: str) -> str:
        """The same by the name alone, as profiles have it."""
        name = FUSED_NAME_SUFFIX.sub("", name)
        if name not in self.nodes:  # some fused nodes, and those in a layout of the runtime's own, bear their output's
            name = self.writers.get(name, name)
        if name not in self.nodes and "/" in name:  # `NAME/MatMulAddFusion`, `NAME/QuickGeluFusion/`
            name = name.rstrip("/").rpartition("/")[0]
        return name


def _name_by_output(op_type: str, outputs: Iterable[str]) -> str:
    """The name of a node without one: its operator and its first result that has a name."""
    return " of ".join([op_type, *[name for name in outputs if name][:1]])


def audit(optimized: Path, model: Model, known: PlannedReasons, times: Mapping[str, float] | None = None) -> Audit:
    """Count the nodes of the graph that ONNX Runtime saved as `optimized`, and explain those in float.

    model: the file that it was made of. times: microseconds of one run of every node of the optimized graph.
    """
    graph = onnx.load(str(optimized), load_external_data=False).graph
    names, times = _NodeNames.of(model), times or {}
    integer, others = (
        # those that the runtime puts between its layouts are neither here nor there
        [node for node in nodes if node.op_type not in LAYOUT_OPS or names.original(node) in names.nodes]
        for nodes in split_nodes(graph)
    )
    islands: list[FloatNode] = []
    placed: list[FloatNode] = []
    layers: list[LayerTime] = []
    for node in others:
        name = names.original(node)
        chosen = name in known.placed
        (placed if chosen else islands).append(_describe_float_node(node, name, names, known, times.get(node.name)))
        layers.append(LayerTime(name, node.op_type, "float", times.get(node.name)))
    layers += [LayerTime(names.original(node), node.op_type, "integer", times.get(node.name)) for node in integer]
    by_name = {layer.node: layer.us for layer in layers if layer.us is not None}
    return Audit(
        integer=len(integer),
        float=len(islands) + len(placed),
        islands=tuple(islands),
        placed=tuple(placed),
        layers=tuple(layers),
        total_us=sum(times.values()) if times else None,
        saturating=tuple(find_saturating_layers(model)),
        slow=tuple(
            _explain_float_node(names.original(node), node, PLAIN_LAYOUT_POOL, times.get(node.name))
            for node in integer
            if node.op_type == "MaxPool"
        ),
        on_codes=tuple(find_code_forms(model, by_name)),
    )


def _describe_float_node(
    node: onnx.NodeProto, name: str, names: _NodeNames, known: PlannedReasons, us: float | None
) -> FloatNode:
    if name in known.kept:
        why = known.kept[name]
        rule = "placed" if name in known.placed else "head" if why == HEAD_REASON else "kept"
        return FloatNode(name, node.op_type, why, None, rule, us)
    if known.whole:
        return FloatNode(name, node.op_type, known.whole, None, "recipe", us)
    found = names.nodes.get(name)
    if found is None:
        return FloatNode(name, node.op_type, "the runtime made it of others", None, "made", us)
    return _explain_float_node(name, node, find_float_reason(found), us)


def _explain_float_node(name: str, node: onnx.NodeProto, reason: FloatReason, us: float | None) -> FloatNode:
    return FloatNode(name, node.op_type, reason.why, reason.remedy, reason.rule, us)


def make_node_namer(model: Model) -> Callable[[str], str]:
    """What turns a name of the optimized graph into that of a node of `model`."""
    return _NodeNames.of(model).of_name


def profile_nodes(session: Session, feeds: Mapping[str, NDArray[Any]], runs: int = PROFILED_RUNS) -> dict[str, float]:
    """Microseconds of one run of each node by the runtime's own clock, median over runs; the first is not counted."""
    for _ in range(runs + 1):
        session.run_all(feeds)
    found = {}
    for name, (_, times) in session.node_times().items():
        per_run = np.array(times)[: len(times) // (runs + 1) * (runs + 1)].reshape(runs + 1, -1).sum(axis=1)
        found[name] = float(np.median(per_run[1:]))
    return found


def split_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that work on codes, and those that work on float data; Q, DQ and work on shapes belong to neither."""
    codes = {value.name for value in graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    aside: set[str] = {tensor.name for tensor in graph.initializer}
    integer, others = [], []
    sums: set[str] = set()
    for node in graph.node:
        if node.op_type in INT32_SUM_OPS:
            sums.update(node.output)
        elif node.op_type in ("Cast", "Mul") and any(name in sums for name in node.input):
            sums.update(node.output if node.op_type == "Cast" else ())
            continue
        if node.op_type == "Sum" and len(node.input) == 1:  # emit's own copy, which keeps a node in float
            continue
        if node.op_type in CONVERTING_OPS:
            if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                codes.add(_first_name(node.output))
            elif _first_name(node.input) in aside:
                aside.update(node.output)
            continue
        if node.op_type in SHAPE_OPS or all(name in aside or not name for name in node.input):
            aside.update(node.output)
        elif node.op_type.startswith("QLinear") or node.op_type in INTEGER_OPS or _has_integer_input(codes, node):
            integer.append(node)
            if not _has_float_output(node):
                codes.update(node.output)
        else:
            others.append(node)
    return integer, others


def _has_integer_input(codes: set[str], node: onnx.NodeProto) -> bool:
    """Whether a node reads codes and, unlike a Cast of pixels, does not make numbers of them."""
    return _first_name(node.input) in codes and not any(a.name == "to" and a.i in FLOAT_TYPES for a in node.attribute)


def _has_float_output(node: onnx.NodeProto) -> bool:
    """Whether an integer kernel gives its result in float: QGemm without the scale of an output, input 7."""
    return node.op_type == "MatMulIntegerToFloat" or (node.op_type == "QGemm" and not "".join(node.input[7:8]))


def _first_name(names: Iterable[str]) -> str:
    return next(iter(names), "")


WEIGHT_INPUTS = {"QLinearConv": (2, 3), "QLinearMatMul": (2, 3), "QGemm": (2, 3)}
"""Where integer operators have the zero point of their data, and their weights."""


def find_saturating_layers(model: Model) -> Iterator[Saturation]:
    """The layers in which two products of 8 bits can be more than 16 hold, whatever the codes: see `saturation`."""
    for node in model.nodes():
        found = _read_int8_weights(node)
        if found is None:
            continue
        codes, axis = found
        groups = attribute(node, "group", 1)
        if codes.ndim > 2 and groups > 1 and codes.shape[:2] == (groups, 1):
            continue  # depthwise kernels widen first
        excess = worst_pair_ratio(codes, axis)
        if excess.max() > 1:
            yield Saturation(node.name or "", float(excess.max()), int((excess > 1).sum()), codes.shape[axis])


def _read_int8_weights(node: Node) -> tuple[NDArray[np.int8], int] | None:
    """Weights and their axis of outputs, where uint8 is multiplied with constant int8; None for other nodes."""
    rule = QUANTIZATION_RULES.get(node.op_type)
    if isinstance(rule, WeightedRule) and node.op_type != "ConvTranspose":
        data, weight = find_dequantizer(input_of(node, 0)), find_dequantizer(input_of(node, 1))
        kind = None if data is None or data.inputs[0] is None else data.inputs[0].dtype
        codes = None if weight is None else constant_array(weight.inputs[0])
        axis = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else rule.output_axis
    elif node.op_type in WEIGHT_INPUTS:
        zero, place = WEIGHT_INPUTS[node.op_type]
        stored, codes = input_of(node, zero), constant_array(input_of(node, place))
        kind = None if stored is None else stored.dtype
        axis = 0 if node.op_type == "QLinearConv" or attribute(node, "transB", 0) else 1
    elif node.op_type in INT32_SUM_OPS:
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


FILE_FORMATS = (
    ("QOperator", ("QLinear", "QGemm"), "integer operators in the file itself; qconv writes Q/DQ, which every runtime "
     "can take apart again, and ONNX Runtime fuses into these same operators"),
    ("dynamic", ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"), "ranges are found anew at every run"),
    ("Q/DQ", ("QuantizeLinear",), "operators between quantizers and dequantizers"),
    ("weights only", ("DequantizeLinear",), "codes for weights, arithmetic in float"),
)  # fmt: skip
"""Name, what its operators begin with, and what it means; the first that is found counts."""


@dataclass(frozen=True, slots=True)
class FileAudit:
    """What was found of one file. recipe: of a file by qconv, empty for others.

    widened: whether qconv has widened weight scales until no pair of products overflowed on its pictures.
    """

    name: str
    format: str
    meaning: str
    widened: bool
    recipe: dict[str, Any]
    audit: Audit
    cpu: Cpu
    threads: int
    version: str = RUNTIME_VERSION

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        layers = [{"node": n.node, "op": n.op, "runs": n.runs, "us": n.us} for n in self.audit.layers]
        return {
            "schema": 1,
            "model": self.name,
            "format": self.format,
            "by_qconv": bool(self.recipe),
            "onnxruntime": self.version,
            "threads": self.threads,
            "cpu": self.cpu.as_dict(),
            **self.audit.as_dict(),
            "layers": layers,
        }


def detect_format(proto: Any) -> tuple[str, str]:
    """What a file is, by FORMATS, and what that means."""
    kinds = {node.op_type for node in proto.graph.node}
    found = (
        (name, meaning) for name, begins, meaning in FILE_FORMATS if any(kind.startswith(begins) for kind in kinds)
    )
    plain = ("weights only", FILE_FORMATS[-1][2]) if is_quantized(proto) else ("float", "nothing is quantized")
    return next(found, plain)


def audit_file(source: Source, *, threads: int, batch: int | None, size: tuple[int, int] | None) -> FileAudit:
    """Load, optimize, run and take apart. Raises QconvError for what does not load or run.

    Args:
        source: The file.
        threads: Of ONNX Runtime.
        batch: Images a run; None for the model's own.
        size: Height and width; None for the model's own, or those that a file by qconv was made with.
    """
    asked = TimingConditions(as_type(threads, int, "--threads"), batch, size)
    threads = asked.threads or 1
    proto = read_proto(source)
    name, meaning = detect_format(proto)
    model = load_unchanged(proto, source)
    with (
        subgraph.runnable_with_outputs(model, ()) as runnable,
        storage.scratch_folder(2 * files.total_weight_bytes(model)) as folder,
    ):
        optimized = folder / "optimized.onnx"
        session = Session(
            runnable, name=source.name, threads=threads, save_optimized=optimized, profile=folder / "profile"
        )
        known = find_carried_size([source]) if asked.size is None else asked.size
        times = profile_nodes(session, make_random_inputs(session, asked.batch, known))
        told = read_recipe(model.inner.metadata_props)
        recipe = recipe_from_dict(told) if told else None
        unpack_codes(model)
        audited = audit(optimized, model, _read_planned_reasons(model, recipe), times)
    widened = (
        recipe is not None and TARGETS[recipe.target].saturates_int16_pairs and recipe.saturation_safe is not False
    )
    return FileAudit(source.name, name, meaning, widened, told, audited, detect_cpu(), threads)


def _read_planned_reasons(model: Model, recipe: Recipe | None) -> PlannedReasons:
    """What qconv had decided when it wrote the file; nothing for others. recipe: None where it is not known."""
    kept = read_placed_nodes(model.inner.metadata_props)
    placed = frozenset(kept)
    if recipe is None:
        return PlannedReasons(kept, placed)
    for node in model.nodes():
        if recipe.activation_bits == 8 and reads_16_bits(node):
            kept[node.name or ""] = NO_16_BIT_KERNEL  # as it was told to
        if any(fnmatch.fnmatchcase(node.name or "", glob) for glob in recipe.keep_float):
            kept[node.name or ""] = KEPT_FLOAT_BY_OPTION
        elif node.op_type in recipe.keep_float_op:
            kept[node.name or ""] = f"{KEPT_FLOAT_BY_OPTION}-op"
    target, whole = TARGETS[recipe.target], ""
    if not target.on_ort:
        whole = f"written for {target.name}: ONNX Runtime's CPU provider wants quantizers elsewhere"
    elif recipe.activation_bits == 32:
        whole = "only weights are quantized"
    return PlannedReasons(kept, placed, whole)
