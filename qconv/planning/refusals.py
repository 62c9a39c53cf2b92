"""Why a node that has a rule stays float all the same, read off the node itself: one function a kind of rule.

And why a layer that has codes runs in float.
"""

from __future__ import annotations

import numpy as np

from qconv.config.recipe import Recipe
from qconv.ir.model import DataType, Node, attribute, clip_bounds, constant_array, constant_scalar, input_of, rank
from qconv.ir.operators import (
    CLIPPING_ACTIVATIONS,
    ComputingRule,
    ConcatRule,
    IntegerDomainRule,
    Rule,
    TransparentRule,
    WeightedRule,
)
from qconv.planning.plan import Layer, Plan

WIDE_CODES = "codes of 16 bits have no integer kernel"
MASK = 1e6
"""Constants from here on stand for infinity, as those that are added in front of a Softmax."""


def refusal(node: Node, rule: Rule) -> str | None:
    """The reason, or None for a node that can run on codes."""
    return _BY_RULE[type(rule)](node)


def _refuse_weighted(node: Node) -> str | None:
    weight, bias = input_of(node, 1), input_of(node, 2)
    if constant_array(weight) is None:
        if node.op_type == "MatMul":
            return None
        return "its weights are computed, not constant"
    if bias is not None and constant_array(bias) is None:
        return "its bias is computed, not constant"
    if any(value is not None and value.dtype not in (DataType.FLOAT, None) for value in node.inputs[:3]):
        return "its data is not float32"
    if node.op_type == "MatMul" and weight is not None and rank(weight) != 2:
        return "its weight is no matrix"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
            return "a Gemm with transA, alpha or beta has no integer kernel"
        if bias is not None and rank(bias) != 1:
            return "its third input is no bias vector"
    return None


def _refuse_computing(node: Node) -> str | None:
    for value in node.inputs[:2]:
        if value is not None and value.dtype not in (DataType.FLOAT, None):
            return "its data is not float"
        numbers = constant_array(value)
        if numbers is not None and np.abs(numbers).max(initial=0) >= MASK:
            return "its constant is a mask that 8 bits cannot hold beside data"
    if node.op_type == "Identity" and node.outputs[0].is_graph_output():
        return "it returns what it reads"
    if node.op_type == "AveragePool":
        if any(step != 1 for step in attribute(node, "dilations", [])):
            return "a dilated AveragePool has no integer kernel"
        if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
            return "with ceil_mode and count_include_pad the integer AveragePool divides by other numbers"
    return None


def _refuse_transparent(node: Node) -> str | None:
    data = node.inputs[0]
    if data is None or data.dtype not in (DataType.FLOAT, None) or constant_array(data) is not None:
        return "its data is not float"
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses():
        return "its indices are read"
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        return "ONNX Runtime resizes codes only by nearest neighbour"
    return None


def _refuse_joining(node: Node) -> str | None:
    return None if all(v is None or v.dtype in (DataType.FLOAT, None) for v in node.inputs) else "its data is not float"


def _refuse_on_codes(node: Node) -> str | None:
    data = node.inputs[0]
    if data is None or data.dtype not in (DataType.FLOAT, None):
        return "its data is not float"
    if node.op_type in CLIPPING_ACTIVATIONS and clip_bounds(node) is None:
        return "its bounds are computed, not constant"
    if node.op_type == "Pad":
        fill = input_of(node, 2)
        if attribute(node, "mode", "constant") == "constant" and fill is not None and constant_scalar(fill) != 0:
            return "it pads with something else than zero"
    return None


_BY_RULE = {
    WeightedRule: _refuse_weighted,
    ComputingRule: _refuse_computing,
    TransparentRule: _refuse_transparent,
    ConcatRule: _refuse_joining,
    IntegerDomainRule: _refuse_on_codes,
}


def why_dequantized(layer: Layer, plan: Plan, recipe: Recipe) -> str | None:
    """Why a layer that has codes runs in float all the same; None where it does not."""
    if layer.data is None:
        return "only weights are quantized"
    read = plan.activations.get(layer.data)
    if read is not None and read.spec is not None and read.spec.bits == 16:
        return WIDE_CODES
    if layer.weight.bits == 16:
        return "weights of 16 bits have no integer kernel"
    if layer.blocked:
        return "weights with a scale for each block have no integer kernel"
    if recipe.packs(layer.weight.bits):
        return "packed weights are unpacked to float"
    return None
