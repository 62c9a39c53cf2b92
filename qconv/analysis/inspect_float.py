"""This module tells what is in a float model, what a default run makes of it, and what its weights foretell.

It looks at no image: the model is loaded, folded and planned as `quantize` does it without any option.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qconv.analysis.weight_checks import (
    DefaultHandling,
    MeanAndDeviation,
    WeightProblem,
    WeightStatistics,
    check_weights,
    collect_batch_norm_statistics,
    count_relu6,
)
from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding, QconvError, Skipped
from qconv.ir.files import Source, declared_opset, file_bytes, iter_tensors, metadata_of, read_proto
from qconv.ir.load import load
from qconv.ir.metadata import read_version
from qconv.ir.model import DataType, Model, Node, Value, constant_array, dims, input_of
from qconv.ir.rewriting import standard_op_type
from qconv.passes import fold
from qconv.pipeline.prepare import plan_folded, runs_on_ort
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.planner import is_quantizable_layer
from qconv.quantizer import PerBlock, PerChannel

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
"""Domains whose operators ONNX Runtime has itself."""


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """An input or an output of the model: name, type and shape."""

    name: str
    type: str
    shape: tuple[int | None, ...] | None

    @classmethod
    def of(cls, value: Value) -> TensorSignature:
        """Read what the model declares."""
        sizes = dims(value)
        type_ = "" if value.dtype is None else value.dtype.name.lower()
        return cls(value.name or "", type_, None if sizes is None else tuple(sizes))

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {"name": self.name, "type": self.type, "shape": None if self.shape is None else list(self.shape)}


@dataclass(frozen=True, slots=True)
class FloatLayerRow:
    """A layer of the folded model.

    Attributes:
        parameters: Weights and biases.
        share: Of the parameters of all layers.
        bits, scheme, granularity: Of its weights in a default run; None where they stay float.
        runs: "integer" or "float", and then why.
        troubles: What its weights foretell.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    share: float
    bits: int | None
    scheme: str | None
    granularity: str | None
    runs: str
    why: str
    ranges: WeightStatistics
    troubles: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` and `--csv` print."""
        return {
            "name": self.name,
            "op": self.op,
            "shape": list(self.shape),
            "parameters": self.parameters,
            "share": self.share,
            "bits": self.bits,
            "scheme": self.scheme,
            "granularity": self.granularity,
            "runs": self.runs,
            "why": self.why,
            "output_ratio": self.ranges.output_ratio,
            "input_ratio": self.ranges.input_ratio,
            "outlier": self.ranges.outlier,
            "offset": self.ranges.offset,
            "troubles": list(self.troubles),
        }


@dataclass(frozen=True, slots=True)
class FloatOperatorGroup:
    """Operators that a default run leaves in float for one reason. by_choice: because that is faster."""

    op: str
    why: str
    nodes: tuple[str, ...]
    by_choice: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {"op": self.op, "why": self.why, "by_choice": self.by_choice, "nodes": list(self.nodes)}


@dataclass(frozen=True, slots=True)
class FloatModel:
    """What was found in a float model.

    Attributes:
        operators: Counts, as in the file; layers and the plan are those of the folded network.
        parameters: Of the network, with weights that it computes from constants.
        stored: Bytes of all float tensors in the file.
        norms: BatchNormalizations; folded: how many fold into a layer; converted: how many become depthwise layers.
        integer, absorbed, left: What a default run makes of the operators.
    """

    name: str
    bytes: int
    opset: int
    ir_version: int
    producer: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    operators: Mapping[str, int]
    parameters: int
    stored: int
    norms: int
    folded: int
    converted: int
    findings: tuple[Finding, ...]
    target: str
    integer: int
    absorbed: int
    left: tuple[FloatOperatorGroup, ...]
    relu6: int
    layers: tuple[FloatLayerRow, ...]
    troubles: tuple[WeightProblem, ...]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The main table, as `--csv` writes it."""
        return [layer.as_dict() for layer in self.layers]

    @property
    def refused(self) -> list[Skipped]:
        """What folding left alone."""
        return [finding for finding in self.findings if isinstance(finding, Skipped)]

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": 1,
            "model": self.name,
            "kind": "float",
            "bytes": self.bytes,
            "opset": self.opset,
            "ir_version": self.ir_version,
            "producer": self.producer,
            "inputs": [end.as_dict() for end in self.inputs],
            "outputs": [end.as_dict() for end in self.outputs],
            "operators": dict(self.operators),
            "parameters": {"count": self.parameters, "bytes": self.stored},
            "batch_normalizations": {
                "count": self.norms,
                "folded": self.folded,
                "converted": self.converted,
            },
            "changes": [
                {"step": found.step, "where": found.where, "what": found.what}
                for found in self.findings
                if isinstance(found, Change)
            ],
            "skipped": [{"step": found.step, "where": found.where, "why": found.why} for found in self.refused],
            "relu6": self.relu6,
            "default_run": {
                "target": self.target,
                "integer": self.integer,
                "absorbed": self.absorbed,
                "float": [left.as_dict() for left in self.left],
            },
            "layers": self.rows,
            "troubles": [trouble.as_dict() for trouble in self.troubles],
        }


def inspect_float(source: Source, target: str) -> FloatModel:
    """Read, fold and plan as `quantize` would without any option. Raises QconvError for what is no float model."""
    proto = read_proto(source)
    refuse_custom_operators(proto, source)
    stored = sum(
        int(prod(t.dims) * width // 8) for t in iter_tensors(proto.graph) if (width := _float_width(t.data_type))
    )
    size, opset, ir_version, producer = (
        file_bytes(proto, source),
        declared_opset(proto),
        proto.ir_version,
        read_producer(proto),
    )
    operators = _count_ranked(node.op_type for node in proto.graph.node if node.op_type != "Constant")
    model, _ = load(proto, source)
    inputs, outputs = (tuple(map(TensorSignature.of, ends)) for ends in (model.graph.inputs, model.graph.outputs))
    parameters = sum(prod(value.shape.numpy()) for value in _find_float_constants(model) if value.shape is not None)
    norms, known = _count_batch_norms(model), collect_batch_norm_statistics(model)
    recipe = Recipe(target=target)
    findings = fold.run_float_passes(model, for_ort=runs_on_ort(recipe))
    folded = sum(isinstance(f, Change) and f.kind.startswith("BatchNormalization folded") for f in findings)
    plan = plan_folded(model, recipe, None)
    layers, troubles = _make_layer_rows(model, plan, recipe, known)
    return FloatModel(
        name=source.name,
        bytes=size,
        opset=opset,
        ir_version=ir_version,
        producer=producer,
        inputs=inputs,
        outputs=outputs,
        operators=operators,
        parameters=parameters,
        stored=stored,
        norms=norms,
        folded=folded,
        converted=norms - folded - _count_batch_norms(model),
        findings=tuple(findings),
        target=target,
        integer=len(plan.integer),
        absorbed=len(plan.absorbed),
        left=_group_float_operators(model, plan),
        relu6=count_relu6(model),
        layers=tuple(layers),
        troubles=tuple(troubles),
    )


def refuse_custom_operators(proto: Any, source: Source) -> None:
    """Raise QconvError for operators that neither ONNX Runtime nor the file itself defines."""
    own = {function.domain for function in proto.functions}
    custom = [node for node in proto.graph.node if node.domain not in KNOWN_DOMAINS | own]
    if custom:
        named = ", ".join(sorted({f"{node.op_type} of {node.domain}" for node in custom}))
        raise QconvError(
            f"{source.name} has operators that ONNX Runtime does not know: {named}.",
            "take them out, and do in front of and behind the model what they do.",
        )


def read_producer(proto: Any) -> str:
    """Read the name and version of the program that wrote the file."""
    version = read_version(metadata_of(proto))
    return f"qconv {version}" if version else f"{proto.producer_name} {proto.producer_version}".strip()


def _float_width(kind: int) -> int:
    dtype = DataType(kind)
    return int(dtype.bitwidth) if dtype.is_floating_point() else 0


def _count_batch_norms(model: Model) -> int:
    return sum(standard_op_type(node) == "BatchNormalization" for node in model.nodes())


def _find_float_constants(model: Model) -> list[Value]:
    return [value for value in model.graph.initializers.values() if value.dtype in (DataType.FLOAT, DataType.DOUBLE)]


def _count_ranked(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _make_layer_rows(
    model: Model, plan: Plan, recipe: Recipe, known: Mapping[str, MeanAndDeviation]
) -> tuple[list[FloatLayerRow], list[WeightProblem]]:
    planned = {layer.node: layer for layer in plan.layers}
    nodes = [node for node in model.nodes() if is_quantizable_layer(node) and standard_op_type(node)]
    sizes = {node: _count_parameters(node) for node in nodes}
    total = sum(sizes.values())
    rows, troubles = [], []
    for node in nodes:
        layer = planned.get(node)
        granularity = None if layer is None else describe_granularity(layer)
        ranges, found = check_weights(
            model, node, known, DefaultHandling(granularity == "per-channel", bool(recipe.equalize))
        )
        troubles += found
        rows.append(
            _make_layer_row(node, layer, plan, (sizes[node], sizes[node] / total if total else 0.0), ranges, found)
        )
    return rows, troubles


def _make_layer_row(
    node: Node,
    layer: LayerPlan | None,
    plan: Plan,
    size: tuple[int, float],
    ranges: WeightStatistics,
    found: list[WeightProblem],
) -> FloatLayerRow:
    weight = constant_array(input_of(node, 1))
    assert weight is not None
    kept = plan.kept.get(node.name or "")
    spec = None if layer is None else layer.weight
    return FloatLayerRow(
        name=node.name or "",
        op=node.op_type,
        shape=weight.shape,
        parameters=size[0],
        share=size[1],
        bits=None if spec is None else spec.bits,
        scheme=None if spec is None else "symmetric" if spec.symmetric else "asymmetric",
        granularity=None if layer is None else describe_granularity(layer),
        runs="integer" if kept is None and node in plan.integer else "float",
        why="" if kept is None else kept.why,
        ranges=ranges,
        troubles=tuple(trouble.kind for trouble in found),
    )


def describe_granularity(layer: LayerPlan) -> str:
    """Describe the granularity of a layer's weights in the words of the options."""
    return {PerChannel: "per-channel", PerBlock: "per-block"}.get(type(layer.weight.granularity), "per-tensor")


def _count_parameters(node: Node) -> int:
    found = (constant_array(input_of(node, index)) for index in (1, 2))
    return sum(numbers.size for numbers in found if numbers is not None)


def _group_float_operators(model: Model, plan: Plan) -> tuple[FloatOperatorGroup, ...]:
    """Group operators of one kind and one reason, most first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for node in model.nodes():
        kept = plan.kept.get(node.name or "")
        if kept is not None:
            why = (
                kept.why.partition(":")[0] if node.name in plan.placed else kept.why
            )  # microseconds are each one's own
            groups.setdefault((node.op_type, why), []).append(node.name or "")
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(
        FloatOperatorGroup(op, why, tuple(names), plan.placed.issuperset(names)) for (op, why), names in ranked
    )
